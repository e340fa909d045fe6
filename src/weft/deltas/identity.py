"""How a delta knows its base again: by names, shapes and dtypes, and by some of its values.

A base read in other files or from another place is the same base, so no digest of files is asked for; and a whole
model is not hashed to open a small delta. What is sampled tells fine-tunes and versions of one model apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import dtype_name, is_mergeable
from weft.deltas.format import BaseRecord
from weft.deltas.node import Delta
from weft.deltas.pair import read_any
from weft.errors import DataError

_TENSORS, _ELEMENTS = 32, 1024


def record(base: Checkpoint, ref: str | None) -> BaseRecord:
    """What `weft_delta.json` says of the base."""
    return BaseRecord(ref, signature(base), sample(base))


def signature(base: Checkpoint) -> str:
    """sha256 over the sorted names with shape and dtype."""
    lines = [f"{n} {list(i.shape)} {dtype_name(i.dtype)}" for n, i in sorted(base.tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sample(base: Checkpoint) -> str | None:
    """sha256 over the middle 1024 values of each of 32 tensors; None where they are computed or far away.

    Of a base that is a delta, its own base's and that of its stored parts, which say the same on any machine.
    """
    if isinstance(base, Delta):
        below = sample(base.base)
        if below is None or _computed(base.parts):
            return None
        told = f"{below} {signature(base.parts)} {_digest(base.parts, list(base.parts))}"
        return hashlib.sha256(told.encode()).hexdigest()
    if _computed(base):
        return None
    return _digest(base, [n for n, i in base.tensors.items() if is_mergeable(i.dtype)])


def _computed(base: Checkpoint) -> bool:
    return bool(base.inputs) or any("://" in f.path for f in base.files)


def _digest(base: Checkpoint, names: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for values in _sampled(base, sorted(n for n in names if base.info(n).numel)):
        digest.update(Bits.of(values).memory)
    return digest.hexdigest()


def _sampled(base: Checkpoint, names: Sequence[str]) -> Iterator[Tensor]:
    for i in range(min(_TENSORS, len(names))):
        name = names[i * len(names) // min(_TENSORS, len(names))]
        info = base.info(name)
        start = max(0, info.numel // 2 - _ELEMENTS // 2)
        yield read_any(base, name, start, min(start + _ELEMENTS, info.numel), info.dtype)


def check(base: Checkpoint, recorded: BaseRecord, where: str) -> None:
    """DataError unless `base` is, as far as can be told, the one that the delta was made for."""
    called = f" (it was called {recorded.ref!r})" if recorded.ref else ""
    if signature(base) != recorded.signature:
        raise DataError(
            f"{where} was made for another base{called}: names, shapes or dtypes of {base.origin} differ from "
            "it; pass the right one as base="
        )
    if recorded.sample is not None and sample(base) not in (None, recorded.sample):
        raise DataError(
            f"{where} was made for another base{called}: {base.origin} has its shapes but other values; pass the "
            "right one as base="
        )
