"""Tail-averaged SGD on least squares, exactly (Jain et al., JMLR 2018, arXiv:1610.03774).

x ~ N(0, H), y = ⟨w*, x⟩ + ε, ε ~ N(0, σ²), L(w) = ½E(y − ⟨w, x⟩)², batches of b, constant step γ. In H's
eigenbasis the expected squares m = E (w_t − w*)² follow, eigenvalue by eigenvalue h,

    m ← m − 2γh m + γ² [ h² m + (h² m + h Σ h'm') / b ] + γ² σ² h / b

(fourth moments of Gaussians), and E (w_t − w*)(w_s − w*) = (1−γh)^{t−s} m_s for t > s. So the excess risk ½Σ h m of
the last iterate and of the mean of the last ones is known without a simulation. The paper's bound of the latter:

    2 (1−γμ)^s / (γμ(T−s))² · (L(w0) − L*)  +  2dσ² / (b(T−s))        for γ at most half the largest step

The exponential factor is the burn-in's, s; averaging adds the 1/(T−s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, figure, graphs
from weft.errors import UsageError


@dataclass(frozen=True)
class TailAveraging(Finding):
    """Expected excess risks after `steps` steps."""

    steps: tuple[int, ...]
    last: tuple[float, ...]
    """Of the last iterate."""
    tail: tuple[float, ...]
    """Of the mean of the last iterates."""
    bound: tuple[float, ...]
    floor: tuple[float, ...]
    """½dσ² over the examples in the tail: what an efficient estimator from them has."""
    rate: float
    largest_rate: float

    about: ClassVar[str] = (
        "Expected excess risk of SGD on Gaussian least squares by exact recursion: the last iterate stays at its "
        "noise, the mean of the tail falls as 1/steps down to a constant of the optimum (arXiv:1610.03774)."
    )

    @property
    def title(self) -> str:
        return "Tail-averaged SGD on least squares"

    @property
    def slope(self) -> float:
        """Of log risk over log steps, between the first and the last number of steps, for the tail's mean."""
        if len(self.steps) < 2:
            return math.nan
        return math.log(self.tail[-1] / self.tail[0]) / math.log(self.steps[-1] / self.steps[0])

    @property
    def headline(self) -> str:
        return (f"after {self.steps[-1]} steps the last iterate has {self.last[-1]:.4g}, the tail's mean "
                f"{self.tail[-1]:.4g} (slope {self.slope:.3f})")  # fmt: skip

    def plot(self) -> Any:
        made = figure("steps", "expected excess risk")
        for name, values, dash in (("last iterate", self.last, "solid"), ("mean of the tail", self.tail, "solid"),
                                   ("bound", self.bound, "dash"), ("efficient", self.floor, "dot")):  # fmt: skip
            made.add_trace(
                graphs().Scatter(x=self.steps, y=values, name=name, mode="lines+markers", line={"dash": dash})
            )
        made.update_xaxes(type="log")
        made.update_yaxes(type="log")
        return made


def tail_averaging(
    eigenvalues: Sequence[float],
    *,
    noise: float,
    rate: float,
    steps: Sequence[int],
    tail: float = 0.5,
    batch: int = 1,
    start: Sequence[float] | float = 1.0,
) -> TailAveraging:
    """Expected excess risks for each number of steps T, averaging the last ⌈tail·T⌉ iterates.

    `eigenvalues` are those of H, `start` is w0 − w* in its eigenbasis, `noise` is σ. Raises UsageError for
    eigenvalues or a share that make no sense, and for a step from which the squares grow without end.
    """
    h = torch.tensor(list(eigenvalues), dtype=torch.float64)
    if not len(h) or bool((h <= 0).any()) or not 0 < tail <= 1 or batch < 1 or not steps or min(steps) < 2:
        raise UsageError(
            "eigenvalues must be positive, 0 < tail ≤ 1, batch at least 1 and every number of steps at least 2"
        )
    w = torch.as_tensor(start, dtype=torch.float64).expand(len(h)).clone()
    largest = largest_rate(h, batch)
    if not 0 < rate < largest:
        raise UsageError(f"the step must be between 0 and {largest:.4g} for these eigenvalues, not {rate:g}")
    squares = _squares(h, w.square(), noise, rate, batch, max(steps))  # [T + 1, d]
    last, means, bounds, floors = [], [], [], []
    gap, mu = float(0.5 * (h * w.square()).sum()), float(h.min())
    for t in steps:
        k = math.ceil(tail * t)
        last.append(float(0.5 * (h * squares[t]).sum()))
        means.append(float(0.5 * (h * _mean_square(h, squares[t - k + 1 : t + 1], rate)).sum()))
        bias = 2 * (1 - rate * mu) ** (t - k) / (rate * mu * k) ** 2 * gap
        bounds.append(bias + 2 * len(h) * noise**2 / (batch * k))
        floors.append(0.5 * len(h) * noise**2 / (batch * k))
    return TailAveraging(tuple(steps), tuple(last), tuple(means), tuple(bounds), tuple(floors), rate, largest)


def largest_rate(h: Tensor, batch: int) -> float:
    """γ_max = 2b / (R² + (b−1)‖H‖), with R² = tr H + 2‖H‖, for Gaussian inputs: E‖x‖²xxᵀ ≼ R²H."""
    return 2 * batch / (float(h.sum() + 2 * h.max()) + (batch - 1) * float(h.max()))


def _squares(h: Tensor, m: Tensor, noise: float, rate: float, batch: int, steps: int) -> Tensor:
    """E (w_t − w*)² in every eigendirection for t = 0 … steps, [steps + 1, d]."""
    found = [m]
    for _ in range(steps):
        random = h.square() * m + h * (h * m).sum()
        m = (
            m
            - 2 * rate * h * m
            + rate**2 * (h.square() * m + random / batch)
            + rate**2 * noise**2 * h / batch
        )
        found.append(m)
    return torch.stack(found)


def _mean_square(h: Tensor, squares: Tensor, rate: float) -> Tensor:
    """E (mean of the iterates − w*)², [d], from their own squares [k, d]."""
    k, r = len(squares), 1 - rate * h
    left = torch.arange(k - 1, -1, -1, dtype=torch.float64)[:, None]  # how many iterates follow each
    # Σ_{j=1..left} r^j
    after = r * (1 - r**left) / (1 - r)
    return (squares * (1 + 2 * after)).sum(0) / k**2
