"""`zip_models`: units of several networks merged with those that do the same, in the same or in another network.

ZipIt! (Stoica et al., arXiv:2305.03053). The networks need no common start and no common labels. For every group
the units of all models stand side by side; the most correlated two are merged, again and again, until as many are
left as one model has. What writes a merged unit is the mean of what wrote its members; what reads it reads it for
all of them.

`private` tensors stay each model's own and read the shared units: a partial zip, a trunk with several heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor, nn

from weft.align.activations import Activations, Watch, activations
from weft.align.cca import mixing_groups
from weft.align.correlate import matched
from weft.align.maps import Mix, transported
from weft.align.mudsc import correlation_of_weights, settled
from weft.align.networks import Net, comparable, opened
from weft.align.solving import at_pairs
from weft.align.spec import PermutationSpec
from weft.align.terms import groups_in
from weft.align.transport import whole_groups
from weft.api import Model
from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Affine
from weft.errors import Problems, UsageError, did_you_mean
from weft.statistics.batches import Data, Forward

Likeness = Callable[[str, int, int], Tensor | None]
"""(group, i, j) → how alike the units of models i and j are, as they stand in the models."""


@dataclass(frozen=True)
class Zipped:
    """Several models in shared units: what each becomes, and which of its tensors stay its own."""

    nets: tuple[Net, ...]
    permutations: tuple[Mapping[str, Tensor], ...]
    maps: tuple[Mapping[str, Mix], ...]
    private: frozenset[str]

    @cached_property
    def parts(self) -> list[Checkpoint]:
        """Each model in the shared units; their mean is the merge."""
        return [
            transported(net, p, m) for net, p, m in zip(self.nets, self.permutations, self.maps, strict=True)
        ]

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """One checkpoint a model: the shared tensors, and those that are its own."""
        if not self.private:
            return [self._mean(self.parts)] * len(self.nets)
        shared = self._mean([_only(p, self.private, False) for p in self.parts])
        made: list[Checkpoint] = []
        for part in self.parts:
            spans = {n: Span(part if n in self.private else shared, n) for n in part}
            made.append(Assembled(spans, config=part.config, assets=part.assets, aliases=part.aliases,
                                  origin=f"{part.origin} zipped"))  # fmt: skip
        return made

    def merged(self) -> Checkpoint:
        """The one merged model. UsageError where tensors are private: take `checkpoints`, one a model."""
        if self.private:
            raise UsageError("some tensors are private to each model: take .checkpoints, one a model")
        return self.checkpoints[0]

    def _mean(self, parts: Sequence[Checkpoint]) -> Checkpoint:
        return Affine([(1 / len(parts), p) for p in parts])


def _only(source: Checkpoint, names: frozenset[str], inside: bool) -> Checkpoint:
    """The tensors that are among `names`, or those that are not."""
    kept = {n: Span(source, n) for n in source if (n in names) == inside}
    return Assembled(kept, config=source.config, assets=source.assets, origin=source.origin)


def zip_models(
    models: Sequence[Model], data: Data, *, private: str | Sequence[str] = (), repeat: float = 0.3,
    budget: float = 1.0, weight: float = 0.0, watch: Watch = "read", samples: int | None = None,
    module: nn.Module | Sequence[nn.Module] | None = None, spec: PermutationSpec | None = None,
    forward: Forward | None = None,
) -> Zipped:  # fmt: skip
    """Zips two or more models over `data` (of all their tasks, without labels); the first one's widths are kept.

    `private`: patterns of tensors that stay each model's own. `repeat`: what similarity to a unit that is merged
    already counts (0: nothing, 1: as ever). `budget`: the share of merges that may be within one model. `weight`:
    how much of the similarity is of weights, with neighbours in MuDSC's order (arXiv:2403.01753; models of one
    width): worth trying wherever the tasks share no labels. Heads, queries, keys, and units along tied tensors are
    permuted instead, by the same similarity.

    Raises Problems where shared and private tensors write into the same units (cut at another place), or where
    networks have other groups.
    """
    if len(models) < 2:
        raise UsageError("a zip takes at least two models")
    if not 0 <= repeat <= 1 or not 0 <= budget <= 1:
        raise UsageError(f"repeat and budget must lie between 0 and 1, not {repeat} and {budget}")
    if not 0 <= weight <= 1:
        raise UsageError(f"weight must lie between 0 and 1, not {weight}")
    nets = opened(models, data, module=module, spec=spec, forward=forward)
    for other in nets[1:]:
        whole_groups(nets[0], other)
    own = _private(nets[0], private)
    groups = _shared(nets[0], own)
    _fits(nets, own, groups)
    if weight:
        comparable(nets, same_size="MuDSC's zip")
    found = activations(nets, data, watch=watch, samples=samples, groups=groups)
    mixing = mixing_groups(nets[0]).intersection(*(mixing_groups(n) for n in nets[1:]))
    whole = tuple(g for g in groups if g not in mixing)
    orders: list[dict[str, Tensor]] = [{}]
    likeness: Likeness = lambda group, i, j: found.cross(group, i, j, "correlation")  # noqa: E731
    if weight:
        likeness, known = _with_weights(found, weight)
        orders += [{g: p for g, p in order.items() if g in whole} for order in known[1:]]
    else:
        orders += [matched(found, "correlation", 0, i, whole) for i in range(1, len(nets))]
    maps: list[dict[str, Mix]] = [{} for _ in nets]
    for group in groups:
        if group in mixing:
            for made, mix in zip(maps, _zip(nets, group, likeness, orders, repeat, budget), strict=True):
                made[group] = mix
    return Zipped(tuple(nets), tuple(orders), tuple(maps), own)


def _private(net: Net, patterns: str | Sequence[str]) -> frozenset[str]:
    names = list(net.checkpoint)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    lost = [p for p in wanted if not any(fnmatchcase(n, p) for n in names)]
    if lost:
        raise Problems("no tensor is called so", [f"{p!r}{did_you_mean(p, names)}" for p in lost])
    return frozenset(n for n in names if any(fnmatchcase(n, p) for p in wanted))


def _shared(net: Net, private: frozenset[str]) -> list[str]:
    """Groups whose units are written by shared tensors only."""
    shared, problems = [], []
    for group in net.spec.movable:
        writers = {n for n, _ in net.written(group) if n in net.checkpoint}
        if writers & private and writers - private:
            problems.append(
                f"{group}: {sorted(writers - private)[0]} is shared, {sorted(writers & private)[0]} private"
            )
        elif not writers & private:
            shared.append(group)
    if problems:
        raise Problems(
            "shared and private tensors write into the same units: cut where no unit passes by", problems
        )
    return shared


def _fits(nets: Sequence[Net], private: frozenset[str], groups: Sequence[str]) -> None:
    """Whatever is shared must be of one width where it is not zipped."""
    first, problems = nets[0], []
    for other in nets[1:]:
        for name in first.checkpoint:
            if name in private or name not in other.checkpoint:
                continue
            for k, term in enumerate(first.spec.axes.get(name, ())):
                a, b = first.checkpoint.info(name).shape[k], other.checkpoint.info(name).shape[k]
                if a != b and not set(groups_in(term)) & set(groups):
                    problems.append(f"{name} axis {k}: {a} in {first.origin}, {b} in {other.origin}")
    if problems:
        raise Problems("these shared tensors are of other lengths: make them private", problems)


def _with_weights(found: Activations, weight: float) -> tuple[Likeness, list[dict[str, Tensor]]]:
    """λ · correlation of weights + (1 − λ) · that of activations, and the order of each model's units behind it."""
    first = found.nets[0]
    known = [first.spec.identity()]
    known += [settled(found, weight, other=i) for i in range(1, len(found.nets))]
    values = [
        {n: net.checkpoint.tensor(n).double() for n in net.checkpoint if n in net.spec.axes}
        for net in found.nets
    ]

    def likeness(group: str, i: int, j: int) -> Tensor | None:
        spec = first.spec
        relative = spec.compose(spec.complete(known[j]), spec.inverse(spec.complete(known[i])))
        of_weights = correlation_of_weights(first, values[i], values[j], group, relative)
        of_activations = found.cross(group, i, j, "correlation")
        if of_weights is None or of_activations is None:
            return of_activations if of_weights is None else of_weights
        return weight * of_weights + (1 - weight) * of_activations

    return likeness, known


