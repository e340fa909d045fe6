"""`ot_fusion`: units of one network transported onto those of another, of whatever width (arXiv:1910.05653).

For every group in the order of the network: a cost between its units in the two models, of weights or activations;
the plan P of least cost, exact or entropic; each new unit the mean of the old ones that were moved onto it.
For transformers (Imfeld et al., arXiv:2310.05719) soft plans of standardised activations; one map holds all along a
residual stream, and heads are matched whole, since a mixture of heads is not attention.

Where the paper multiplies the next layer's inputs by the same averages, weft spreads what was read: with unequal
widths sums stay sums. For permutations both are the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from weft.align.activations import Watch, activations
from weft.align.apply import places, reorder
from weft.align.correlate import Alignment
from weft.align.maps import Mix, mixed
from weft.align.networks import Net, comparable, opened
from weft.align.pieces import Piece, apart, in_front
from weft.align.plans import assigned, entropic, exact
from weft.align.solving import Score, at_pairs, total
from weft.align.spec import PermutationSpec
from weft.api import Model
from weft.errors import Problems, UsageError
from weft.statistics.batches import Data, Forward

By = Literal["weights", "activations"]


def ot_fusion(
    model: Model, to: Model, data: Data | None = None, *, by: By = "weights", reg: float | None = None,
    normalise: bool = False, watch: Watch = "written", sweeps: int = 1,
    module: nn.Module | tuple[nn.Module, nn.Module] | None = None,
    spec: PermutationSpec | None = None, samples: int | None = None, forward: Forward | None = None,
    example_inputs: object = None,
) -> Alignment:  # fmt: skip
    """Transports `model` onto the units of `to`; `.merged()` is the mean of both, of the shape of `to`.

    `by="weights"` compares the weights that write a unit, those before it transported already; "activations" what
    units do on `data` (`watch`: before activation functions, as the paper, or where they are "read"; `normalise`
    centres and scales them). `reg` makes plans soft: Sinkhorn's, regularised by reg · the largest cost. `sweeps`
    repeats the matching by weights with everything else as it then stands. Queries and keys, and units along which
    a tied tensor is written and read, are not mixed as long as there are as many in both.

    `module` for models that are weights: the network of both, or a pair (of `to` and of `model`).
    """
    if by not in ("weights", "activations"):
        raise UsageError(f"by must be weights or activations, not {by!r}")
    if sweeps < 1:
        raise UsageError(f"sweeps must be at least 1, not {sweeps}")
    target, source = opened(
        [to, model], data, module=module, spec=spec, forward=forward, example_inputs=example_inputs
    )
    whole_groups(target, source)
    solver = _Transport(target, source, reg)
    if by == "activations":
        found = activations([target, source], data, watch=watch, samples=samples)

        def cost(group: str) -> Tensor | None:
            s = found.cross(group, 0, 1, "correlation" if normalise else "moment")
            if s is None or normalise:
                return s if s is None else -(2 - 2 * s).clamp_min(0).sqrt()
            own = [found.cross(group, i, i, "moment") for i in (0, 1)]
            a, b = (_norms(o, len(target.spec.groups[group].within)) for o in own if o is not None)
            return -_distance(a, b, s)

        solver.sweep(cost)
    else:
        for _ in range(sweeps):
            solver.sweep(solver.by_weights)
    return Alignment(target, source, solver.permutations, solver.transport)


def transformer_fusion(
    model: Model, to: Model, data: Data, *, reg: float | None = 0.08, module: nn.Module | None = None,
    spec: PermutationSpec | None = None, samples: int | None = None, forward: Forward | None = None,
) -> Alignment:  # fmt: skip
    """Optimal transport between transformers with the paper's defaults: soft, by standardised activations."""
    return ot_fusion(
        model, to, data, by="activations", reg=reg, normalise=True, module=module, spec=spec,
        samples=samples, forward=forward,
    )  # fmt: skip


