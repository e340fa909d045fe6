"""`pack_delta`: the difference of a model from its base as a lazy checkpoint that `weft.save` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.execution import execution
from weft.checkpoints.load import load
from weft.deltas.choosing import choose
from weft.deltas.format import Document, Entry
from weft.deltas.identity import record
from weft.deltas.packed import Packed
from weft.deltas.pair import Pair
from weft.deltas.scheme import Encoder
from weft.deltas.ways import Way
from weft.errors import UsageError


def pack_delta(model: object, base: object, *, base_ref: str | None = None, **settings: Any) -> Packed:
    """A lazy delta: save it in a folder, and `weft.load` of that folder is (nearly) `model` again.

    `model`, `base`: whatever `load` takes. `scheme` and what it keeps: see `Way`; by default "auto", the cheapest
    for each tensor with ‖θ̂ − θ‖ ≤ 0.2 ‖θ − θ0‖. Vectors and whole numbers are kept exactly, tensors of another
    shape than the base's whole. `base_ref` is what the pack calls its base: a path from its folder, or a Hub id.

    Looks through both models when it is called. Raises UsageError for settings that cannot be meant or models
    without a difference, and, by the time it is saved, DataError for a NaN that only an exact delta keeps.
    """
    way = Way(**settings)
    ours, theirs = load(model), load(base)
    exact = way.exact_names(ours, ours.origin)
    ours.survey()
    theirs.survey()

    def one(name: str) -> Encoder | None:
        return choose(Pair(ours, theirs, name), way, name in exact)

    found = execution().map(one, list(ours))
    encoders = {n: e for n, e in zip(ours, found, strict=True) if e is not None}
    if not any(e.scheme.parts(e.pair.info) for e in encoders.values()):
        raise UsageError(f"{ours.origin} has the weights of {theirs.origin}: there is nothing to pack")
    document = Document(
        record(theirs, base_ref or _name(base)),
        {n: _entry(e) for n, e in encoders.items()},
        config=None if ours.config == theirs.config else ours.config,
        aliases=_aliases(ours, theirs),
        removed=tuple(n for n in theirs if n not in ours),
        dropped_files=tuple(a.name for a in theirs.assets if a.name not in {b.name for b in ours.assets}),
    )
    return Packed(ours, theirs, encoders, document, way, _Assets(ours, theirs))


def _name(base: object) -> str | None:
    return str(base) if isinstance(base, str | Path) else None


def _entry(encoder: Encoder) -> Entry:
    pair = encoder.pair
    same = encoder.scheme.kind == "whole" or pair.base.info(pair.theirs).dtype == pair.info.dtype
    return Entry(encoder.scheme, None if same else pair.info.dtype)


def _aliases(model: Checkpoint, base: Checkpoint) -> dict[str, str] | None:
    """The model's tied names, where they are not what the base's say of it."""
    inherited = {a: t for a, t in base.aliases.items() if a not in model and t in model}
    return None if dict(model.aliases) == inherited else dict(model.aliases)


class _Assets:
    """The model's files that the base lacks or has otherwise, read when asked for. A class, so that it pickles."""

    def __init__(self, model: Checkpoint, base: Checkpoint) -> None:
        self.model, self.base = model, base

    def __call__(self) -> tuple[Asset, ...]:
        theirs = {a.name: a for a in self.base.assets}
        return tuple(
            a for a in self.model.assets if a.name not in theirs or a.read() != theirs[a.name].read()
        )
