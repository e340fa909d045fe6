"""Mode connectivity: a curve of low loss between two models (Garipov et al., arXiv:1802.10026).

    φ(t) = (1−t)² θa + 2t(1−t) θ + t² θb          or the polyline θa – θ – θb

θ is trained to minimise E_{t~U(0,1)} L(φ(t)), one t a batch; the ends stay as they are. The curve is no straight
line: that it exists says that minima are connected, not that they can be averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from weft.analysis.finding import KEPT, Finding, figure, graphs
from weft.analysis.network import Network, State, exact_attention
from weft.analysis.space import affine, between, gram_of_states
from weft.api import Model
from weft.errors import UsageError, did_you_mean

Kind = Literal["bezier", "polyline"]


@dataclass(frozen=True)
class Curve(Finding):
    """Losses along the trained curve and along the chord."""

    a: str
    b: str
    kind: str
    ts: tuple[float, ...]
    losses: tuple[float, ...]
    errors: tuple[float | None, ...]
    chord: tuple[float, ...]
    """Losses on the straight line at the same t."""
    length: float
    """Arc length of the curve over that of the chord."""
    control: State = field(repr=False, compare=False, metadata=KEPT)
    """θ, the trained control point."""

    about: ClassVar[str] = (
        "A Bézier curve or polyline whose control point is trained to have low loss all along it, between two "
        "fixed ends (arXiv:1802.10026). It may bend: models that it joins need not have a good average."
    )

    @property
    def title(self) -> str:
        return f"Curve from {self.a} to {self.b}"

    @property
    def worst(self) -> float:
        """The largest loss on the curve."""
        return max(self.losses)

    @property
    def headline(self) -> str:
        return (f"largest loss on the curve {self.worst:.4g}, on the chord {max(self.chord):.4g}; "
                f"{self.length:.3f} times as long")  # fmt: skip

    def plot(self) -> Any:
        made = figure(f"t: 0 is {self.a}, 1 is {self.b}", "loss")
        for name, values in (("curve", self.losses), ("chord", self.chord)):
            made.add_trace(graphs().Scatter(x=self.ts, y=values, name=name, mode="lines+markers"))
        return made


def coefficients(t: float, kind: Kind) -> tuple[float, float, float]:
    """Weights of θa, θ and θb at t."""
    if kind == "bezier":
        return (1 - t) ** 2, 2 * t * (1 - t), t**2
    return (max(0.0, 1 - 2 * t), 1 - abs(2 * t - 1), max(0.0, 2 * t - 1))


def connect(
    net: Network,
    a: Model,
    b: Model,
    *,
    kind: Kind = "bezier",
    steps: int = 300,
    rate: float = 3e-3,
    weight_decay: float = 0.0,
    points: int = 61,
    seed: int = 0,
    names: tuple[str, str] = ("a", "b"),
) -> Curve:
    """Train a curve with Adam and evaluate it at `points` values of t.

    θ starts at the midpoint; `weight_decay` is of φ(t), as in the paper. BatchNorm uses the batch while
    training and is measured anew at every t. The same seed gives the same curve. Evaluate on data that the curve
    was not trained on by calling `along` with another network.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"kind must be bezier or polyline, not {kind!r}{did_you_mean(kind, get_args(Kind))}")
    start, end = net.state(a), net.state(b)
    control = _trained(net, start, end, kind, steps, rate, weight_decay, seed)
    return along(net, start, control, end, kind=kind, points=points, names=names)


def along(
    net: Network, a: State, control: State, b: State, *, kind: Kind = "bezier", points: int = 61,
    names: tuple[str, str] = ("a", "b"),
) -> Curve:  # fmt: skip
    """Evaluate a curve with this control point."""
    ts = [i / (points - 1) for i in range(points)]

    def state(t: float) -> State:
        made = affine(coefficients(t, kind), [a, control, b])
        return made if t in (0.0, 1.0) else net.settled(made)

    found = [net.measure(state(t)) for t in ts]
    chord = [
        net.measure(between(a, b, t) if t in (0.0, 1.0) else net.settled(between(a, b, t))).loss for t in ts
    ]
    places = [coefficients(i / 200, kind) for i in range(201)]
    gram = gram_of_states([a, control, b], net.parameters)
    length = sum(_distance(p, q, gram) for p, q in pairwise(places))
    straight = _distance((1, 0, 0), (0, 0, 1), gram)
    return Curve(
        *names, kind, tuple(ts), tuple(m.loss for m in found), tuple(m.error for m in found), tuple(chord),
        length / straight if straight else 1.0, control,
    )  # fmt: skip


def _trained(
    net: Network, a: State, b: State, kind: Kind, steps: int, rate: float, decay: float, seed: int
) -> State:
    generator = torch.Generator().manual_seed(seed)
    middle = between(a, b, 0.5)
    learned = {n: middle[n].clone().requires_grad_(True) for n in net.parameters}
    optimizer = torch.optim.Adam(learned.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / max(steps, 1))
    module = net.place(middle).train(net.has_running_statistics)
    for _ in range(steps):
        t = float(torch.rand((), generator=generator))
        batch = net.batches[int(torch.randint(len(net.batches), (), generator=generator))]
        ca, c, cb = coefficients(t, kind)
        place = {n: ca * a[n] + c * p + cb * b[n] for n, p in learned.items()}
        # running statistics move while training; they are measured anew afterwards, so a copy takes them
        rest = {n: v.clone() for n, v in net.split(middle)[1].items()}
        with exact_attention():
            loss = net.loss_of(rest, batch, module)(place)
        if decay:
            loss = loss + 0.5 * decay * sum((p.square().sum() for p in place.values()), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return {**middle, **{n: p.detach() for n, p in learned.items()}}


def _distance(p: Sequence[float], q: Sequence[float], gram: Tensor) -> float:
    """‖Σ (pᵢ − qᵢ)θᵢ‖ from the Gram matrix of the states."""
    d = torch.tensor([x - y for x, y in zip(p, q, strict=True)], dtype=torch.float64)
    return float((d @ gram @ d).clamp(min=0).sqrt())
