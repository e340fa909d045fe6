"""Open a pack as the model that it stands for: its base, given or named by it, and the stored difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from weft.checkpoints.folders import Folder, LocalFolder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown
from weft.checkpoints.model import assets_of
from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.checkpoints.safetensors import SafetensorsFile
from weft.deltas.format import DELTA_FILE, WEIGHTS, BaseRecord, parse_document
from weft.deltas.identity import check
from weft.deltas.node import Delta
from weft.errors import UnsafeFile, UsageError

_DEEPEST = 8
_OPENING: ContextVar[tuple[str, ...]] = ContextVar("weft_opening_deltas", default=())


def open_delta(folder: Folder, *, base: object = None, limits: Limits = DEFAULT_LIMITS) -> Delta:
    """The model in a folder with `weft_delta.json`.

    `base` goes before the recorded reference, which is looked for beside the pack, then from the present folder.
    Raises UnsafeFile and DataProblems for a damaged or forged pack, DataError for another base than its own.
    """
    from weft.checkpoints.load import load

    where = f"{folder.name}/{DELTA_FILE}"
    document = parse_document(folder.read(DELTA_FILE, limits.index_bytes, "delta-size"), where, limits)
    with _nested(folder):
        under = load(_named_base(folder, document.base) if base is None else base, limits=limits)
    check(under, document.base, folder.name)
    parts = SafetensorsFile(folder.open(WEIGHTS), limits)
    return Delta(under, parts, document, origin=folder.name, assets=assets_of(folder, limits))


@contextmanager
def _nested(folder: Folder) -> Iterator[None]:
    """A base may be a delta itself, but not of itself, nor without end."""
    chain = _OPENING.get()
    key = str(folder.path.resolve()) if isinstance(folder, LocalFolder) else folder.name
    if key in chain or len(chain) >= _DEEPEST:
        raise UnsafeFile(
            "delta-chain",
            f"{folder.name} is a delta of a delta of … {'itself' if key in chain else 'more than 8'}; pass base=",
        )
    token = _OPENING.set((*chain, key))
    try:
        yield
    finally:
        _OPENING.reset(token)


def _named_base(folder: Folder, recorded: BaseRecord) -> Ref:
    if not recorded.ref:
        raise UsageError(f"{folder.name} does not say what it is a difference from; pass base=")
    ref = parse_ref(recorded.ref)
    if ref.kind is Kind.URL:
        # a pack from a stranger must not make us fetch from wherever it likes
        raise UsageError(
            f"{folder.name} names the base {shown(recorded.ref)}; pass it as base= if you trust it"
        )
    for start in [folder.path, Path()] if isinstance(folder, LocalFolder) else []:
        if ref.revision is None and _exists(start / ref.path):
            return Ref(str(start / ref.path), lora=ref.lora)
    if ref.kind is Kind.LOCAL:
        raise UsageError(f"{folder.name} names the base {shown(recorded.ref)}, which is not here; pass base=")
    return ref


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # too long for a path
        return False
