"""A routed model over preferences: its scores on a grid of them, what of these is optimal, and how much they cover.

found = weft.routing.pareto(routed, score, points=9)     # score(call, task) → larger is better
found.front, found.hypervolume(reference=[0.1, 0.1])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.routing.routed import Routed

MOST_POINTS = 10_000


@dataclass(frozen=True)
class Front:
    """Preferences [n, T] and the score of every task at each, [n, T]; larger is better."""

    tasks: tuple[str, ...]
    preferences: Tensor
    scores: Tensor

    @property
    def front(self) -> Tensor:
        """Indices of the points that no other is at least as good as in everything and better in something."""
        return front(self.scores)

    def hypervolume(self, reference: Sequence[float]) -> float:
        """Volume of what the points dominate above `reference`, the worst scores that count."""
        return hypervolume(self.scores, reference)

    def to_json(self) -> dict[str, Any]:
        return {
            "tasks": list(self.tasks), "preferences": self.preferences.tolist(), "scores": self.scores.tolist(),
            "front": self.front.tolist(),
        }  # fmt: skip


def pareto(
    routed: Routed, score: Callable[[Callable[..., Any], str], float], *, points: int = 5,
    preferences: Sequence[Sequence[float]] | Tensor | None = None,
) -> Front:  # fmt: skip
    """Scores of every task at each preference: of `preferences`, or the simplex grid with `points` along an edge.

    `score(call, task)` gets a function of inputs, the model at a preference, and gives that task's score (larger is
    better). The grid has (points − 1 + T − 1 choose T − 1) points.
    """
    if routed.gating.kind != "preference":
        raise UsageError(
            f"only a preference gate has a front to look along; this one is {routed.gating.kind}"
        )
    count = len(routed.tasks)
    grid = (
        simplex(count, points) if preferences is None else torch.as_tensor(preferences, dtype=torch.float32)
    )
    if grid.dim() != 2 or grid.shape[1] != count:
        raise UsageError(f"preferences must have one number a task: [n, {count}], not {list(grid.shape)}")
    rows = []
    for r in grid:

        def call(*args: Any, _r: Tensor = r, **kwargs: Any) -> Any:
            with torch.no_grad():
                return routed(*args, preference=_r, **kwargs)

        rows.append([float(score(call, t)) for t in routed.tasks])
    return Front(tuple(routed.tasks), grid, torch.tensor(rows, dtype=torch.float64))


def simplex(count: int, points: int) -> Tensor:
    """All r ∈ Δ [n, count] whose numbers are multiples of 1 / (points − 1)."""
    if points < 2 or comb(points + count - 2, count - 1) > MOST_POINTS:
        raise UsageError(f"a grid needs 2 points along an edge or more, and {MOST_POINTS:,} in all at most")

    def parts(left: int, places: int) -> Iterator[list[int]]:
        if places == 1:
            yield [left]
            return
        for first in range(left, -1, -1):
            for rest in parts(left - first, places - 1):
                yield [first, *rest]

    return torch.tensor(list(parts(points - 1, count)), dtype=torch.float32) / (points - 1)


def front(scores: Tensor) -> Tensor:
    """Indices of the rows [n, T] that no other dominates, of equal ones the first."""
    found = []
    for i, own in enumerate(scores):
        at_least = (scores >= own).all(1)
        better = at_least & (scores > own).any(1)
        same = (scores == own).all(1)
        if not bool(better.any()) and not bool(same[:i].any()):
            found.append(i)
    return torch.tensor(found, dtype=torch.int64)


def hypervolume(scores: Tensor, reference: Sequence[float]) -> float:
    """∪ of the boxes from `reference` to each row, exactly: slices along the last axis, each a volume one lower."""
    base = torch.as_tensor(reference, dtype=torch.float64)
    if base.shape != scores.shape[1:]:
        raise UsageError(f"the reference needs {scores.shape[1]} numbers, one a task")
    above = (scores.double() - base).clamp_min(0)
    return _volume(above[(above > 0).all(1)])


def _volume(x: Tensor) -> float:
    """x: [n, d], all above zero."""
    if not len(x):
        return 0.0
    if x.shape[1] == 1:
        return float(x.max())
    x = x[front(x)]
    x = x[x[:, -1].argsort(descending=True)]
    total = 0.0
    for i in range(len(x)):
        low = float(x[i + 1, -1]) if i + 1 < len(x) else 0.0
        height = float(x[i, -1]) - low
        if height > 0:
            total += height * _volume(x[: i + 1, :-1])
    return total
