"""`PermutationSpec`: which axes of which tensors must be permuted together for a network to compute the same.

A group is a set of units that may change places: the channels of a layer, a residual stream, heads. Each axis of
each tensor says what stands along it:

    null              nothing that moves                    "c1"          the units of group c1
    "c5*49"           for each unit of c5 a run of 49       "h*d"         for each head its dimensions
    "h*qk|h*qk|h*v"   one after the other                   "h*(qk|qk|v)" for each head three parts

A group that is `within` others has a permutation of its own for each of their units: head dimensions within heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from weft.align.terms import Chain, Product, Term, groups_in, parsed, size_of, written
from weft.checkpoints.limits import shown
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataError, DataProblems, Problems, UsageError, did_you_mean

if TYPE_CHECKING:
    from weft.checkpoints.base import Checkpoint

Axis: TypeAlias = Term | None
Permutations: TypeAlias = Mapping[str, Tensor]
"""Group → int64 `[*sizes of the groups it is within, size]`: unit i of the result is unit π[i] of the source."""


@dataclass(frozen=True, slots=True)
class Node:
    """Where the activations of a group can be read: the input or output of a module, along one axis."""

    module: str
    side: Literal["input", "output"]
    axis: int
    term: str
    """What stands along that axis, as in `axes`."""


@dataclass(frozen=True, slots=True)
class Group:
    """Units that may change places."""

    size: int
    within: tuple[str, ...] = ()
    """Groups for each of whose units this group has a permutation of its own."""
    fixed: bool = False
    """The units stay where they are; the group is there for others to be within."""
    nodes: tuple[Node, ...] = ()
    """Where its activations can be read, in the order in which the network computes them."""


@dataclass(frozen=True)
class PermutationSpec:
    """Groups, and what stands along every axis of every tensor. See the module's docstring."""

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis, ...]]
    notes: tuple[str, ...] = field(default=(), compare=False)
    """What could not be followed and so stays where it is."""
    ties: Mapping[str, str] = field(default_factory=dict)
    """Tensors that the network has under several names: other name → first name."""

    def __post_init__(self) -> None:
        problems = [*_bad_groups(self.groups), *_bad_axes(self.groups, self.axes)]
        problems += [f"{n}: tied to {t!r}, which has other axes or none" for n, t in self.ties.items()
                     if self.axes.get(n, ()) != self.axes.get(t)]  # fmt: skip
        if problems:
            raise Problems("this permutation specification contradicts itself", problems)

    @classmethod
    def of(
        cls, groups: Mapping[str, int | Group], axes: Mapping[str, tuple[str | int | None, ...]]
    ) -> PermutationSpec:
        """A specification written by hand: sizes for groups, axes as text."""
        made = {n: Group(g) if isinstance(g, int) else g for n, g in groups.items()}
        terms = {n: tuple(None if e is None else parsed(str(e)) for e in row) for n, row in axes.items()}
        return cls(made, terms)

    # -- what is in it -----------------------------------------------------------------------------

    @cached_property
    def movable(self) -> tuple[str, ...]:
        """Groups with a choice, those that others are within before them."""
        return tuple(n for n, g in self.groups.items() if not g.fixed and g.size > 1)

    def shape(self, group: str) -> tuple[int, ...]:
        """Shape of a group's permutation."""
        g = self.group(group)
        return (*(self.groups[w].size for w in g.within), g.size)

    def group(self, name: str) -> Group:
        """One group; UsageError with the nearest name if there is none."""
        if name not in self.groups:
            raise UsageError(f"there is no group {name!r}{did_you_mean(name, self.groups)}")
        return self.groups[name]

    def inner(self, group: str) -> tuple[str, ...]:
        """The movable groups within one."""
        return tuple(n for n in self.movable if group in self.groups[n].within)

    def uses(self, group: str) -> list[tuple[str, int]]:
        """Every (tensor, axis) that a group stands along."""
        return list(self._uses.get(group, ()))

    @cached_property
    def _uses(self) -> dict[str, list[tuple[str, int]]]:
        found: dict[str, list[tuple[str, int]]] = {}
        for name, row in self.axes.items():
            for k, term in enumerate(row):
                for group in groups_in(term):
                    found.setdefault(group, []).append((name, k))
        return found

    @property
    def degrees(self) -> int:
        """How many units in all may change places."""
        return sum(prod(self.shape(n)) for n in self.movable)

    def __str__(self) -> str:
        lines = [f"{len(self.movable)} groups, {self.degrees:,} units that may change places"]
        for name in self.movable:
            g = self.groups[name]
            inside = f" within {', '.join(g.within)}" if g.within else ""
            lines.append(f"{name}: {g.size}{inside}")
            lines += [f"    {t} axis {k}: {written(self.axes[t][k])}" for t, k in self.uses(name)]
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    # -- permutations --------------------------------------------------------------------------------

    def identity(self) -> dict[str, Tensor]:
        """The permutations that move nothing."""
        return {n: torch.arange(self.groups[n].size).expand(self.shape(n)).clone() for n in self.movable}

    def random(self, seed: int = 0) -> dict[str, Tensor]:
        """One of all permutations, each equally likely; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        drawn = {n: torch.rand(self.shape(n), generator=generator, dtype=torch.float64) for n in self.movable}
        return {n: values.argsort(-1) for n, values in drawn.items()}

    def compose(self, first: Permutations, then: Permutations) -> dict[str, Tensor]:
        """The permutations that do what `first` does and after it what `then` does."""
        a, b = self.complete(first), self.complete(then)
        made = {}
        for name in self.movable:
            outer = self._moved(name, a[name], b)
            made[name] = outer.gather(-1, b[name])
        return made

    def inverse(self, permutations: Permutations) -> dict[str, Tensor]:
        """The permutations that undo these."""
        p = self.complete(permutations)
        back: dict[str, Tensor] = {}
        for name in self.movable:  # outer groups come first, so theirs are undone already
            back[name] = self._moved(name, p[name].argsort(-1), back)
        return back

    def _moved(self, name: str, values: Tensor, by: Mapping[str, Tensor]) -> Tensor:
        """Rows of a group's permutation, put where `by` puts the units of the groups that it is within."""
        within = self.groups[name].within
        if not within:
            return values
        return values[tuple(_grid(self, within, by))]

    def complete(self, permutations: Permutations) -> dict[str, Tensor]:
        """Permutations of every movable group, checked; those that are not given move nothing.

        Raises Problems naming every group that is unknown or fixed and every array that is no permutation.
        """
        problems = []
        for name, p in permutations.items():
            if name not in self.groups:
                problems.append(f"{name}: there is no such group{did_you_mean(name, self.groups)}")
            elif tuple(p.shape) != self.shape(name):
                problems.append(f"{name}: a permutation of shape {list(self.shape(name))} is needed, not "
                                f"{list(p.shape)}")  # fmt: skip
            elif not torch.equal(p.sort(-1).values, torch.arange(p.shape[-1]).expand(p.shape)):
                problems.append(f"{name}: not every unit is there exactly once")
            elif name not in self.movable and not torch.equal(p, torch.arange(p.shape[-1]).expand(p.shape)):
                problems.append(f"{name}: its units stay where they are")
        if problems:
            raise Problems("these permutations do not fit the specification", problems)
        return {n: permutations[n].long() if n in permutations else p for n, p in self.identity().items()}

    # -- models --------------------------------------------------------------------------------------

    def check(self, model: Checkpoint) -> None:
        """DataProblems naming every tensor that is missing, not in the specification, or of another shape."""
        held = {*model, *model.aliases}
        firsts = {self.ties.get(n, n) for n in held}
        problems = [
            f"{n}: not in {model.origin}"
            for n in self.axes if n not in held and self.ties.get(n, n) not in firsts
        ]  # fmt: skip
        problems += [f"{g}: a group that stands along no axis" for g in self.groups if g not in self._uses]
        for name, info in model.tensors.items():
            if name not in self.axes:
                problems.append(f"{name}: the specification says nothing of it")
                continue
            row = self.axes[name]
            wanted = [size_of(t, self._sizes) for t in row]
            fits = len(row) == len(info.shape) and all(
                w in (None, s) for w, s in zip(wanted, info.shape, strict=True)
            )
            if not fits:
                told = [written(t) or "·" for t in row]
                problems.append(f"{name}: shape {list(info.shape)} does not fit {told} of sizes {wanted}")
        problems += [
            f"{a}: tied to {t}, but its axes are others"
            for a, t in model.aliases.items()
            if a in self.axes and t in self.axes and self.axes[a] != self.axes[t]
        ]
        if problems:
            raise DataProblems(f"{model.origin} does not fit the permutation specification", problems)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {n: g.size for n, g in self.groups.items()}

    def apply(self, model: Any, permutations: Permutations) -> Checkpoint:
        """`model` (anything `weft.load` takes) with its units in another order: a lazy checkpoint."""
        from weft.align.apply import Permuted
        from weft.checkpoints.load import load

        return Permuted(load(model), self, permutations)

    # -- text ----------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data, which `from_json` reads."""
        groups = {
            n: {k: v for k, v in asdict(g).items() if v not in ((), False)} for n, g in self.groups.items()
        }
        axes = {n: [written(t) for t in row] for n, row in self.axes.items()}
        return {"groups": groups, "axes": axes, "ties": dict(self.ties), "notes": list(self.notes)}

    def text(self) -> str:
        """JSON, one group and one tensor a line, to be kept and edited."""
        data = self.to_json()
        blocks = []
        for part in ("groups", "axes"):
            rows = [f"    {json.dumps(n)}: {json.dumps(v)}" for n, v in data[part].items()]
            blocks.append(f'  "{part}": {{\n' + ",\n".join(rows) + "\n  }")
        blocks += [f'  "{part}": {json.dumps(data[part])}' for part in ("ties", "notes")]
        return "{\n" + ",\n".join(blocks) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write `text()` to a file."""
        Path(path).write_text(self.text(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PermutationSpec:
        """A specification from a file that `save` wrote and that may have been edited."""
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from None
        return cls.from_json(data, str(path))

    @classmethod
    def from_json(cls, data: Any, origin: str = "the specification") -> PermutationSpec:
        """A specification from plain data or JSON text. DataError where it is none, Problems where it
        contradicts itself."""
        if isinstance(data, str | bytes):
            raw = data.encode() if isinstance(data, str) else data
            data = parse_json(raw, origin, "spec-json", depth=16)
        try:
            groups = {str(n): _read_group(g) for n, g in data["groups"].items()}
            axes = {
                str(n): tuple(None if t is None else parsed(t) for t in row)
                for n, row in data["axes"].items()
            }
            ties = {str(n): str(t) for n, t in data.get("ties", {}).items()}
            return cls(groups, axes, tuple(map(str, data.get("notes", ()))), ties)
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{origin} is no permutation specification: {shown(str(error))}; it needs "
                            '"groups" and "axes" as spec.text() writes them') from None  # fmt: skip


def _read_group(data: Mapping[str, Any]) -> Group:
    nodes = tuple(
        Node(str(n["module"]), "input" if n["side"] == "input" else "output", int(n["axis"]), str(n["term"]))
        for n in data.get("nodes", ())
    )
    unknown = set(data) - {"size", "within", "fixed", "nodes"}
    if unknown or type(data["size"]) is not int:
        raise TypeError(f"a group with {sorted(unknown) or 'a size that is no whole number'}")
    return Group(data["size"], tuple(map(str, data.get("within", ()))), bool(data.get("fixed", False)), nodes)


def _bad_groups(groups: Mapping[str, Group]) -> Iterator[str]:
    seen: set[str] = set()
    for name, g in groups.items():
        if g.size < 1:
            yield f"{name}: size {g.size}"
        for outer in g.within:
            if outer not in groups:
                yield f"{name}: is within {outer!r}, which is no group"
            elif outer not in seen:
                yield f"{name}: stands before {outer!r}, which it is within"
            for further in groups[outer].within if outer in groups else ():
                if further not in g.within:
                    yield f"{name}: is within {outer!r} and so within {further!r} too, which must be listed"
        seen.add(name)


def _bad_axes(groups: Mapping[str, Group], axes: Mapping[str, tuple[Axis, ...]]) -> Iterator[str]:
    for name, row in axes.items():
        bound: set[str] = set()
        for term in row:
            for group in groups_in(term):
                if group not in groups:
                    yield f"{name}: {written(term)!r} names {group!r}, which is no group"
        if all(g in groups for term in row for g in groups_in(term)):
            for term in row:
                yield from (f"{name}: {told}" for told in _unbound(term, groups, bound))


def _unbound(term: Axis, groups: Mapping[str, Group], bound: set[str]) -> Iterator[str]:
    """Groups that stand where a group they are within is not known; adds what the term binds to `bound`."""
    if isinstance(term, Chain):
        known = set(bound)
        for part in term.parts:
            yield from _unbound(part, groups, set(known))
    elif isinstance(term, Product):
        for factor in term.factors:
            yield from _unbound(factor, groups, bound)
    elif isinstance(term, str):
        for outer in groups[term].within:
            if outer not in bound:
                yield f"{term} stands where no unit of {outer} is known, which it is within"
        bound.add(term)


def _grid(spec: PermutationSpec, within: tuple[str, ...], by: Mapping[str, Tensor]) -> list[Tensor]:
    """For every combination of units of `within`, where `by` takes each from: index tensors of one shape."""
    shape = [spec.groups[w].size for w in within]
    where = torch.meshgrid(*(torch.arange(s) for s in shape), indexing="ij")
    place = dict(zip(within, where, strict=True))
    found = []
    for w in within:
        if w not in by:
            found.append(place[w])
            continue
        outer = spec.groups[w].within
        index = tuple(place[o] for o in outer)
        found.append(by[w][(*index, place[w])] if outer else by[w][place[w]])
    return found
