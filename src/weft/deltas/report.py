"""What a delta costs and loses, tensor by tensor: bytes, and the error of what is read back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import inf, sqrt

import torch

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import execution
from weft.deltas.exact import raw
from weft.deltas.node import Delta
from weft.deltas.pair import Pair
from weft.errors import DataProblems


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of a delta."""

    name: str
    scheme: str
    """"unchanged", or the scheme with its numbers."""
    bytes: int
    """What it takes in the pack."""
    whole: int
    """What it takes in the model."""
    error: float | None = None
    """‖θ̂ − θ‖ / ‖θ − θ0‖ of what is read back, in the storage dtype; None if it was not measured."""
    norm: float | None = None
    """‖θ − θ0‖; None for what is no difference of floats, or not measured."""


def contents(delta: Delta) -> list[Row]:
    """What is stored, without reading a value."""
    return [_row(delta, name) for name in delta]


def _row(delta: Delta, name: str) -> Row:
    entry, info = delta.document.tensors.get(name), delta.info(name)
    if entry is None:
        return Row(name, "unchanged", 0, info.nbytes)
    scheme = entry.scheme
    told = [f"{f.name}={getattr(scheme, f.name)}" for f in fields(scheme)]  # type: ignore[arg-type]
    size = sum(i.nbytes for i in scheme.parts(info).values())
    return Row(name, " ".join([scheme.kind, *told]), size, info.nbytes)


def compare(delta: Delta, model: Checkpoint) -> list[Row]:
    """The rows with errors: what the delta gives, held against the model that it was made from.

    DataProblems where the two don't have the same tensors.
    """
    problems = [f"{n}: not in {delta.origin}" for n in model if n not in delta]
    problems += [f"{n}: not in {model.origin}" for n in delta if n not in model]
    problems += [
        f"{n}: {i.dtype} {list(i.shape)} in {model.origin}, {delta.info(n).dtype} {list(delta.info(n).shape)}"
        for n, i in model.tensors.items()
        if n in delta and delta.info(n) != i
    ]
    if problems:
        raise DataProblems(f"{delta.origin} is no delta of {model.origin}", problems)
    model.survey()
    delta.survey()
    return execution().map(lambda name: _compared(delta, model, name), list(delta))


def _compared(delta: Delta, model: Checkpoint, name: str) -> Row:
    row = _row(delta, name)
    back, pair = Pair(model, delta, name), Pair(model, delta.base, name)
    error, norm = 0.0, 0.0
    with back.prepared():
        for a, b in back.cuts():
            ours, theirs = back.after(a, b), back.before(a, b, back.info.dtype)
            if not torch.equal(raw(ours), raw(theirs)):
                lost = float((ours.double() - theirs.double()).square().sum()) if _real(ours) else inf
                error += lost
            if pair.comparable and _real(ours):
                norm += float((ours.double() - pair.before(a, b).double()).square().sum())
    measured = pair.comparable and back.info.dtype.is_floating_point
    share = 0.0 if error == 0 else (sqrt(error / norm) if norm else inf)
    return Row(row.name, row.scheme, row.bytes, row.whole, share, sqrt(norm) if measured else None)


def _real(values: torch.Tensor) -> bool:
    return values.is_floating_point()


def total(rows: Sequence[Row]) -> Row:
    """All tensors as one; its error is that of the whole task vector."""
    lost = [(r.error * r.norm) ** 2 for r in rows if r.error is not None and r.norm]
    whole = sum(r.norm**2 for r in rows if r.norm is not None)
    known = all(r.error is not None for r in rows)
    error = (sqrt(sum(lost) / whole) if whole else 0.0) if known else None
    return Row(
        "all",
        "",
        sum(r.bytes for r in rows),
        sum(r.whole for r in rows),
        error,
        sqrt(whole) if known else None,
    )
