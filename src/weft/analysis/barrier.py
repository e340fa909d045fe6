"""The barrier between two models: how far the loss rises on the straight line above that of its ends.

    B = max_α  L((1−α)θa + αθb) − [(1−α) L(θa) + α L(θb)]

(Entezari et al., arXiv:2110.06296; Frankle et al., arXiv:1912.05671, subtract the mean of the ends: `instability`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Measured, Network
from weft.analysis.space import between
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError

Align = Callable[[Checkpoint, Checkpoint], Model]
"""`align(b, a)` → b in an order of units that fits a."""
Repair = Callable[[nn.Module, nn.Module, nn.Module, float], nn.Module]
"""`repair(merged, a, b, α)` → the interpolated module with its statistics corrected; b comes aligned."""


@dataclass(frozen=True)
class Barrier(Finding):
    """Losses along the line from `a` (α = 0) to `b` (α = 1)."""

    a: str
    b: str
    alphas: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float | None, ...]
    ends: tuple[float, float]
    """The losses of the original models, whatever alignment made of them."""
    end_errors: tuple[float | None, float | None]
    aligned: bool = False
    repaired: bool = False

    about: ClassVar[str] = (
        "Loss along the straight line between two models. The barrier is the largest rise above the line between "
        "the losses of the original models (arXiv:2110.06296); near zero, the two can be averaged."
    )

    @property
    def title(self) -> str:
        how = (
            " after alignment" * self.aligned
            + (" and repair" if self.aligned else " after repair") * self.repaired
        )
        return f"Barrier between {self.a} and {self.b}{how}"

    @property
    def excess(self) -> tuple[float, ...]:
        """The rise over the line between the ends, at every α."""
        return excess(self.alphas, self.losses, self.ends)

    @property
    def barrier(self) -> float:
        """The largest rise of the loss; never below 0, as it is 0 at the ends."""
        return max(0.0, *self.excess)

    @property
    def instability(self) -> float:
        """max_α L − (L(θa) + L(θb)) / 2."""
        return max(self.losses) - sum(self.ends) / 2

    @property
    def error_barrier(self) -> float | None:
        """The barrier of the error rate, None without a metric."""
        errors = [e for e in self.errors if e is not None]
        ends = [e for e in self.end_errors if e is not None]
        if len(errors) < len(self.errors) or len(ends) < 2:
            return None
        return max(0.0, *excess(self.alphas, errors, (ends[0], ends[1])))

    @property
    def headline(self) -> str:
        ends = " and ".join(f"{v:.4g}" for v in self.ends)
        told = f"loss barrier {self.barrier:.4g} (the ends have {ends})"
        extra = self.error_barrier
        return told if extra is None else f"{told}; error barrier {100 * extra:.2f} %"

    def to_json(self) -> dict[str, Any]:
        figures = {
            "barrier": self.barrier,
            "instability": self.instability,
            "error_barrier": self.error_barrier,
        }
        return super().to_json() | figures

    def plot(self) -> Any:
        go, made = graphs(), figure(f"α: 0 is {self.a}, 1 is {self.b}", "loss")
        made.add_trace(go.Scatter(x=self.alphas, y=self.losses, name="loss", mode="lines+markers"))
        made.add_trace(go.Scatter(x=[0, 1], y=self.ends, name="between the ends", mode="lines",
                                  line={"dash": "dot", "color": "#7f8794"}))  # fmt: skip
        if all(e is not None for e in self.errors):
            made.add_trace(go.Scatter(x=self.alphas, y=self.errors, name="error rate", yaxis="y2",
                                      mode="lines+markers", line={"dash": "dash"}))  # fmt: skip
            made.update_layout(yaxis2={"title": {"text": "error rate"}, "overlaying": "y", "side": "right",
                                       "tickformat": ".0%", "showgrid": False, "rangemode": "tozero"})  # fmt: skip
        made.update_yaxes(rangemode="tozero")
        return made


def barrier(
    net: Network,
    a: Model,
    b: Model,
    *,
    points: int = 11,
    align: Align | None = None,
    repair: Repair | None = None,
    names: tuple[str, str] = ("a", "b"),
) -> Barrier:
    """Evaluate `points` weights (at least 11) on the line from a to b.

    `align` puts b in order before it is mixed: `lambda b, a: weft.align(b, to=a)`. `repair` corrects the
    statistics of the module between the ends. The losses that the barrier is measured from stay those of the
    original models. Raises UsageError for fewer than 11 points, DataError for weights that do not fit.
    """
    if points < 11:
        raise UsageError(f"a barrier needs at least 11 points, not {points}: fewer miss its top")
    start, end = net.state(a), net.state(b)
    ends = net.measure(start), net.measure(end)
    if align is not None:
        end = net.state(align(load(b), load(a)))
    alphas = tuple(i / (points - 1) for i in range(points))

    def one(alpha: float) -> Measured:
        if alpha == 0 or (alpha == 1 and align is None):
            return ends[int(alpha)]
        if alpha == 1:
            return net.measure(end)
        mixed = net.settled(between(start, end, alpha))
        if repair is None:
            return net.measure(mixed)
        return net.measure_module(repair(net.place(mixed), net.place(start), net.place(end), alpha))

    found = [one(alpha) for alpha in alphas]
    return Barrier(
        *names, alphas, tuple(m.loss for m in found), tuple(m.error for m in found),
        (ends[0].loss, ends[1].loss), (ends[0].error, ends[1].error), align is not None, repair is not None,
    )  # fmt: skip


def excess(alphas: Sequence[float], losses: Sequence[float], ends: tuple[float, float]) -> tuple[float, ...]:
    """L(α) − [(1−α) L(0) + α L(1)] at every α."""
    return tuple(v - (ends[0] + a * (ends[1] - ends[0])) for a, v in zip(alphas, losses, strict=True))
