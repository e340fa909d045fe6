"""Layer-wise linear connectivity: the barrier when only some layers are interpolated (Adilova et al., ICLR 2024).

For a set S of layers let θ^{S,α} have (1−α)θa + αθb in S and θa (and again θb) elsewhere. S is one layer, all
layers up to one ("shallow"), or all from one on ("deep"). The barrier of S is that of this line, between the model
and the model with S taken from the other one: 0 for a layer that both share, the barrier of the whole
models for all layers. For comparison the difference within S is replaced by a random vector of the same norm,
tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch

from weft.analysis.barrier import excess
from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.groups import group_of, in_order
from weft.analysis.network import Network, State
from weft.analysis.space import affine, normal
from weft.api import Model
from weft.errors import UsageError, did_you_mean

Sets = Literal["single", "shallow", "deep"]


@dataclass(frozen=True)
class LayerwiseBarrier(Finding):
    """For every layer ℓ the barrier of the set that ℓ stands for."""

    a: str
    b: str
    sets: str
    layers: tuple[str, ...]
    from_a: tuple[float, ...]
    """Barriers where the rest of the network is a's: the end of the line is a with S taken from b."""
    from_b: tuple[float, ...]
    random: tuple[float, ...]
    """The loss of a, moved within S in a random direction as far as α = ½ goes, less that of a."""
    midpoint: tuple[float, ...]
    """The same for the midpoint towards b."""

    about: ClassVar[str] = (
        "Only a set S of layers is interpolated and the rest stays one model's. The bars are the largest rise "
        "of the loss above the line from it to itself with S from the other model (Adilova et al., ICLR 2024)."
    )

    @property
    def title(self) -> str:
        return f"Layer-wise barrier between {self.a} and {self.b} ({self.sets})"

    @property
    def headline(self) -> str:
        worst = max(range(len(self.layers)), key=lambda i: max(self.from_a[i], self.from_b[i]))
        value = max(self.from_a[worst], self.from_b[worst])
        if value <= 0:
            return "no layer has a barrier"
        return f"the largest barrier is at {self.layers[worst]}: {value:.4g}"

    def plot(self) -> Any:
        made = figure("", "rise of the loss", barmode="group")
        for name, values in (
            (f"the rest from {self.a}", self.from_a), (f"the rest from {self.b}", self.from_b),
            (f"midpoint less {self.a}", self.midpoint), ("random step of that length", self.random),
        ):  # fmt: skip
            made.add_trace(graphs().Bar(x=self.layers, y=values, name=name))
        made.update_xaxes(type="category")
        return made


def layerwise_barrier(
    net: Network,
    a: Model,
    b: Model,
    *,
    sets: Sets = "single",
    points: int = 11,
    group: Callable[[str], str] = group_of,
    seed: int = 0,
    names: tuple[str, str] = ("a", "b"),
) -> LayerwiseBarrier:
    """The barrier of every layer set; `group` maps a tensor's name to its layer, in the order of the data's flow.

    Buffers (running statistics) go with their layer. Raises UsageError for an unknown `sets`.
    """
    if sets not in get_args(Sets):
        raise UsageError(
            f"sets must be {', '.join(get_args(Sets))}, not {sets!r}{did_you_mean(sets, get_args(Sets))}"
        )
    start, end = net.state(a), net.state(b)
    layers = list(dict.fromkeys(group(n) for n in in_order(start)))
    own = net.measure(start).loss
    alphas = [i / (points - 1) for i in range(points)]
    from_a, from_b, steps, middles = list[float](), list[float](), list[float](), list[float]()
    for i in range(len(layers)):
        chosen = {"single": layers[i : i + 1], "shallow": layers[: i + 1], "deep": layers[i:]}[sets]
        inside = {n for n in start if group(n) in chosen}
        lines = [[_loss(net, start, end, inside, alpha, rest) for alpha in alphas] for rest in (start, end)]
        lines[1].reverse()  # from b on
        for line, found in zip(lines, (from_a, from_b), strict=True):
            found.append(max(0.0, *excess(alphas, line, (line[0], line[-1]))))
        middles.append(_loss(net, start, end, inside, 0.5, start) - own)
        steps.append(_measured(net, _random_step(net, start, end, inside, seed), start) - own)
    return LayerwiseBarrier(
        *names, sets, tuple(layers), tuple(from_a), tuple(from_b), tuple(steps), tuple(middles)
    )


def _loss(net: Network, a: State, b: State, inside: set[str], alpha: float, rest: State) -> float:
    mixed = affine([1 - alpha, alpha], [{n: s[n] for n in rest if n in inside} for s in (a, b)])
    return _measured(net, {**rest, **mixed}, rest)


def _measured(net: Network, state: State, rest: State) -> float:
    """The loss; statistics are measured anew only where something has moved."""
    moved = any(not torch.equal(t, rest[n]) for n, t in state.items())
    return net.measure(net.settled(state) if moved else state).loss


def _random_step(net: Network, a: State, b: State, inside: set[str], seed: int) -> State:
    """a, moved within S as far as the midpoint is, tensor by tensor, in a random direction."""
    names = [n for n in net.parameters if n in inside]
    made = dict(a)
    for name, noise in normal(a, names, seed).items():
        length = (b[name].double() - a[name].double()).norm() / 2
        made[name] = (a[name].double() + noise.double() * (length / noise.double().norm())).to(a[name].dtype)
    return made
