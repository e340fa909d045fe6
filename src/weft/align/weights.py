"""Weight matching: units put in the order in which the weights of two models agree most; no data.

    maximise  Σ_T ⟨A_T, (πB)_T⟩      which is  ‖θA − πθB‖² = const − 2 Σ_T ⟨A_T, (πB)_T⟩ at its least

by coordinate ascent (arXiv:2209.04836): one group at a time, all others held, is a linear assignment problem.
Groups within others (head dimensions within heads) are matched with them: the score of head i of one model and
head j of the other is what the best matching of what is within them reaches, found in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from weft.align.apply import Places, places, reorder
from weft.align.assign import assigned
from weft.align.pair import STATISTICS, Pair
from weft.align.spec import Group, Permutations, PermutationSpec
from weft.align.units import Units, units_along, without
from weft.errors import UsageError

SLACK = 1e-7
"""A gain smaller than this share of ‖A‖‖B‖ is rounding."""
Progress = Callable[[int, str, float], None]
"""`progress(sweep, group, gain)` after each group."""


def weight_matching(
    spec: PermutationSpec, a: Any, b: Any, *, seed: int = 0, tries: int = 1, sweeps: int = 100,
    start: Permutations | None = None, memory: int | str | None = None,
    ignore: Sequence[str] = STATISTICS, progress: Progress | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Permutations π of `b` with Σ ⟨A, πB⟩ at a maximum that no single group can raise.

    `a`, `b`: anything `weft.load` takes. Groups are visited until a whole sweep raises nothing or `sweeps` are
    done, those in the most tensors (a residual stream) first, equal ones in an order drawn from `seed`. Further
    `tries` draw the whole order, and the one that ends highest counts. It begins with `start`, or with b as it is.
    Tensors are read one after the other, so that two models larger than `memory` (a quarter of RAM by default) can
    be matched; `ignore`: patterns of tensors that do not count.

    Raises DataProblems where no permutation relates the models, DataError for weights that are not finite.
    """
    from weft.checkpoints.load import load

    if tries < 1 or sweeps < 1:
        raise UsageError(f"tries and sweeps must be at least 1, not {tries} and {sweeps}")
    pair = Pair(spec, load(a), load(b), memory=memory, ignore=ignore)
    ascent = Ascent(spec, pair)
    best: tuple[float, dict[str, Tensor]] | None = None
    for attempt in range(tries):
        found = spec.identity() if start is None else spec.complete(start)
        drawn = torch.Generator().manual_seed(seed + attempt)
        ascent.climb(found, drawn, sweeps, progress, widest_first=attempt == 0)
        reached = ascent.value(found) if tries > 1 else 0.0
        if best is None or reached > best[0]:
            best = reached, found
    assert best is not None
    return best[1]


def agreement(
    spec: PermutationSpec, a: Any, b: Any, permutations: Permutations | None = None, *,
    memory: int | str | None = None, ignore: Sequence[str] = STATISTICS,
) -> float:  # fmt: skip
    """Σ_T ⟨A_T, (πB)_T⟩ / ‖θA‖‖θB‖: the cosine of the weights, 1 for two models that are equal."""
    from weft.checkpoints.load import load

    pair = Pair(spec, load(a), load(b), memory=memory, ignore=ignore)
    ascent = Ascent(spec, pair)
    here = ascent.value(spec.identity() if permutations is None else spec.complete(permutations))
    return here / max(ascent.scale(pair.names), 1e-300)


