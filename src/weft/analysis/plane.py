"""Two-dimensional cuts through the loss: the plane of three models, and random directions about one.

Coordinates are distances in weight space: with u = (θ₂ − θ₁)/‖θ₂ − θ₁‖ and v the part of θ₃ − θ₁ orthogonal to
u, normalised, the point (x, y) is θ₁ + x u + y v (Garipov et al., arXiv:1802.10026). About one model the
directions are random and filter-normalised (Li et al., arXiv:1712.09913).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, equal_axes, figure, graphs
from weft.analysis.network import Network, State
from weft.analysis.space import affine, filter_normalised, flat, normal, shaped
from weft.api import Model
from weft.errors import UsageError


@dataclass(frozen=True)
class Plane(Finding):
    """Loss and metric on a grid; `losses[j][i]` is at (xs[i], ys[j])."""

    names: tuple[str, ...]
    points: tuple[tuple[float, float], ...]
    """Where the models lie."""
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    losses: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float | None, ...], ...]
    random: bool = False

    about: ClassVar[str] = (
        "The loss on a plane of weight space with its contours. Axes of a plane through three models are true "
        "distances between weights; random directions are filter-normalised (arXiv:1712.09913)."
    )

    @property
    def title(self) -> str:
        return (
            f"Loss about {self.names[0]}" if self.random else f"Loss on the plane of {', '.join(self.names)}"
        )

    @property
    def lowest(self) -> tuple[float, float, float]:
        """(loss, x, y) of the lowest point of the grid."""
        return min((v, x, y) for y, row in zip(self.ys, self.losses, strict=True)
                   for x, v in zip(self.xs, row, strict=True))  # fmt: skip

    @property
    def headline(self) -> str:
        loss, x, y = self.lowest
        return f"the lowest loss of the grid is {loss:.4g}, at ({x:.3g}, {y:.3g})"

    def plot(self) -> Any:
        go = graphs()
        unit = "in lengths of the filters" if self.random else "distance in weight space"
        made = figure(unit, unit, height=560)
        low = min(v for row in self.losses for v in row)
        # steps of equal ratio: a basin and the heights around it in one picture
        tall = [[float(torch.tensor(v - low + 1e-3).log10()) for v in row] for row in self.losses]
        made.add_trace(go.Contour(
            z=tall, x=self.xs, y=self.ys, customdata=self.losses, ncontours=20, colorscale="Viridis",
            hovertemplate="(%{x:.3g}, %{y:.3g})<br>loss %{customdata:.4g}<extra></extra>",
            colorbar={"title": {"text": "log₁₀(loss − lowest + 0.001)"}}, line={"width": 0.6},
        ))  # fmt: skip
        px, py = zip(*self.points, strict=True)
        made.add_trace(go.Scatter(x=px, y=py, text=self.names, mode="markers+text", textposition="top center",
                                  marker={"size": 11, "color": "#ffffff", "line": {"width": 2, "color": "#111111"}},
                                  # legible on every colour of the map
                                  textfont={"color": "#ffffff", "shadow": "0 0 3px #000, 0 0 3px #000"},
                                  showlegend=False))  # fmt: skip
        equal_axes(made)
        return made


def loss_plane(
    net: Network,
    models: Sequence[Model],
    *,
    points: int = 17,
    margin: float = 0.25,
    names: Sequence[str] | None = None,
) -> Plane:
    """The loss on the plane through three models, `margin` beyond their bounding box on every side.

    Buffers are mixed with the same affine coefficients as the weights. Raises UsageError for another number
    of models, or for three that lie on a line.
    """
    if len(models) != 3:
        raise UsageError(f"a plane goes through three models, not {len(models)}")
    states = net.states(models)
    origin, second, third = (flat(s, net.parameters) for s in states)
    (length,), corner, height = _coordinates(second - origin, third - origin)
    where = ((0.0, 0.0), (length, 0.0), (corner, height))
    xs, ys = (_axis([p[i] for p in where], points, margin) for i in (0, 1))

    def state(x: float, y: float) -> State:
        c3 = y / height
        c2 = (x - c3 * corner) / length
        return affine([1 - c2 - c3, c2, c3], states)

    labels = tuple(names) if names is not None else ("θ₁", "θ₂", "θ₃")
    return _surveyed(net, state, labels, where, xs, ys, False)


def random_plane(
    net: Network, model: Model, *, radius: float = 1.0, points: int = 17, seed: int = 0, name: str = "model"
) -> Plane:
    """The loss at θ + x δ + y η for |x|, |y| ≤ radius and two random filter-normalised directions."""
    start = net.state(model)
    moves = [filter_normalised(normal(start, net.parameters, 2 * seed + i), start) for i in (0, 1)]
    axis = tuple(radius * (2 * i / (points - 1) - 1) for i in range(points))

    def state(x: float, y: float) -> State:
        vector = flat(start, net.parameters)
        for c, move in zip((x, y), moves, strict=True):
            vector = vector + c * flat(move, net.parameters)
        return {**start, **shaped(vector, start, net.parameters)}

    return _surveyed(net, state, (name,), ((0.0, 0.0),), axis, axis, True)


def _coordinates(d2: Tensor, d3: Tensor) -> tuple[tuple[float], float, float]:
    """‖d₂‖ and the coordinates of d₃ in the basis of the plane."""
    length = float(d2.norm())
    if length == 0 or float(d3.norm()) == 0:
        raise UsageError("two of the three models have the same weights, so there is no plane through them")
    corner = float(d2 @ d3) / length
    height = float((d3 - corner / length * d2).norm())
    if height < 1e-6 * float(d3.norm()):
        raise UsageError(
            "the three models lie on one line, so there is no plane through them; look at the barrier"
        )
    return (length,), corner, height


def _axis(values: Sequence[float], points: int, margin: float) -> tuple[float, ...]:
    low, high = min(values), max(values)
    low, high = low - margin * (high - low), high + margin * (high - low)
    return tuple(low + (high - low) * i / (points - 1) for i in range(points))


def _surveyed(
    net: Network, state: Any, names: tuple[str, ...], where: Any, xs: tuple[float, ...], ys: tuple[float, ...],
    random: bool,
) -> Plane:  # fmt: skip
    found = [[net.measure(net.settled(state(x, y))) for x in xs] for y in ys]
    return Plane(
        names, where, xs, ys, tuple(tuple(m.loss for m in row) for row in found),
        tuple(tuple(m.error for m in row) for row in found), random,
    )  # fmt: skip
