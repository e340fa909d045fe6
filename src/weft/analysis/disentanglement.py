"""Weight disentanglement: does adding one task vector change what the other's task sees? (arXiv:2305.12827)

    ξ(α₁, α₂) = Σ_{t=1,2} E_{x∈D_t} dist( f(x; θ0 + α_tτ_t), f(x; θ0 + α₁τ₁ + α₂τ₂) )

dist is the disagreement of predictions (or the total variation of softmax outputs). ξ = 0 everywhere means that
f(x; θ0 + Σα_tτ_t) is a sum of functions each of which lives on its own task's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from weft.analysis.finding import SCALE, Finding, equal_axes, figure, graphs
from weft.analysis.network import Network, State
from weft.analysis.space import affine
from weft.api import Model
from weft.errors import UsageError, did_you_mean

Distance = Literal["disagreement", "total_variation"]


def disagreement(a: Tensor, b: Tensor) -> float:
    """The share of examples with another predicted class."""
    return float((a.argmax(-1) != b.argmax(-1)).double().mean())


def total_variation(a: Tensor, b: Tensor) -> float:
    """½ Σ_c |softmax(a)_c − softmax(b)_c|, the mean over examples."""
    return float((a.double().softmax(-1) - b.double().softmax(-1)).abs().sum(-1).mean() / 2)


DISTANCES: dict[str, Callable[[Tensor, Tensor], float]] = {
    "disagreement": disagreement, "total_variation": total_variation,
}  # fmt: skip


@dataclass(frozen=True)
class Disentanglement(Finding):
    """`error[j][i]` is ξ(alphas[i], alphas[j]); each task contributes at most 1."""

    tasks: tuple[str, str]
    alphas: tuple[float, ...]
    error: tuple[tuple[float, ...], ...]
    distance: str

    about: ClassVar[str] = (
        "How much adding the other task's vector changes each task's predictions, over both scales α₁ and α₂ "
        "(arXiv:2305.12827). Light is disentangled; the box is 0 ≤ α ≤ 1, where merges are searched."
    )

    @property
    def title(self) -> str:
        return f"Disentanglement error of {self.tasks[0]} and {self.tasks[1]}"

    @property
    def mean(self) -> float:
        """Mean of ξ over the grid points with 0 < α₁, α₂ ≤ 1, or the whole grid where there is none."""
        inside = [i for i, a in enumerate(self.alphas) if 0 < a <= 1] or list(range(len(self.alphas)))
        return sum(self.error[j][i] for j in inside for i in inside) / len(inside) ** 2

    @property
    def headline(self) -> str:
        return f"mean ξ over 0 < α ≤ 1 is {self.mean:.4f}, the largest of the grid {max(map(max, self.error)):.4f}"

    def plot(self) -> Any:
        made = figure(f"α₁ ({self.tasks[0]})", f"α₂ ({self.tasks[1]})", height=520)
        made.add_trace(graphs().Heatmap(
            z=self.error, x=self.alphas, y=self.alphas, colorscale=SCALE, zmin=0, colorbar={"title": {"text": "ξ"}},
            hovertemplate="α₁ %{x:.2f}, α₂ %{y:.2f}: ξ %{z:.4f}<extra></extra>",
        ))  # fmt: skip
        made.add_shape(
            type="rect", x0=0, y0=0, x1=1, y1=1, line={"color": "#c2347a", "width": 2, "dash": "dash"}
        )
        equal_axes(made)
        return made


def disentanglement(
    nets: Sequence[Network],
    base: Model,
    models: Sequence[Model],
    *,
    alphas: Sequence[float] | None = None,
    distance: Distance = "disagreement",
    names: tuple[str, str] = ("task 1", "task 2"),
) -> Disentanglement:
    """ξ on a grid; `nets[t]` is the network on the data of task t, whose labels are not looked at.

    `alphas` are 21 values in [−2, 2] by default (the paper: 20 in [−3, 3]). Raises UsageError
    for other than two tasks.
    """
    if len(models) != 2 or len(nets) != 2:
        raise UsageError(
            f"disentanglement is between two tasks, not {len(models)} models and {len(nets)} data sets"
        )
    if distance not in DISTANCES:
        hint = did_you_mean(distance, DISTANCES)
        raise UsageError(f"distance must be {' or '.join(get_args(Distance))}, not {distance!r}{hint}")
    apart = DISTANCES[distance]
    grid = [round(-2 + 0.2 * i, 10) for i in range(21)] if alphas is None else [float(a) for a in alphas]
    states = nets[0].states([base, *models])

    def edited(a1: float, a2: float) -> State:
        return affine([1 - a1 - a2, a1, a2], states)

    alone = [
        [net.outputs(edited(*((a, 0.0) if t == 0 else (0.0, a)))) for a in grid] for t, net in enumerate(nets)
    ]
    rows = []
    for j, a2 in enumerate(grid):
        row = []
        for i, a1 in enumerate(grid):
            both = edited(a1, a2)
            row.append(sum(apart(alone[t][i if t == 0 else j], nets[t].outputs(both)) for t in (0, 1)))
        rows.append(tuple(row))
    return Disentanglement(names, tuple(grid), tuple(rows), distance)
