"""`widened`: a network with more units in some of its groups, which computes what it did (arXiv:1511.05641).

A new unit is a copy of an old one; whatever reads it reads each copy with a share of the old weight, so that

    Σ over copies j of i:  share_j · w_i · x_j = w_i · x_i

Which axes hold a group's units, and which of them read, is discovered by running the network (weft.align), so there
is no code by architecture: layers, convolutions, norms, gated MLPs, residual streams, heads, concatenations.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from weft.align.maps import Mix, mixed
from weft.align.networks import Net, opened
from weft.align.spec import PermutationSpec
from weft.align.terms import groups_in, size_of
from weft.api import Model
from weft.checkpoints.company import InCompany
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.statistics.placed import placed
from weft.transform.configs import grown_config
from weft.transform.reshaped import TOLERANCE, Reshaped, change_of, resized


def widened(
    model: Model,
    to: Mapping[str, int] | nn.Module,
    *,
    module: nn.Module | None = None,
    example_inputs: Any = None,
    spec: PermutationSpec | None = None,
    split: float = 0.0,
    seed: int = 0,
) -> Reshaped:
    """`model` with more units, computing the same.

    `to`: new sizes of groups by name or pattern ({"layer.*": 512}; `print(weft.align.discover(module, inputs))`
    lists them), or a network of the wanted widths, whose values do not matter. New unit n + i copies unit i, over
    and over: growing to a whole multiple copies every unit as often, which norms over units and residual streams
    need. Copies share what reads them equally; `split` > 0 makes the shares uneven, exp(split · normal) by `seed`,
    so that training can tell copies apart.

    The result is checked by running both in float64. Raises UsageError for sizes that do not grow and unknown
    groups, Problems for groups that cannot grow (units that are compared with one another, as queries with keys;
    tied weights), DataError where the network cannot be run, or where the function would change.
    """
    net, source = placed(model, module)
    view = opened([net], module=None, spec=spec, example_inputs=example_inputs)[0]
    sizes = _sizes_of(view, to) if isinstance(to, nn.Module) else _asked(view, to)
    _check(view, sizes)
    state = {n: t.detach() for n, t in net.state_dict().items()}
    groups = view.spec.groups
    inner = {n: m for n, m in sizes.items() if groups[n].within}
    for some in (inner, {n: m for n, m in sizes.items() if n not in inner}):  # what is within others first
        state = _grown(view, state, some, split, seed)
        view = Net(view.module, view.checkpoint, _with_sizes(view.spec, some), view.example)
    made = _network(net, to, state)
    change = change_of(net, made, view.example)
    if not change <= TOLERANCE:
        uneven = [f"{n} ({groups[n].size} to {m})" for n, m in sizes.items() if m % groups[n].size]
        hint = (
            f": a norm or a sum over units wants all of them copied as often, so grow to whole multiples: "
            f"{', '.join(uneven)}" if uneven else ": something in it counts or compares these units"
        )  # fmt: skip
        raise DataError(f"{type(net).__name__} would compute something else (by {change:.1e}){hint}")
    config = getattr(made, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else source.config  # type: ignore[union-attr]
    checkpoint = InCompany(StateDict(made, f"{source.origin}, widened"), told, source.assets)
    return Reshaped(made, checkpoint, change, {"sizes": sizes})


def _asked(view: Net, to: Mapping[str, int]) -> dict[str, int]:
    """Sizes by group, from patterns."""
    known = view.spec.movable
    lost = [p for p in to if not any(fnmatchcase(n, p) for n in known)]
    if lost or not to:
        there = ", ".join(f"{n} ({view.spec.groups[n].size})" for n in known) or "none"
        told = [f"{p!r}{did_you_mean(p, known)}" for p in lost] or ["no size is given"]
        raise Problems(f"no group of units is called so; there are {there}", told)
    return {n: m for p, m in to.items() for n in known if fnmatchcase(n, p)}


def _sizes_of(view: Net, wide: nn.Module) -> dict[str, int]:
    """The sizes that groups have in a network of the same tensors."""
    theirs = {n: tuple(t.shape) for n, t in wide.state_dict().items()}
    mine = {n: tuple(t.shape) for n, t in view.module.state_dict().items()}
    if set(mine) != set(theirs):
        odd = sorted(set(mine) ^ set(theirs))
        raise UsageError(
            f"to= is another network: {', '.join(odd[:3])} is not in both; only widths may differ"
        )
    sizes = {n: g.size for n, g in view.spec.groups.items()}
    axes = view.spec.axes
    for group, old in list(sizes.items()):
        uses = sorted(view.spec.uses(group), key=lambda u: len(list(groups_in(axes[u[0]][u[1]]))))
        fits = [
            m for name, k in uses if name in theirs for m in range(old, max(old, theirs[name][k]) + 1)
            if size_of(axes[name][k], {**sizes, group: m}) == theirs[name][k]
        ]  # fmt: skip
        sizes[group] = fits[0] if fits else old  # by the axis that says most of this group alone
    wrong = [
        f"{n}: {list(mine[n])} cannot grow to {list(theirs[n])}"
        for n, row in view.spec.axes.items()
        if n in theirs and any(
            (size_of(t, sizes) if t is not None else s) != there
            for t, s, there in zip(row, mine[n], theirs[n], strict=True)
        )
    ]  # fmt: skip
    if wrong:
        raise Problems("to= has sizes that more units do not explain", wrong)
    grown = {n: m for n, m in sizes.items() if m != view.spec.groups[n].size}
    if not grown:
        raise UsageError("to= has the same widths: there is nothing to grow")
    return grown


def _check(view: Net, sizes: Mapping[str, int]) -> None:
    groups = view.spec.groups
    small = [f"{n}: {groups[n].size} to {m}" for n, m in sizes.items() if m <= groups[n].size]
    if small:
        raise UsageError(f"sizes must grow, which these do not: {', '.join(small)}")
    problems = [
        f"{n}: nothing reads its units one by one; they are compared with others, as queries with keys"
        for n in sizes
        if not any(u in view.reads for u in view.spec.uses(n))
    ]
    problems += [
        f"{n}: one tied tensor writes and reads its units, so copies cannot share; untie it"
        for n in sizes if n in view.both
    ]  # fmt: skip
    if problems:
        raise Problems("these groups cannot grow", problems)


def _grown(
    view: Net, state: Mapping[str, Tensor], sizes: Mapping[str, int], split: float, seed: int
) -> dict[str, Tensor]:
    """Every tensor with the units of these groups copied and shared."""
    maps = {
        n: copies(view.spec.groups[n].size, m, view.spec.shape(n)[:-1], split, seed) for n, m in sizes.items()
    }
    made = {}
    for name, value in state.items():
        row = view.spec.axes.get(name)
        if row is None or not maps or not is_mergeable(value.dtype):
            made[name] = value
            continue
        reads = frozenset(k for n, k in view.reads if n == name)
        made[name] = mixed(value.cpu(), row, view.spec, maps, reads).to(value)
    return made


def copies(old: int, new: int, lead: tuple[int, ...] = (), split: float = 0.0, seed: int = 0) -> Mix:
    """Unit n + i of `new` is unit i mod `old`: into [new, old] copies, out [new, old] shares."""
    which = torch.arange(new) % old
    into = torch.nn.functional.one_hot(which, old).double()
    noise = torch.randn(new, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    raw = into * (split * noise).exp()[:, None]
    out = raw / raw.sum(0)
    return Mix(into.expand(*lead, new, old), out.expand(*lead, new, old))


def _with_sizes(spec: PermutationSpec, sizes: Mapping[str, int]) -> PermutationSpec:
    from dataclasses import replace

    groups = {n: replace(g, size=sizes.get(n, g.size)) for n, g in spec.groups.items()}
    return PermutationSpec(groups, spec.axes, spec.notes)


def _network(net: nn.Module, to: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """The network that holds the new tensors."""
    if isinstance(to, nn.Module):
        made, _ = placed(StateDict(state), to)
        return made
    if hasattr(net, "config"):
        grown = grown_config(net, {n: tuple(t.shape) for n, t in state.items()})
        if grown is not None:
            made, _ = placed(StateDict(state), grown)
            return made
    return resized(net, state)
