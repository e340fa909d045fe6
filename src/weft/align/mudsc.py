"""`mudsc`: units matched by what they do and by their weights at once (Xu et al., arXiv:2403.01753).

    S = λ · S_weights + (1 − λ) · S_activations

S_activations is the correlation of activations and stays; S_weights is the correlation of everything that writes or
reads a unit, its neighbours in the order in which they are matched now. Groups are gone through again and again
until nothing changes; the best matching counts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.align.activations import Activations, Watch, activations
from weft.align.apply import places, reorder
from weft.align.correlate import Alignment, matched
from weft.align.networks import Net, comparable, opened
from weft.align.pieces import Piece, apart, in_front
from weft.align.plans import assigned
from weft.align.solving import at_pairs, total
from weft.align.spec import PermutationSpec
from weft.align.transport import pair_products
from weft.api import Model
from weft.errors import UsageError
from weft.statistics.batches import Data, Forward

IDLE = 5
"""Sweeps without progress after which the search ends."""


def mudsc(
    model: Model, to: Model, data: Data, *, weight: float = 0.5, sweeps: int = 100, seed: int = 0,
    module: nn.Module | None = None, spec: PermutationSpec | None = None, watch: Watch = "read",
    samples: int | None = None, forward: Forward | None = None,
) -> Alignment:  # fmt: skip
    """Permutes `model` by `weight` · similarity of weights + (1 − `weight`) · similarity of activations.

    0 is `neuron_alignment`. The paper chooses `weight` among .1 … .9 by the merged model's results in training.
    """
    if not 0 <= weight <= 1:
        raise UsageError(f"weight must lie between 0 and 1, not {weight}")
    if sweeps < 1:
        raise UsageError(f"sweeps must be at least 1, not {sweeps}")
    target, source = opened([to, model], data, module=module, spec=spec, forward=forward)
    comparable([target, source], same_size="MuDSC")
    found = activations([target, source], data, watch=watch, samples=samples)
    return Alignment(target, source, settled(found, weight, sweeps=sweeps, seed=seed))


def settled(
    found: Activations, weight: float, other: int = 1, *, sweeps: int = 100, seed: int = 0
) -> dict[str, Tensor]:
    """The permutations of the `other` network towards the first one, where both were watched."""
    target, source = found.nets[0], found.nets[other]
    known = matched(found, "correlation", 0, other)
    both = [
        {n: net.checkpoint.tensor(n).double() for n in net.checkpoint if n in net.spec.axes}
        for net in (target, source)
    ]

    def score(group: str) -> Tensor | None:
        acts = found.cross(group, 0, other)
        own = correlation_of_weights(target, both[0], both[1], group, known) if weight else None
        if own is None or acts is None:
            return acts if own is None else own
        return weight * own + (1 - weight) * acts

    best, highest, idle = dict(known), -float("inf"), 0
    generator = torch.Generator().manual_seed(seed)
    for _ in range(sweeps):
        groups = [
            target.spec.movable[i] for i in torch.randperm(len(target.spec.movable), generator=generator)
        ]
        before, values = dict(known), []
        for group in groups:
            scores = total(target.spec, group, score, known)
            if scores is not None:
                here = at_pairs(target.spec, group, scores, known)
                known[group] = assigned(here)
                values.append(float(here.gather(-1, known[group][..., None]).mean()))
        value = sum(values) / max(1, len(values))
        if value > highest + 1e-12:
            best, highest, idle = dict(known), value, 0
        else:
            idle += 1
        if idle >= IDLE or all(torch.equal(before[g], p) for g, p in known.items() if g in before):
            break
    return best


def correlation_of_weights(
    net: Net, a: dict[str, Tensor], b: dict[str, Tensor], group: str, known: dict[str, Tensor]
) -> Tensor | None:
    """Pearson's correlation over everything that belongs to a unit, for every pair of units; b in its known order.

    BatchNorm's running statistics count like other vectors. Where a group shows only through those within it: None.
    """
    spec, wanted = net.spec, (*net.spec.groups[group].within, group)
    held = {*wanted, *spec.inner(group)}
    order = {g: p for g, p in known.items() if g not in held and not set(spec.inner(g)) & held}
    sums: list[Tensor] | None = None
    for name in dict.fromkeys(n for n, _ in spec.uses(group) if n in a):
        row = spec.axes[name]
        moved = reorder(b[name], places(spec, row, b[name].shape, order))
        for p, q in zip(apart(a[name], row, net.sizes), apart(moved, row, net.sizes), strict=True):
            if (
                group in p.labels
                and not set(spec.inner(group)) & set(p.labels)
                and set(wanted) <= set(p.labels)
            ):
                here = _moments(p, q, wanted)
                sums = here if sums is None else [s + h for s, h in zip(sums, here, strict=True)]
    if sums is None:
        return None
    n, x, y, xx, yy, xy = sums
    left, right = (xx - x * x / n).clamp_min(0), (yy - y * y / n).clamp_min(0)
    return (xy - x * y / n) / (left * right).sqrt().clamp_min(1e-300)


def _moments(p: Piece, q: Piece, wanted: tuple[str, ...]) -> list[Tensor]:
    """n, Σx, Σy, Σx², Σy², Σxy for every pair of units."""
    x, y = in_front(p, wanted), in_front(q, wanted)
    one = torch.ones_like
    return [
        pair_products(one(x), one(y)), pair_products(x, one(y)), pair_products(one(x), y),
        pair_products(x * x, one(y)), pair_products(one(x), y * y), pair_products(x, y),
    ]  # fmt: skip
