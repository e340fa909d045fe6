"""Bias, variance, covariance and locality of averaged weights (DiWA; Ramé et al., arXiv:2205.09739).

R independent draws (of data or initialisation) give M models each, f_{rm}: [n, C]; f̄ is the mean of all, y the
target. Of squared errors, summed over outputs, in the mean over examples:

    bias² = ‖f̄ − y‖²      var = E_{rm} ‖f_{rm} − f̄‖²      cov = E_r E_{m≠m'} ⟨f_{rm} − f̄, f_{rm'} − f̄⟩
    E_r ‖(1/M)Σ_m f_{rm} − y‖² = bias² + var/M + (M−1)/M · cov                     exactly
    E_r ‖f(θ̄_r) − y‖²        = the same + locality gap,  of order Δ² = E_r max_m ‖θ_{rm} − θ̄_r‖²

With one draw, var and cov cannot be told apart: cov is −var/(M−1), and the two cancel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from weft.analysis.finding import COLOURS, Finding, figure, graphs
from weft.analysis.network import Network
from weft.analysis.space import flat, mean
from weft.api import Model
from weft.errors import UsageError


@dataclass(frozen=True)
class Decomposition(Finding):
    """The terms; `ensemble` = bias + variance/M + (M−1)/M · covariance, `average` = ensemble + gap."""

    draws: int
    members: int
    bias: float
    variance: float
    covariance: float
    single: float
    """The mean squared error of one model: bias + variance."""
    ensemble: float
    average: float | None
    """Of the averaged weights; None where only outputs are known."""
    locality: float | None
    """Δ²."""

    about: ClassVar[str] = (
        "The squared error of an average of M models is bias² + var/M + (M−1)/M · cov, plus a term that grows with "
        "the distance Δ² between the weights (arXiv:2205.09739): averages want models that differ, but not by much."
    )

    @property
    def title(self) -> str:
        return "Bias, variance, covariance, locality"

    @property
    def gap(self) -> float | None:
        """average − ensemble: what leaving the outputs' ensemble for weights costs."""
        return None if self.average is None else self.average - self.ensemble

    @property
    def headline(self) -> str:
        told = (f"bias² {self.bias:.4g}, variance {self.variance:.4g}, covariance {self.covariance:.4g}: a single "
                f"model {self.single:.4g}, the ensemble {self.ensemble:.4g}")  # fmt: skip
        return (
            told
            if self.average is None
            else f"{told}, the average {self.average:.4g} (Δ² {self.locality:.4g})"
        )

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"gap": self.gap}

    def plot(self) -> Any:
        m = self.members
        parts = [
            ("bias²", self.bias),
            ("var/M", self.variance / m),
            ("(M−1)/M · cov", (m - 1) / m * self.covariance),
        ]
        made = figure("", "squared error")
        kinds, values = ["relative"] * 3 + ["total"], [v for _, v in parts] + [self.ensemble]
        labels = [n for n, _ in parts] + ["ensemble"]
        if self.average is not None and self.gap is not None:
            kinds, values, labels = (
                [*kinds, "relative", "total"],
                [*values, self.gap, self.average],
                [*labels, "locality gap", "average"],
            )
        coloured = {k: {"marker": {"color": COLOURS[i]}}
                    for k, i in (("increasing", 1), ("decreasing", 2), ("totals", 0))}  # fmt: skip
        made.add_trace(graphs().Waterfall(x=labels, y=values, measure=kinds, textposition="outside",
                                          text=[f"{v:.4g}" for v in values], **coloured))  # fmt: skip
        return made


def decompose(
    predictions: Tensor, targets: Tensor, average: Tensor | None = None, locality: float | None = None
) -> Decomposition:
    """Decompose predictions [R, M, n, C] against targets [n, C]; `average` [R, n, C] are those of averaged weights.

    Raises UsageError for other shapes.
    """
    f, y = predictions.double(), targets.double()
    if (
        f.dim() != 4
        or y.shape != f.shape[2:]
        or (average is not None and average.shape != (len(f), *y.shape))
    ):
        raise UsageError(
            f"predictions must be [draws, members, n, C] and targets [n, C], not {list(f.shape)} and "
            f"{list(y.shape)}"
        )
    members = f.shape[1]
    centre = f.mean((0, 1))
    apart = f - centre

    def size(x: Tensor) -> float:
        return float(x.square().sum(-1).mean())

    variance = size(apart)
    # Σ_{m≠m'} ⟨a_m, a_m'⟩ = ‖Σ a_m‖² − Σ‖a_m‖²
    crossed = apart.sum(1).square().sum(-1) - apart.square().sum((1, 3))
    covariance = float(crossed.mean()) / (members * (members - 1)) if members > 1 else 0.0
    return Decomposition(
        len(f), members, size(centre - y), variance, covariance, size(f - y), size(f.mean(1) - y),
        None if average is None else size(average.double() - y), locality,
    )  # fmt: skip


def bias_variance(net: Network, draws: Sequence[Sequence[Model]]) -> Decomposition:
    """Decompose the error of softmax outputs (of outputs as they are, for real targets) on the network's data.

    `draws[r][m]` are the models of independent draw r, all of the same number. Raises UsageError otherwise.
    """
    members = {len(d) for d in draws}
    if len(members) != 1 or 0 in members:
        raise UsageError("every draw needs the same number of models, at least one")
    classes = not net.targets.is_floating_point()
    found, averages, far = [], [], []
    for draw in draws:
        states = net.states(draw)
        middle = mean(states)
        centre = flat(middle, net.parameters)
        far.append(max(float((flat(s, net.parameters) - centre).square().sum()) for s in states))
        outputs = [net.outputs(s).double() for s in (*states, net.settled(middle))]
        outputs = [o.softmax(-1) for o in outputs] if classes else outputs
        found.append(torch.stack(outputs[:-1]))
        averages.append(outputs[-1])
    predictions = torch.stack(found)
    targets = one_hot(net.targets, predictions.shape[-1]) if classes else net.targets
    return decompose(
        predictions, targets.reshape(predictions.shape[2:]), torch.stack(averages), sum(far) / len(far)
    )