def _zip(
    nets: Sequence[Net], group: str, likeness: Likeness, orders: Sequence[Mapping[str, Tensor]],
    repeat: float, budget: float,
) -> list[Mix]:  # fmt: skip
    """The maps of one group, one a model; their `into` counts k-fold, since the merge is a mean over k models."""
    k, rows = len(nets), []
    for i in range(k):
        row = []
        for j in range(k):
            s = likeness(group, i, j)
            assert s is not None
            row.append(at_pairs(nets[0].spec, group, s, orders[j], orders[i]))
        rows.append(torch.cat(row, -1))
    joint = torch.cat(rows, -2)
    sizes = [net.sizes[group] for net in nets]
    owner = torch.repeat_interleave(torch.arange(k), torch.tensor(sizes))
    flat = joint.reshape(-1, *joint.shape[-2:])
    members = torch.stack([zipped(s, owner, sizes[0], repeat, budget) for s in flat])
    members = members.reshape(*joint.shape[:-2], *members.shape[-2:])
    into = k * members / members.sum(-1, keepdim=True)
    return [
        Mix(a.contiguous(), b.contiguous())
        for a, b in zip(torch.split(into, sizes, -1), torch.split(members, sizes, -1), strict=True)
    ]


def zipped(similarity: Tensor, owner: Tensor, n: int, repeat: float = 0.3, budget: float = 1.0) -> Tensor:
    """Which of N units make each of n: greedy merging of the most similar two; 0 or 1, [n, N] float64.

    `owner` [N] says of which model each unit is. A merged unit is as similar to another as the less similar of its
    members; times `repeat` once it has as many members as there are models.
    """
    s = similarity.double().clone().fill_diagonal_(-torch.inf)
    total, k = len(s), int(owner.max()) + 1
    members = torch.eye(total, dtype=torch.float64)
    of = torch.nn.functional.one_hot(owner, k).bool()  # [unit, model]: the models that it has members of
    left = torch.full((k,), budget * (total - n) / k if k > 1 else float(total))
    alive = torch.ones(total, dtype=torch.bool)
    allowed = _allowed(s, of, left)
    best, at = allowed.max(1)  # of each row, so that the largest of all need not be looked for anew each time
    while int(alive.sum()) > n:
        i = int(best.argmax())
        if float(best[i]) == -torch.inf:  # only units of models that have used up their share are left
            left.fill_(total)
            allowed = s.clone()
            best, at = allowed.max(1)
            continue
        i, j = sorted((i, int(at[i])))
        mine = of[i] | of[j]
        within, full = int(mine.sum()) == 1, bool((left[mine] < 1).any())
        if within:
            left[mine] -= 1
        members[i] += members[j]
        of[i] = mine
        alive[j] = False
        row = torch.minimum(s[i], s[j])
        row = torch.where(row > 0, row * repeat, row) if members[i].sum() >= k else row
        for m in (s, allowed):
            m[i], m[:, i] = row, row
            m[j], m[:, j] = -torch.inf, -torch.inf
            m[i, i] = -torch.inf
        stale = (at == i) | (at == j)
        if within and not full and bool((left[mine] < 1).any()):  # that was the last merge within this model
            allowed = _allowed(s, of, left)
            stale[:] = True
        elif within and full:
            allowed[i] = allowed[:, i] = _allowed(s, of, left)[i]
        stale[[i, j]] = True
        best[stale], at[stale] = allowed[stale].max(1)
        better = allowed[:, i] > best
        best[better], at[better] = allowed[better, i], i
    return members[alive]


def _allowed(s: Tensor, of: Tensor, left: Tensor) -> Tensor:
    """Similarities without the pairs within a model that has used up its share of merges."""
    spent = of[:, left < 1].any(1) & (of.sum(1) == 1)
    if of.shape[1] == 1 or not bool(spent.any()):
        return s.clone()
    same = (of.double() @ of.double().T > 0) & spent & spent[:, None]
    return s.masked_fill(same, -torch.inf)
