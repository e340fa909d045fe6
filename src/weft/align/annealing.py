"""Permutations by simulated annealing (arXiv:2110.06296): slow and plain, a check of what cleverer ways find.

A move lets two units of one group change places; the energy is the loss halfway between the networks; a move that
raises it by Δ is kept with probability exp(−Δ / T), and T falls exponentially.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from weft.align.apply import places, reorder
from weft.align.data import line
from weft.align.spec import Permutations, PermutationSpec
from weft.analysis.network import Network
from weft.errors import UsageError


def annealed(
    spec: PermutationSpec, a: Any, b: Any, net: Network, *, steps: int = 2000, hot: float | None = None,
    cold: float | None = None, start: Permutations | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """The permutations of `b` with the lowest midpoint loss that were met; never worse than `start`.

    The network is evaluated on all data of `net` in each of `steps`. Temperatures fall from `hot` to `cold`; by
    default from the mean change of ten moves to a thousandth of it.
    """
    if steps < 1:
        raise UsageError(f"steps must be at least 1, not {steps}")
    between = line(spec, a, b, net)
    at = spec.identity() if start is None else spec.complete(start)
    generator = torch.Generator().manual_seed(seed)
    state = between.middle(at)
    energy = net.measure(state).loss
    if not spec.movable:
        return at
    weights = torch.tensor([float(math.prod(spec.shape(n))) for n in spec.movable])
    touched = {n: _touched(spec, n, state) for n in spec.movable}

    def moved() -> tuple[str, dict[str, Tensor], float]:
        name = spec.movable[int(torch.multinomial(weights, 1, generator=generator))]
        flat = at[name].reshape(-1, at[name].shape[-1]).clone()
        row = int(torch.randint(len(flat), (1,), generator=generator))
        i, j = torch.randperm(flat.shape[1], generator=generator)[:2].tolist()
        flat[row, [i, j]] = flat[row, [j, i]]
        trial = at | {name: flat.reshape(at[name].shape)}
        changed = dict(state)
        for n in touched[name]:
            there = reorder(between.b[n], places(spec, spec.axes[n], between.b[n].shape, trial))
            changed[n] = between.a[n] + (there - between.a[n]) / 2
        changed = net.settled(changed)
        return name, trial, net.measure(changed).loss

    if hot is None:
        hot = max(sum(abs(moved()[2] - energy) for _ in range(10)) / 10, 1e-12)
    cold = hot / 1000 if cold is None else cold
    if not 0 < cold <= hot:
        raise UsageError(f"temperatures must fall: hot {hot} and cold {cold}")
    best = energy, dict(at)
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / max(1, steps - 1))
        name, trial, new = moved()
        if new <= energy or float(torch.rand(1, generator=generator)) < math.exp(
            (energy - new) / temperature
        ):
            at, energy = trial, new
            for n in touched[name]:
                there = reorder(between.b[n], places(spec, spec.axes[n], between.b[n].shape, at))
                state[n] = between.a[n] + (there - between.a[n]) / 2
            best = min(best, (energy, dict(at)), key=lambda found: found[0])
    return best[1]


def _touched(spec: PermutationSpec, group: str, state: dict[str, Tensor]) -> list[str]:
    """Tensors in which a group's units move, those within them included."""
    names = [n for g in (group, *spec.inner(group)) for n, _ in spec.uses(g)]
    return [n for n in dict.fromkeys(names) if n in state and state[n].is_floating_point()]
