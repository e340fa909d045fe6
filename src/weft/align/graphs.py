"""`graph_matching`: networks of many clients matched as graphs, all consistently (GAMF, Liu et al., ICML 2022).

Units are vertices, weights are edges. Matching i to a in one layer and j to b in the next is worth

    K = exp(−(w_ij − w'_ab)² / σ)

and the sum over all pairs of networks is sought, by graduated assignment: every network has a map to one universe
of units, soft at first (Sinkhorn), harder and harder, at last a permutation. So matchings agree around every cycle.

The kernel is a sum of products, Σ_f φ_f(w) φ_f(w'), by its Fourier series over the range of the weights. So no
table of all pairs of edges is ever made: networks are compared with the sum of the others' φ in the universe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from weft.align.apply import Permuted, places, reorder
from weft.align.maps import Mix, mixed
from weft.align.networks import Net, comparable, opened
from weft.align.pieces import apart, in_front
from weft.align.plans import assigned, entropic
from weft.align.solving import at_pairs, total
from weft.align.spec import PermutationSpec
from weft.align.terms import groups_in
from weft.align.transport import pair_products
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.lazy import Affine
from weft.errors import DataError, UsageError

State = dict[str, Tensor]
"""φ of every tensor, [features, *shape]."""


@dataclass(frozen=True)
class Matched:
    """Several networks and the permutation of each to one universe of units."""

    nets: tuple[Net, ...]
    permutations: tuple[dict[str, Tensor], ...]
    agreement: float
    """Mean of K over all edges and pairs of networks, at most 1."""

    @cached_property
    def aligned(self) -> list[Checkpoint]:
        """Every network in the universe's order of units."""
        return [Permuted(n.checkpoint, n.spec, p) for n, p in zip(self.nets, self.permutations, strict=True)]

    def merged(self, weights: Sequence[float] | None = None) -> Checkpoint:
        """Their mean, or with `weights` (examples of each client) their weighted mean."""
        given = [1.0] * len(self.nets) if weights is None else [float(w) for w in weights]
        if len(given) != len(self.nets) or not sum(given) > 0:
            raise UsageError(f"give {len(self.nets)} weights with a sum above 0")
        return Affine([(w / sum(given), c) for w, c in zip(given, self.aligned, strict=True)])

    def between(self, i: int, j: int) -> dict[str, Tensor]:
        """The permutations that bring network j into the order of network i."""
        spec = self.nets[0].spec
        return spec.compose(self.permutations[j], spec.inverse(self.permutations[i]))


def graph_matching(
    models: Sequence[Model], *, sigma: float = 4.0, temperatures: Sequence[float] = (0.3, 0.1, 0.03),
    sweeps: int = 3, module: nn.Module | None = None, spec: PermutationSpec | None = None,
    example_inputs: Any = None,
) -> Matched:  # fmt: skip
    """Matches two or more networks of equal widths by their weights alone.

    `sigma`: width of the kernel, in mean squares of each tensor. `temperatures`: of Sinkhorn, one after the other
    (shares of the largest score); after them permutations, until nothing changes. `sweeps`: of each temperature.
    The first network's order is where the search starts from.
    """
    if len(models) < 2:
        raise UsageError("graph matching takes at least two networks")
    if not sigma > 0 or sweeps < 1 or not all(t > 0 for t in temperatures):
        raise UsageError("sigma, sweeps and temperatures must be above 0")
    nets = opened(models, module=module, spec=spec, example_inputs=example_inputs)
    comparable(nets, same_size="graph matching")
    phi = _features(nets, sigma)
    if not phi[0]:
        raise UsageError(f"{nets[0].origin} has no units that may change places")
    best: _Search | None = None
    for schedule in dict.fromkeys(
        (tuple(temperatures), ())
    ):  # annealing is no promise: the better one counts
        search = _Search(nets, phi)
        for temperature in schedule:
            for _ in range(sweeps):
                search.sweep(temperature)
        for _ in range(100):
            if not search.sweep(None):
                break
        best = search if best is None or search.agreement > best.agreement else best
    assert best is not None
    return Matched(tuple(nets), tuple(best.permutations), best.agreement)


