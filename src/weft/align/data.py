"""The straight line between two networks in memory, for matchings that are learned from data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.align.apply import reordered
from weft.align.pair import Pair
from weft.align.spec import Permutations, PermutationSpec
from weft.analysis.network import Network, State
from weft.checkpoints.load import load


@dataclass(frozen=True)
class Line:
    """θ ↦ (1 − α) θA + α πθB."""

    spec: PermutationSpec
    a: State
    b: State
    counted: tuple[str, ...]
    """Tensors that distances are measured on: weights, no statistics, no integers."""
    net: Network | None

    def mixed(self, moved: State, alpha: float = 0.5) -> State:
        """The weights at α, BatchNorm's statistics measured anew where the network asks for it; gradients flow to
        `moved`, but for statistics."""
        made = {n: t + alpha * (moved[n] - t) if t.is_floating_point() else t for n, t in self.a.items()}
        made = {n: t if n in self.counted else t.detach() for n, t in made.items()}
        if self.net is None or not self.net.has_running_statistics:
            return made
        with torch.no_grad():
            settled = self.net.settled({n: t.detach() for n, t in made.items()})
        return {n: t if n in self.counted else settled[n] for n, t in made.items()}

    def middle(self, permutations: Permutations) -> State:
        """The weights halfway to b in this order."""
        return self.mixed(reordered(self.b, self.spec, permutations))

    def cost(self, permutations: Permutations, objective: str) -> float:
        """‖θA − πθB‖², or the loss of the midpoint on all the data."""
        if objective == "weights" or self.net is None:
            moved = reordered(self.b, self.spec, permutations)
            return float(sum((self.a[n] - moved[n]).double().pow(2).sum() for n in self.counted))
        return self.net.measure(self.middle(permutations)).loss

    def loss(self, state: State, step: int) -> Tensor:
        """The loss of one batch, differentiable in the state."""
        assert self.net is not None
        inputs, targets = self.net.batches[step % len(self.net.batches)]
        return self.net.loss(self.net.call(state, inputs), targets)


def line(spec: PermutationSpec, a: Any, b: Any, net: Network | None) -> Line:
    """Both networks in memory, checked against the specification, the module, and for finite values."""
    first, second = load(a), load(b)
    counted = tuple(Pair(spec, first, second).names)
    if net is not None:
        states = net.state(first), net.state(second)
    else:
        read = [{n: s.tensor(n) for n in s} for s in (first, second)]
        states = read[0], {n: read[1][second.aliases.get(n, n)] for n in read[0]}
    wide = [
        {n: t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for n, t in s.items()}
        for s in states
    ]
    return Line(spec, wide[0], wide[1], tuple(n for n in counted if n in wide[0]), net)
