"""The engine in forty lines, to check what steps and statistics promise it: any cut gives the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm
from typing import Any

import torch
from torch import Tensor

from weft.methods import stats
from weft.methods.step import At, Pipeline, row_length

Stacks = Mapping[str, Tensor]


def cuts(at: At, grain: str, tiles: int) -> list[tuple[int, int]]:
    """Ranges of `tiles` tiles at least, beginning at multiples of tile and grain."""
    n = at.numel
    unit = {"element": 1, "row": row_length(at.shape), "tensor": max(n, 1)}[grain]
    length = lcm(unit, stats.TILE) * tiles if grain != "tensor" else max(n, 1)
    return [(a, min(a + length, n)) for a in range(0, n, length)] or [(0, 0)]


def run_model(pipeline: Pipeline, stacks: Stacks, tiles: int, **at: Any) -> dict[str, Tensor]:
    """Run the steps on stacks `[k, *shape]` in ranges, statistics by tensor or over the model."""
    where = {n: At(name=n, shape=tuple(x.shape[1:]), **at) for n, x in stacks.items()}
    flat = {n: x.reshape(x.shape[0], -1) for n, x in stacks.items()}
    reduced = False
    for bound in pipeline.steps:
        groups = [list(flat)] if bound.scope == "model" else [[n] for n in flat]
        found = {n: gather(bound, {n: flat[n] for n in g}, where, tiles) for g in groups for n in g}
        for n, x in flat.items():
            out = []
            for a, b in cuts(where[n], pipeline.grain, tiles):
                place = At(**{**vars(where[n]), "start": a})
                tail = {"element": (b - a,), "row": (-1, row_length(place.shape)), "tensor": place.shape}
                part = x[..., a:b].reshape((*x.shape[:-1], *tail[bound.grain])).clone()
                nothing = {need.keyword: None for need in bound.step.needs}
                y = bound.step.run(part, bound.params, found[n] | nothing, place, None)
                out.append(y.reshape(*([] if reduced or bound.step.reduces else [y.shape[0]]), -1))
            flat[n] = torch.cat(out, -1)
        reduced = reduced or bound.step.reduces
    return {n: x.reshape((*x.shape[:-1], *where[n].shape)) for n, x in flat.items()}


def gather(bound: Any, flat: Stacks, where: Mapping[str, At], tiles: int) -> dict[str, Any]:
    stat, memo = bound.step.stat, None
    if stat is None:
        return {}
    for _ in range(stat.rounds()):
        parts = [
            stat.partial(x[:, a:b].clone(), memo, bound.params, At(**{**vars(where[n]), "start": a}))
            for n, x in flat.items()
            for a, b in cuts(where[n], bound.grain, tiles)
        ]
        if not stat.needs_order:
            parts.reverse()
        memo = stat.combine(stat.join(parts), memo, bound.params, sum(x.shape[1] for x in flat.values()))
    found: dict[str, Any] = stat.result(memo, bound.params)
    return found
