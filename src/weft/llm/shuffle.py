"""Layer shuffle: every layer of the output is drawn from one of several models."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError
from weft.llm.slices import Layers, layers, stacked


def shuffled(
    models: Sequence[Any],
    seed: int,
    *,
    weights: Sequence[float] | None = None,
    order: bool = False,
    stack: str | None = None,
) -> Checkpoint:
    """Layer i of the output is layer i of a model drawn with probability ∝ `weights` (equal by default).

    With `order` the places are permuted, too: layer i is then layer π(i) of the model drawn. Embeddings, final
    norm and head, config and files are the first model's. The draw depends on `seed` and i alone. UsageError
    where the models do not have as many layers, or weights are negative or all zero.
    """
    every = [layers(m, stack) for m in models]
    counts = {len(e) for e in every}
    if len(counts) != 1:
        told = ", ".join(f"{len(e)} in {e.picks[0][0].model.origin}" for e in every) or "no model"
        raise UsageError(f"a layer shuffle needs models of as many layers each, not {told}")
    shares = [1.0] * len(every) if weights is None else list(weights)
    if len(shares) != len(every) or min(shares) < 0 or sum(shares) <= 0:
        raise UsageError(f"weights must be one number a model, none negative and not all zero, not {weights}")
    count = counts.pop()
    places = sorted(range(count), key=lambda i: _draw(seed, "place", i)) if order else list(range(count))
    picks = [every[_chosen(shares, _draw(seed, "model", i))].picks[place] for i, place in enumerate(places)]
    first = every[0].picks[0][0]
    made = stacked(Layers(picks), frame=first.model, around=first)
    made.origin = f"a shuffle of {', '.join(e.picks[0][0].model.origin for e in every)}, seed {seed}"
    return made


def _draw(seed: int, what: str, i: int) -> float:
    """A number in [0, 1) that depends on nothing else."""
    digest = hashlib.blake2b(f"weft/shuffle:{seed}:{what}:{i}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _chosen(shares: Sequence[float], draw: float) -> int:
    """The model in whose share of [0, 1) the draw falls."""
    total, reached = sum(shares), 0.0
    for i, share in enumerate(shares):
        reached += share / total
        if share > 0 and draw < reached:
            return i
    return max(i for i, share in enumerate(shares) if share > 0)
