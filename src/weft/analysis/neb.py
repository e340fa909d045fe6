"""AutoNEB: a path of low loss between two models by the nudged elastic band (Draxler et al., arXiv:1803.00885).

Pivots between the fixed ends move by gradient steps from which the part along the path is taken out,

    F_i = −(∇L − ⟨∇L, τ̂ᵢ⟩ τ̂ᵢ),      τ̂ᵢ towards the neighbour of higher loss,

and after each step they are put at equal distances along the path (a spring of any strength). After each round
the segments are looked at in between, and a pivot is put where the loss rises above the line between its pivots
by more than `tolerance` of the path's range. The highest point is an upper bound of the saddle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import KEPT, Finding, figure, graphs
from weft.analysis.network import Network, State
from weft.analysis.space import affine, at, flat
from weft.api import Model
from weft.errors import DataError, UsageError

INSIDE = 9
"""Points looked at within a segment."""


@dataclass(frozen=True)
class Path(Finding):
    """The relaxed path, looked at finely."""

    a: str
    b: str
    positions: tuple[float, ...]
    """Arc length from a, as a share of the path's."""
    losses: tuple[float, ...]
    chord: tuple[float, ...]
    """Losses on the straight line at the same shares."""
    pivots: int
    length: float
    """Of the path, over that of the chord."""
    states: tuple[State, ...] = field(repr=False, compare=False, metadata=KEPT)

    about: ClassVar[str] = (
        "A chain of models between two fixed ends, relaxed across its direction and kept evenly spaced; pivots "
        "are added where the loss rises between them (arXiv:1803.00885). Its top bounds the saddle from above."
    )

    @property
    def title(self) -> str:
        return f"Minimum-energy path from {self.a} to {self.b}"

    @property
    def saddle(self) -> float:
        """The largest loss on the path."""
        return max(self.losses)

    @property
    def headline(self) -> str:
        return (f"saddle at {self.saddle:.4g} with {self.pivots} pivots, {self.length:.3f} times as long as the "
                f"chord, whose top is {max(self.chord):.4g}")  # fmt: skip

    def plot(self) -> Any:
        made = figure("share of the path", "loss")
        for name, values in (("path", self.losses), ("chord", self.chord)):
            made.add_trace(graphs().Scatter(x=self.positions, y=values, name=name, mode="lines+markers"))
        return made


def elastic_path(
    net: Network,
    a: Model,
    b: Model,
    *,
    pivots: int = 5,
    rounds: int = 4,
    steps: int = 40,
    rate: float = 0.1,
    rates: Callable[[int], float] | None = None,
    tolerance: float = 0.2,
    via: Sequence[Model] = (),
    names: tuple[str, str] = ("a", "b"),
) -> Path:
    """Relax a path in `rounds` of `steps` full-batch steps.

    `rate` falls tenfold over the rounds unless `rates(round)` says otherwise. `via` are models that the first path
    goes through. Raises UsageError for less than one pivot, DataError for a rate at which the path diverges.
    """
    if pivots < 1 or rounds < 1:
        raise UsageError(f"a path needs at least one pivot and one round, not {pivots} and {rounds}")
    like = net.state(a)
    corners = [flat(like, net.parameters), *(flat(net.state(m), net.parameters) for m in (*via, b))]
    end = net.state(b)
    chain = _spread(corners, pivots + 2)

    def state(x: Tensor) -> State:
        # buffers in proportion to the distance from the ends; measured anew where that is asked for
        near, far = float((x - corners[0]).norm()), float((x - corners[-1]).norm())
        share = near / (near + far) if near + far else 0.0
        return net.settled(at(x, affine([1 - share, share], [like, end]), net.parameters))

    def loss(x: Tensor) -> float:
        return net.measure(state(x)).loss

    for r in range(rounds):
        step = rates(r) if rates is not None else rate * 0.1 ** (r / max(rounds - 1, 1))
        for _ in range(steps):
            chain = _spread(_nudged(net, chain, state, step), len(chain))
        if r + 1 < rounds:
            chain = _inserted(chain, loss, tolerance)
    fine = [p + (q - p) * i / (INSIDE + 1) for p, q in pairwise(chain) for i in range(INSIDE + 1)] + [
        chain[-1]
    ]
    places = _positions(fine)
    straight = [corners[0] + (corners[-1] - corners[0]) * s for s in places]
    whole, chord = _positions(chain, share=False)[-1], float((corners[-1] - corners[0]).norm())
    return Path(
        *names, tuple(places), tuple(map(loss, fine)), tuple(map(loss, straight)), len(chain) - 2,
        whole / chord if chord else 1.0, tuple(state(x) for x in chain),
    )  # fmt: skip


def _nudged(net: Network, chain: list[Tensor], state: Callable[[Tensor], State], rate: float) -> list[Tensor]:
    """One step of every inner pivot across the path."""
    found = [net.loss_and_gradient(state(x)) for x in chain]
    moved = [chain[0]]
    for i in range(1, len(chain) - 1):
        up = i + 1 if found[i + 1][0] > found[i - 1][0] else i - 1
        tangent = (chain[up] - chain[i]) * (1 if up > i else -1)
        tangent = tangent / tangent.norm().clamp(min=1e-300)
        gradient = flat(found[i][1], net.parameters)
        moved.append(chain[i] - rate * (gradient - (gradient @ tangent) * tangent))
        if not bool(moved[-1].isfinite().all()):
            raise DataError(f"the path left the finite weights at a step of {rate:g}: give a lower rate")
    return [*moved, chain[-1]]


def _positions(chain: Sequence[Tensor], share: bool = True) -> list[float]:
    """Arc length at every point, as a share of the whole or as it is."""
    lengths = [0.0]
    for p, q in pairwise(chain):
        lengths.append(lengths[-1] + float((q - p).norm()))
    whole = lengths[-1] if share and lengths[-1] else 1.0
    return [v / whole for v in lengths]


def _spread(chain: Sequence[Tensor], count: int) -> list[Tensor]:
    """`count` points at equal distances along the polyline, its ends among them."""
    places = _positions(chain)
    made = [chain[0]]
    for i in range(1, count - 1):
        wanted = i / (count - 1)
        j = next(j for j in range(1, len(places)) if places[j] >= wanted)
        span = places[j] - places[j - 1]
        made.append(torch.lerp(chain[j - 1], chain[j], (wanted - places[j - 1]) / span if span else 0.0))
    return [*made, chain[-1]]


def _inserted(chain: list[Tensor], loss: Callable[[Tensor], float], tolerance: float) -> list[Tensor]:
    """The chain with a pivot more in every segment whose inside rises above the line between its ends."""
    ends = [loss(x) for x in chain]
    allowed = tolerance * (max(ends) - min(ends))
    made = [chain[0]]
    for (p, lp), (q, lq) in pairwise(zip(chain, ends, strict=True)):
        rises = []
        for i in range(1, INSIDE + 1):
            s = i / (INSIDE + 1)
            x = torch.lerp(p, q, s)
            rises.append((loss(x) - ((1 - s) * lp + s * lq), i))
        rise, i = max(rises)
        if rise > allowed:
            made.append(torch.lerp(p, q, i / (INSIDE + 1)))
        made.append(q)
    return made
