"""`activations`: what the units of several networks do on the same data, side by side, in one pass.

    found = activations(opened([a, b], data), data)
    found.similarity("layer1", of="correlation")

For each place where a group can be watched the units of all models stand one after the other, and mean and scatter
of their joint activations are kept online in float64 (Chan et al.: batch by batch, no difference of large sums).
Units are watched where the network reads them, so after activation functions, else where they are written.
Attention in one module, which no hook sees into, is watched through its projections (statistics/observe.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.align.discovery import plain
from weft.align.networks import Net
from weft.align.pieces import Piece, apart, in_front
from weft.align.terms import Product, Term, groups_in, parsed, product, size_of
from weft.errors import DataError, Problems, UsageError
from weft.statistics.batches import Batch, Data, batches, outputs_of
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.uses import Parameters, Use

Watch: TypeAlias = Literal["read", "written"]
FEW = 16
"""Correlations of fewer samples say nothing."""


@dataclass(frozen=True)
class Site:
    """Where activations are watched: the input or output of a module, or of a linear map that uses a parameter."""

    name: str
    side: Literal["input", "output", "x", "y"]
    axis: int
    term: Term
    """What stands along that axis."""


@dataclass
class Joint:
    """Mean [N] and scatter [N, N] of the units of all models at one site, float64."""

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, x: Tensor) -> None:
        """More samples [n, N]."""
        n = len(x)
        if n == 0:
            return
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        if self.count == 0:
            self.count, self.mean, self.scatter = n, mean, scatter
            return
        total, step = self.count + n, mean - self.mean
        self.scatter += scatter + torch.outer(step, step) * (self.count * n / total)
        self.mean = self.mean + step * (n / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        return self.scatter / max(1, self.count - 1)

    @property
    def moment(self) -> Tensor:
        """E[a aᵀ], not centred."""
        return self.scatter / self.count + torch.outer(self.mean, self.mean)

    @property
    def correlation(self) -> Tensor:
        """Pearson's; 0 for units that never change (dead or constant ones)."""
        c = self.covariance
        deviation = c.diagonal().clamp_min(0).sqrt()
        # a unit that changes by rounding alone does not change
        alive = deviation > 1e-10 * (self.mean.abs() + deviation.max().clamp_min(1e-300))
        scale = torch.where(alive, deviation, 1.0).reciprocal() * alive
        return (c * scale[:, None] * scale).clamp(-1, 1)


Of: TypeAlias = Literal["moment", "covariance", "correlation"]


@dataclass
class Activations:
    """Joint activations of several networks, by site, and the sites of each group."""

    nets: Sequence[Net]
    joint: Mapping[Site, Joint]
    sites: Mapping[str, Sequence[Site]]

    def cross(self, group: str, i: int = 0, j: int = 1, of: Of = "correlation") -> Tensor | None:
        """How alike the units of a group are in models i and j, the mean over where they are seen: [n_i, n_j].

        For a group within others [outer_i, outer_j, …, n_i, n_j], for every pair of their units. None for a group
        whose units are only seen through those of groups within it.
        """
        found = [one for site in self.sites.get(group, ()) for one in self._at(site, group, i, j, of)]
        return sum(found[1:], found[0]) / len(found) if found else None

    def _at(self, site: Site, group: str, i: int, j: int, of: Of) -> Iterator[Tensor]:
        values: Tensor = getattr(self.joint[site], of)
        spec = self.nets[0].spec
        wanted = (*spec.groups[group].within, group)
        for a, b in zip(self._positions(site, i), self._positions(site, j), strict=True):
            if group in a.labels and not set(spec.inner(group)) & set(a.labels):
                yield paired(values, in_front(a, wanted), in_front(b, wanted))

    def _positions(self, site: Site, i: int) -> list[Piece]:
        """Where in the joint matrix the units of model i stand, in pieces."""
        lengths = [_length(site, net) for net in self.nets]
        there = torch.arange(lengths[i]) + sum(lengths[:i])
        return list(apart(there, (site.term,), self.nets[i].sizes))


def _length(site: Site, net: Net) -> int:
    return size_of(site.term, net.sizes) or 1


