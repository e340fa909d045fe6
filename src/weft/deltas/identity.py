"""How a delta knows its base again: by names, shapes and dtypes, and by some of its values.

A base read in other files or from another place is the same base, so no digest of files is asked for; and a whole
model is not hashed to open a small delta. What is sampled tells fine-tunes and versions of one model apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import dtype_name, is_mergeable
from weft.deltas.format import BaseRecord
from weft.deltas.pair import read_any
from weft.engine.writer import raw_bytes
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
    """sha256 over the middle 1024 values of each of 32 tensors; None where they are computed or far away."""
    if base.inputs or any("://" in f.path for f in base.files):
        return None
    digest = hashlib.sha256()
    for values in _sampled(base):
        digest.update(raw_bytes(values))
    return digest.hexdigest()


def _sampled(base: Checkpoint) -> Iterator[Tensor]:
    names = sorted(n for n, i in base.tensors.items() if is_mergeable(i.dtype) and i.numel)
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