class _Search:
    """Every network's place in the universe: permutations, and soft maps while there are any."""

    def __init__(self, nets: Sequence[Net], phi: list[State]) -> None:
        self.nets, self.spec, self.phi = nets, nets[0].spec, phi
        self.rows = {n: (None, *self.spec.axes[n]) for n in phi[0]}
        self.permutations = [self.spec.identity() for _ in nets]
        self.soft: list[dict[str, Mix]] = [{} for _ in nets]
        self.placed = [dict(state) for state in phi]
        for p in range(1, len(nets)):  # the others start from a matching to the first
            self._solve(p, None, self.placed[0])

    def sums(self) -> State:
        """Σ over networks of φ in the universe."""
        return {n: torch.stack([state[n] for state in self.placed]).sum(0) for n in self.rows}

    @property
    def agreement(self) -> float:
        """Mean of K over all edges and pairs."""
        k, value, edges = len(self.nets), 0.0, 0
        for name, every in self.sums().items():
            own = sum(float(state[name].square().sum()) for state in self.placed)
            value += (float(every.square().sum()) - own) / (k * (k - 1))
            edges += every[0].numel()
        return value / edges

    def sweep(self, temperature: float | None) -> bool:
        """Every network against all others. Whether a permutation changed."""
        changed = False
        for p, here in enumerate(self.placed):
            others = {n: every - here[n] for n, every in self.sums().items()}
            changed |= self._solve(p, temperature, others)
        return changed

    def _solve(self, p: int, temperature: float | None, others: State) -> bool:
        """The best maps of network p to where the others stand, group by group."""
        changed = bool(self.soft[p]) and temperature is None
        mine = self.permutations[p]
        for group in self.spec.movable:
            scores = total(self.spec, group, lambda g: self._score(p, g, others), mine)
            if scores is None:
                continue
            here = at_pairs(self.spec, group, scores, mine)
            found = assigned(here)
            changed |= not torch.equal(found, mine[group])
            mine[group] = found
            self.soft[p].pop(group, None)
            if temperature is not None and not self.spec.inner(group):
                flat = here.reshape(-1, *here.shape[-2:])
                plans = torch.stack([entropic(s.max() - s, temperature, steps=200) for s in flat])
                weights = (plans * plans.shape[-1]).reshape(here.shape)
                self.soft[p][group] = Mix(weights, weights)
        self.placed[p] = {n: self._placed(p, n, frozenset()) for n in self.rows}
        return changed

    def _placed(self, p: int, name: str, held: frozenset[str]) -> Tensor:
        """φ of a tensor of network p in the universe, but for the groups that are held."""
        soft = {g: m for g, m in self.soft[p].items() if g not in held}
        hard = {g: v for g, v in self.permutations[p].items() if g not in held and g not in soft}
        phi, row = self.phi[p][name], self.rows[name]
        moved = reorder(phi, places(self.spec, row, phi.shape, hard))
        return mixed(moved, row, self.spec, soft, frozenset())

    def _score(self, p: int, group: str, others: State) -> Tensor | None:
        """What each pairing of a unit of the universe with one of network p is worth."""
        wanted, inner = (*self.spec.groups[group].within, group), set(self.spec.inner(group))
        found: Tensor | None = None
        for name in dict.fromkeys(n for n, _ in self.spec.uses(group) if n in self.rows):
            here = self._placed(p, name, frozenset({*wanted, *inner}))
            pairs = (apart(t, self.rows[name], self.nets[0].sizes) for t in (others[name], here))
            for a, b in zip(*pairs, strict=True):
                if set(wanted) <= set(a.labels) and not inner & set(a.labels):
                    s = pair_products(in_front(a, wanted), in_front(b, wanted))
                    found = s if found is None else found + s
        return found


def _features(nets: Sequence[Net], sigma: float) -> list[State]:
    """φ of every floating tensor with units, of a width of `sigma` mean squares of its values."""
    made: list[State] = [{} for _ in nets]
    movable = set(nets[0].spec.movable)
    for name, info in nets[0].checkpoint.tensors.items():
        row = nets[0].spec.axes[name]
        if not is_mergeable(info.dtype) or movable.isdisjoint(g for t in row for g in groups_in(t)):
            continue
        values = [net.checkpoint.tensor(name).double() for net in nets]
        for net, v in zip(nets, values, strict=True):
            if not bool(v.isfinite().all()):
                raise DataError(f"{name} of {net.origin} is NaN or infinite, so its units cannot be matched")
        square = sum(float(v.square().mean()) for v in values) / len(values)
        reach = max(float(v.max()) for v in values) - min(float(v.min()) for v in values)
        for state, v in zip(made, values, strict=True):
            state[name] = kernel_features(v, sigma * square if square > 0 else 1.0, reach)
    return made


def kernel_features(x: Tensor, width: float, reach: float) -> Tensor:
    """φ [f, *shape] with Σ_f φ_f(x) φ_f(y) = exp(−(x − y)²/width) for |x − y| ≤ reach, to 1e-6.

    A Fourier series of period P: far enough beyond `reach` that its copies do not meet.
    """
    period = reach + math.sqrt(width * 14)
    peak = math.sqrt(math.pi * width) / period
    last = 1 + int(period / math.pi * math.sqrt(max(0.0, math.log(2e7 * peak)) / width))
    m = torch.arange(1, last + 1, dtype=torch.float64).reshape(-1, *[1] * x.dim())
    share = (2 * peak * (-((math.pi * m / period) ** 2) * width).exp()).sqrt()
    angle = x * (2 * math.pi / period) * m
    return torch.cat([torch.full_like(x, math.sqrt(peak))[None], angle.cos() * share, angle.sin() * share])