class Tensors(Protocol):
    """Two models' tensors by name."""

    @property
    def names(self) -> Sequence[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def both(self, name: str) -> tuple[Tensor, Tensor]: ...
    def blocks(
        self, name: str, where: Places, axis: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]: ...


@dataclass
class Slices:
    """What belongs to one unit of each of two models, in memory."""

    tensors: dict[str, tuple[Tensor, Tensor]]

    @property
    def names(self) -> list[str]:
        return list(self.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.tensors[name][0].shape)

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[name]

    def blocks(self, name: str, where: Places, axis: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        a, b = self.tensors[name]
        yield a, reorder(b, where)


@dataclass(frozen=True)
class View:
    """A tensor from the units of one group: b's other units are moved already, its own are not."""

    name: str
    where: Places
    units: Units


@dataclass
class Ascent:
    """Coordinate ascent on Σ ⟨A, πB⟩."""

    spec: PermutationSpec
    tensors: Tensors
    _units: dict[tuple[str, str, int], Units] = field(default_factory=dict)
    _inner: dict[str, PermutationSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        movable = set(self.spec.movable)
        self.sizes = {n: g.size for n, g in self.spec.groups.items()}
        self.roots = [
            n for n, g in self.spec.groups.items() if not g.within and (n in movable or self.spec.inner(n))
        ]
        counted = set(self.tensors.names)
        self.uses: dict[str, dict[str, list[int]]] = {}
        for group in self.spec.groups:
            found: dict[str, list[int]] = {}
            for name, axis in self.spec.uses(group):
                if name in counted:
                    found.setdefault(name, []).append(axis)
            self.uses[group] = found

    def climb(
        self, at: dict[str, Tensor], generator: torch.Generator | None = None, sweeps: int = 100,
        progress: Progress | None = None, widest_first: bool = False,
    ) -> None:  # fmt: skip
        """Raise the objective in place until no group can. Without a generator, in the groups' order.

        `widest_first`: no group comes after one in fewer tensors. What most others are scored by is settled before
        they are, so they are visited less often.
        """
        settled: set[str] = set()  # nothing that they are scored by has moved since
        for sweep in range(sweeps):
            order = list(range(len(self.roots)))
            if generator is not None:
                order = torch.randperm(len(self.roots), generator=generator).tolist()
            if widest_first:
                order.sort(key=lambda i: -len(self.uses[self.roots[i]]))
            for root in (self.roots[i] for i in order):
                if root in settled:
                    continue
                gain = self.improve(root, at)
                settled.add(root)
                if gain > 0:
                    settled -= self.beside[root]
                if progress is not None:
                    progress(sweep, root, gain)
            if len(settled) == len(self.roots):
                return

    @cached_property
    def beside(self) -> dict[str, set[str]]:
        """For each root the roots in whose tensors it stands; itself, if it meets itself in one."""
        return {
            root: {r for r in self.roots if r != root and set(self.uses[r]) & set(self.uses[root])}
            | ({root} if any(len(axes) > 1 for axes in self.uses[root].values()) else set())
            for root in self.roots
        }

    def improve(self, root: str, at: dict[str, Tensor]) -> float:
        """The best permutation of one group and those within it, all others held; the gain, 0 if it is kept."""
        if not self.uses[root]:
            return 0.0
        inner = self.spec.inner(root)
        before = {n: at[n] for n in (root, *inner) if n in at}
        if inner:
            new, gain, scale = self._nested(root, inner, at)
        else:
            score, scale = self._score(root, at)
            rows = torch.arange(len(score))
            new = {root: assigned(score)}
            gain = float((score[rows, new[root]] - score[rows, at[root]]).sum())
        if gain <= SLACK * scale:
            return 0.0
        names = list(self.uses[root])
        crossed = any(len(axes) > 1 for axes in self.uses[root].values())
        known = self.value(at, names) if crossed else 0.0
        at.update(new)
        if crossed:  # the group meets itself, so that the score was only its slope
            gain = self.value(at, names) - known
            if gain <= SLACK * scale:
                at.update(before)
                return 0.0
        return gain

    # -- one group -----------------------------------------------------------------------------------

    def _views(self, root: str, at: Mapping[str, Tensor]) -> Iterator[View]:
        own = {root, *self.spec.inner(root)}
        others = {n: p for n, p in at.items() if n not in own}
        for name, axes in self.uses[root].items():
            row, shape = self.spec.axes[name], self.tensors.shape(name)
            free = places(self.spec, row, shape, others)
            moved = places(self.spec, row, shape, at) if len(axes) > 1 else free
            for axis in axes:
                where = tuple(free[k] if k == axis else moved[k] for k in range(len(row)))
                key = (root, name, axis)
                if key not in self._units:
                    self._units[key] = units_along(axis, row[axis], root, self.sizes)
                yield View(name, where, self._units[key])

    def _score(self, root: str, at: Mapping[str, Tensor]) -> tuple[Tensor, float]:
        """score[i, j] = Σ ⟨unit i of A, unit j of πB⟩, float64; and Σ ‖A‖‖B‖."""
        n, scale = self.sizes[root], 0.0
        score = torch.zeros(n, n, dtype=torch.float64)
        for view in self._views(root, at):
            for a, b in self.tensors.blocks(view.name, view.where, view.units.axis):
                x, y = view.units.of(a).reshape(n, -1), view.units.of(b).reshape(n, -1)
                score += x @ y.T  # widened on the way
                scale += float(x.norm()) * float(y.norm())
        return score, scale

    def _nested(
        self, root: str, inner: tuple[str, ...], at: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], float, float]:
        """Units by an assignment over the best matchings of what is within each pair of them."""
        n = self.sizes[root]
        left: dict[str, Tensor] = {}
        right: dict[str, Tensor] = {}
        scale = 0.0
        for view in self._views(root, at):
            a, b = self.tensors.both(view.name)
            key = f"{view.name} {view.units.axis}"
            left[key], right[key] = view.units.of(a), view.units.of(reorder(b, view.where))
            scale += float(a.norm()) * float(b.norm())
        spec = self._within(root, inner)
        fixed = root not in at

        ascent = Ascent(spec, Slices({k: (left[k][0], right[k][0]) for k in left}))

        def pair(i: int, j: int) -> Ascent:
            ascent.tensors = Slices({k: (left[k][i], right[k][j]) for k in left})
            return ascent

        score = torch.zeros(n, n, dtype=torch.float64)
        found: dict[tuple[int, int], dict[str, Tensor]] = {}
        for i in range(n):
            for j in [i] if fixed else range(n):
                best = spec.identity()
                pair(i, j).climb(best)
                score[i, j] = ascent.value(best)
                found[i, j] = best
        order = torch.arange(n) if fixed else assigned(score)
        new = {} if fixed else {root: order}
        known = 0.0
        rows: dict[str, list[Tensor]] = {d: [] for d in inner}
        for i in range(n):
            now = i if fixed else int(at[root][i])
            held = {d: at[d].select(self.spec.groups[d].within.index(root), i) for d in inner}
            known += pair(i, now).value(held)
            for d in inner:
                rows[d].append(found[i, int(order[i])][d])
        for d in inner:
            new[d] = torch.stack(rows[d], self.spec.groups[d].within.index(root))
        return new, float(score[torch.arange(n), order].sum()) - known, scale

    def _within(self, root: str, inner: tuple[str, ...]) -> PermutationSpec:
        """The specification of what belongs to one unit of `root`."""
        if root in self._inner:
            return self._inner[root]
        outer = {w for d in inner for w in self.spec.groups[d].within} - {root}
        groups = {
            n: replace(g, within=tuple(w for w in g.within if w != root), nodes=()) if n in inner
            else Group(g.size, tuple(w for w in g.within if w in outer), fixed=True)
            for n, g in self.spec.groups.items() if n in inner or n in outer
        }  # fmt: skip
        axes = {}
        for name, uses in self.uses[root].items():
            row, shape = self.spec.axes[name], self.tensors.shape(name)
            for axis in uses:
                units = self._units[root, name, axis]
                kept = frozenset(groups)
                # where the root stands along several axes, only one of them is seen as it could be
                beside = kept if len(uses) == 1 else frozenset[str]()
                axes[f"{name} {axis}"] = tuple(
                    without(units.rest, kept, self.sizes) if k == axis
                    else shape[k] if term is None else without(term, beside, self.sizes)
                    for k, term in enumerate(row)
                )  # fmt: skip
        made = self._inner[root] = PermutationSpec(groups, axes)
        return made

    # -- the objective -------------------------------------------------------------------------------

    def value(self, at: Mapping[str, Tensor], names: Sequence[str] | None = None) -> float:
        """Σ ⟨A, πB⟩."""
        total = 0.0
        for name in self.tensors.names if names is None else names:
            where = places(self.spec, self.spec.axes[name], self.tensors.shape(name), at)
            for a, b in self.tensors.blocks(name, where):
                total += float((a * b).sum(dtype=torch.float64))
        return total

    def scale(self, names: Sequence[str]) -> float:
        """‖θA‖ ‖θB‖ over some tensors."""
        squares = torch.zeros(2, dtype=torch.float64)
        for name in names:
            for a, b in self.tensors.blocks(name, (None,) * len(self.tensors.shape(name))):
                squares += torch.stack([t.double().pow(2).sum() for t in (a, b)])
        return float(squares.prod().sqrt())
