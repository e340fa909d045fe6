"""Averaging along one run: how the variance of the weights falls with the window, and what the loss does.

For checkpoints θ_1 … θ_T of a run, windows of k neighbours and the mean θ̄ of their means,

    V(k) = Σ_w ‖θ̄_w − θ̄‖² / (W − 1) over the W disjoint windows of k

Independent noise about a fixed point gives V ∝ 1/k (slope −1); correlated iterates fall more slowly, a run that
still travels hardly at all. All from the Gram matrix of the checkpoints, so weights stream by range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network
from weft.analysis.similarity import similarity
from weft.analysis.space import affine
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError


@dataclass(frozen=True)
class VarianceDecay(Finding):
    """V(k) for the windows that fit at least twice."""

    count: int
    windows: tuple[int, ...]
    variance: tuple[float, ...]
    losses: tuple[float, ...] | None = None
    """Of every checkpoint, where there are data."""
    averaged: tuple[float, ...] | None = None
    """Of the mean of the last 1 … T checkpoints."""

    about: ClassVar[str] = (
        "How the variance of averaged weights falls with the number of neighbouring checkpoints averaged. "
        "Independent noise falls as 1/k (slope −1); where it falls, averaging helps (SWA, arXiv:1803.05407)."
    )

    @property
    def title(self) -> str:
        return f"Averaging along a run of {self.count} checkpoints"

    @property
    def slope(self) -> float:
        """Least-squares slope of log V over log k; NaN where V vanishes."""
        points = [
            (math.log(k), math.log(v)) for k, v in zip(self.windows, self.variance, strict=True) if v > 0
        ]
        if len(points) < 2:
            return math.nan
        mx, my = (sum(p[i] for p in points) / len(points) for i in (0, 1))
        return sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)

    @property
    def headline(self) -> str:
        told = f"the variance falls with slope {self.slope:.3f}"
        if self.losses is None or self.averaged is None:
            return told
        loss, count = min((v, i + 1) for i, v in enumerate(self.averaged))
        return (
            f"{told}; the mean of the last {count} has loss {loss:.4g}, the last alone {self.losses[-1]:.4g}"
        )

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"slope": None if math.isnan(self.slope) else self.slope}

    def plot(self) -> Any:
        go, made = graphs(), figure("checkpoints averaged, k", "variance of the mean, V(k)")
        made.add_trace(go.Scatter(x=self.windows, y=self.variance, name="V(k)", mode="lines+markers"))
        made.add_trace(go.Scatter(x=self.windows, y=[self.variance[0] * self.windows[0] / k for k in self.windows],
                                  name="1/k", mode="lines", line={"dash": "dot", "color": "#7f8794"}))  # fmt: skip
        made.update_xaxes(type="log", tickvals=list(self.windows))
        made.update_yaxes(type="log")
        return made


def variance_decay(trajectory: Sequence[Model], net: Network | None = None) -> VarianceDecay:
    """Measure a run's checkpoints, in their order; with a network also the losses of means of the last ones.

    Raises UsageError for fewer than four checkpoints.
    """
    if len(trajectory) < 4:
        raise UsageError(f"a run needs at least four checkpoints to speak of decay, not {len(trajectory)}")
    sources: list[Checkpoint] = [load(m) for m in trajectory]
    # distances from the first one, so that large weights cancel before they are squared
    gram = _gram(sources)
    count = len(sources)
    windows = list(range(1, count // 2 + 1))
    found = [_variance(gram, k) for k in windows]
    losses = averaged = None
    if net is not None:
        states = net.states(sources)
        losses = tuple(net.measure(s).loss for s in states)
        means = [affine([1.0 / k] * k, states[count - k :]) for k in range(1, count + 1)]
        averaged = tuple(net.measure(net.settled(m)).loss for m in means)
    return VarianceDecay(count, tuple(windows), tuple(found), losses, averaged)


def _gram(sources: Sequence[Checkpoint]) -> Tensor:
    """⟨θᵢ − θ₁, θⱼ − θ₁⟩, [T, T], streamed."""
    found = similarity(sources, sources[0])
    lengths = torch.tensor(found.norms, dtype=torch.float64)
    distances = torch.tensor(found.distance, dtype=torch.float64)
    return (lengths[:, None] ** 2 + lengths**2 - distances**2) / 2


def _variance(gram: Tensor, k: int) -> float:
    """V(k): the windows end with the run, so what does not fill one is left over at its start."""
    count = len(gram)
    number = count // k
    rows = torch.zeros(number, count, dtype=torch.float64)
    for w in range(number):
        start = count - number * k + w * k
        rows[w, start : start + k] = 1.0 / k
    rows = rows - rows.mean(0)
    return float(((rows @ gram) * rows).sum().clamp(min=0)) / (number - 1)