class _Transport:
    """Plans found so far, and costs given them."""

    def __init__(self, target: Net, source: Net, reg: float | None) -> None:
        self.target, self.source, self.reg = target, source, reg
        self.permutations: dict[str, Tensor] = {}
        self.transport: dict[str, Mix] = {}
        self.states = [
            {n: net.checkpoint.tensor(n).double() for n in net.checkpoint if n in net.spec.axes}
            for net in (target, source)
        ]

    def sweep(self, score: Score) -> None:
        """Every group once, outer ones before those within them."""
        spec = self.target.spec
        lost = []
        for group in spec.movable:
            scores = total(spec, group, score, self.permutations)
            if scores is None:
                lost.append(f"{group}: {', '.join(n for n, _ in spec.uses(group)[:3])}")
                continue
            scores = at_pairs(spec, group, scores, self.permutations)
            if spec.inner(group):
                self.permutations[group] = assigned(scores)
            else:
                self.transport[group] = Mix.of_plan(self._plans(group, scores))
        if lost:
            raise Problems("nothing tells the units of these groups apart; match by activations", lost)

    def _plans(self, group: str, scores: Tensor) -> Tensor:
        cost = -scores
        square = cost.shape[-1] == cost.shape[-2]
        read = any(u in self.source.reads for u in self.source.spec.uses(group))
        soft = self.reg is not None and not (square and (group in self.source.both or not read))
        flat = cost.reshape(-1, *cost.shape[-2:])
        plans = [entropic(c, self.reg) if soft and self.reg is not None else exact(c) for c in flat]
        return torch.stack(plans).reshape(cost.shape)

    def by_weights(self, group: str) -> Tensor | None:
        """−‖Ŵ₀[i] − W₁[j]‖ over everything that writes a unit; what comes before it is transported already."""
        wanted = (*self.target.spec.groups[group].within, group)
        squares: Tensor | None = None
        for name in dict.fromkeys(n for n, _ in self.source.written(group)):
            for a, b in self._pieces(name, group):
                if _usable(a, group, self):
                    x, y = (in_front(p, wanted) for p in (a, b))
                    s = pair_products(x, y)
                    d = _distance((x * x).sum(-1), (y * y).sum(-1), s) ** 2
                    squares = d if squares is None else squares + d
        return None if squares is None else -squares.sqrt()

    def _pieces(self, name: str, group: str) -> list[tuple[Piece, Piece]]:
        held = {group, *self.source.spec.groups[group].within}
        if name not in self.states[0] or name not in self.states[1]:
            return []
        moved = self._moved(name, held)
        mine = apart(self.states[0][name], self.target.spec.axes[name], self.target.sizes)
        sizes = self.source.sizes | {g: self.target.sizes[g] for g in self.transport if g not in held}
        theirs = apart(moved, self.source.spec.axes[name], sizes)
        reads = {k for n, k in self.source.reads if n == name}
        return [
            (a, b)
            for a, b in zip(mine, theirs, strict=True)
            if group in a.labels and a.axes[a.labels.index(group)] not in reads
        ]

    def _moved(self, name: str, held: set[str]) -> Tensor:
        """A tensor of the source, transported along all groups that are solved but those that are held."""
        spec, values = self.source.spec, self.states[1][name]
        p = {g: v for g, v in self.permutations.items() if g not in held and not set(spec.inner(g)) & held}
        t = {g: v for g, v in self.transport.items() if g not in held}
        values = reorder(values, places(spec, spec.axes[name], values.shape, p))
        reads = frozenset(k for n, k in self.source.reads if n == name)
        return mixed(values, spec.axes[name], spec, t, reads)


def _usable(piece: Piece, group: str, solver: _Transport) -> bool:
    """Whether all else that stands along a piece is solved or stays where it is, and nothing within the group."""
    spec = solver.target.spec
    known = {*solver.permutations, *solver.transport, group, *spec.groups[group].within}
    others = [x for x in piece.labels if isinstance(x, str) and x in spec.movable and x not in known]
    return not others and not set(spec.inner(group)) & set(piece.labels)


def whole_groups(target: Net, source: Net) -> None:
    """Groups that hold others can only be permuted, so there must be as many in both."""
    comparable([target, source])
    problems = [
        f"{g}: {source.sizes[g]} in {source.origin}, {target.sizes[g]} in {target.origin}"
        for g in target.spec.movable
        if target.spec.inner(g) and source.sizes[g] != target.sizes[g]
    ]
    if problems:
        raise Problems("units that hold others (heads, experts) are matched whole: there must be as many in both",
                       problems)  # fmt: skip


def pair_products(x: Tensor, y: Tensor) -> Tensor:
    """Σ_f x[…, f] y[…, f] for every pair: x [o, …, n, f], y [p, …, m, f] → [o, p, …, n, m]."""
    k = x.dim() - 1
    flat = x.reshape(-1, x.shape[-1]) @ y.reshape(-1, y.shape[-1]).T
    both = flat.reshape(*x.shape[:-1], *y.shape[:-1])
    return both.permute(*(i for pair in zip(range(k), range(k, 2 * k), strict=True) for i in pair))


def _distance(a: Tensor, b: Tensor, products: Tensor) -> Tensor:
    """√(|a|² + |b|² − 2ab) for every pair, from squared norms a [o, …, n], b [p, …, m] and their products."""
    a = a.reshape(*(s for n in a.shape for s in (n, 1)))
    b = b.reshape(*(s for n in b.shape for s in (1, n)))
    return (a + b - 2 * products).clamp_min(0).sqrt()


def _norms(own: Tensor, outer: int) -> Tensor:
    """Diagonal of [o, o, …, n, n]: [o, …, n]."""
    for _ in range(outer + 1):
        own = own.diagonal(0, 0, 1)
    return own