def paired(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The mean over f of values[a[…, f], b[…, f]]: a [o, …, n, f] and b [p, …, m, f] give [o, p, …, n, m]."""
    a = a.reshape(*(s for n in a.shape[:-1] for s in (n, 1)), a.shape[-1])
    b = b.reshape(*(s for n in b.shape[:-1] for s in (1, n)), b.shape[-1])
    first, *others = (values[a[..., f], b[..., f]] for f in range(a.shape[-1]))
    return sum(others, first) / (1 + len(others))


def activations(
    nets: Sequence[Net],
    data: Data | None,
    *,
    groups: Sequence[str] | None = None,
    watch: Watch = "read",
    samples: int | None = None,
) -> Activations:
    """Run all networks over `data` (batches; up to `samples` examples) and keep what their units do.

    `watch="written"` takes the values that linear maps give, before activation functions. Padding that an
    `attention_mask` marks is left out.

    Raises UsageError without data, Problems naming groups that can be watched nowhere, DataError for activations
    that are not finite (naming model and module) and for too few samples.
    """
    if data is None:
        raise UsageError(
            "matching by activations needs data: batches of inputs, some hundred examples in all"
        )
    if watch not in ("read", "written"):
        raise UsageError(f"watch must be read or written, not {watch!r}")
    spec = nets[0].spec
    wanted = [g for g in (spec.movable if groups is None else groups) if not spec.inner(g)]
    sites = {g: _sites(nets[0], g, watch) for g in wanted}
    blind = [f"{g}: {', '.join(n for n, _ in spec.uses(g)[:3])}" for g, found in sites.items() if not found]
    if blind:
        raise Problems("the activations of these groups can be read nowhere: match them by weights", blind)
    every = list(dict.fromkeys(s for found in sites.values() for s in found))
    joint = {s: Joint() for s in every}
    device = next((p.device for p in nets[0].module.parameters()), torch.device("cpu"))
    for batch in batches(data, device, samples):
        ran = [watched(net, every, batch) for net in nets]
        for site in every:
            rows = [r[site] for r in ran]
            if len({len(r) for r in rows}) > 1:
                raise DataError(
                    f"{site.name} sees {', '.join(str(len(r)) for r in rows)} positions in the networks: they must "
                    "be of one depth and resolution"
                )
            joint[site].add(torch.cat(rows, 1))
    count = min((j.count for j in joint.values()), default=FEW)
    if count < FEW:
        raise DataError(
            f"correlations of {count} samples say nothing: give data with at least {FEW}, better some hundreds"
        )
    for outer in spec.movable if groups is None else groups:
        if outer not in sites:
            sites[outer] = [s for s in every if outer in groups_in(s.term)]
    return Activations(nets, joint, sites)


def _sites(net: Net, group: str, watch: Watch) -> list[Site]:
    """Where a group is watched: the inputs of the maps that read it, or the outputs of those that write it."""
    spec, within = net.spec, net.spec.groups[group].within
    reading = {n for n, _ in net.reads}
    chosen = [
        (n, k) for n, k in spec.uses(group) if n in reading and ((n, k) in net.reads) == (watch == "read")
    ]
    by_module = {n.rpartition(".")[0] for n, _ in chosen}
    side: Literal["input", "output"] = "input" if watch == "read" else "output"
    seen = [n for n in spec.groups[group].nodes if n.side == side and n.module in by_module]
    if not seen:
        hidden = [(n, spec.axes[n][k]) for n, k in chosen if len(spec.axes[n]) == 2]
        found = [
            Site(n, "x" if watch == "read" else "y", -1, _folded(t))
            for n, t in hidden
            if t is not None and set(within) <= set(groups_in(t))
        ]
        if found:
            return found
        if watch == "read":
            return _sites(net, group, "written")
        seen = [n for n in spec.groups[group].nodes if n.side == "output"]
    return list(dict.fromkeys(Site(n.module, n.side, n.axis, _folded(parsed(n.term))) for n in seen))


def _folded(term: Term) -> Term:
    """Without a run of fixed length at its end, whose positions count as samples."""
    if isinstance(term, Product) and isinstance(term.factors[-1], int):
        return product(list(term.factors[:-1]))
    return term


def watched(net: Net, sites: Sequence[Site], batch: Batch) -> dict[Site, Tensor]:
    """What stands at each site in one run, [samples, units], float64. DataError where it is not finite."""
    found: dict[Site, list[Tensor]] = {s: [] for s in sites}
    parts: dict[Site, dict[int, Tensor]] = {s: {} for s in sites if s.side in ("x", "y")}
    modules = dict(net.module.named_modules())

    def hook(site: Site, m: nn.Module, args: Any, result: Any) -> None:
        values = pytree.tree_leaves(args if site.side == "input" else result)
        first = next(v for v in values if isinstance(v, Tensor))
        found[site].append(_rows(first, site, net, batch.masks))

    def seen(use: Use, x: Tensor, y: Tensor) -> None:
        for site, held in parts.items():
            if site.name == use.name and not use.table and not use.scale:
                held[use.first if site.side == "y" else 0] = y[0] if site.side == "y" else x[0]

    with ExitStack() as stack:
        for site in sites:
            if site not in parts:
                handle = modules[site.name].register_forward_hook(partial(hook, site))
                stack.callback(handle.remove)
        stack.enter_context(plain(net.module))
        stack.enter_context(torch.no_grad())
        if parts:
            stack.enter_context(slow_attention())
            stack.enter_context(Observer(Parameters(net.module), seen, batch.masks))
        outputs_of(net.module, batch, net.forward)
    for site, held in parts.items():  # queries, keys and values may be written one by one
        found[site] = [_rows(torch.cat([held[k] for k in sorted(held)], -1), site, net, ())] if held else []
    for site, values in found.items():
        if not values:
            raise DataError(f"{net.origin}: {site.name} was not called for these data")
        if not all(bool(v.isfinite().all()) for v in values):
            raise DataError(
                f"{net.origin}: what {site.name} {'takes' if site.side in ('input', 'x') else 'gives'} is NaN or "
                "infinite on these data, so nothing can be matched: look at the weights and the inputs"
            )
    return {s: torch.cat(values) for s, values in found.items()}


def _rows(values: Tensor, site: Site, net: Net, masks: Sequence[Tensor]) -> Tensor:
    """[samples, units]: the axis last, fixed runs among the samples, padding left out."""
    moved, length = values.movedim(site.axis, -1), _length(site, net)
    mask = next((m for m in masks if moved.shape[: m.dim()] == m.shape), None)
    moved = moved if mask is None else moved[mask]
    if moved.shape[-1] != length:
        moved = moved.reshape(*moved.shape[:-1], length, -1).movedim(-2, -1)
    return moved.reshape(-1, length).double()
