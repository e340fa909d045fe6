"""From what a trace learned of axes to a `PermutationSpec`: sets of units, and what each is within."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from weft.align.dims import Dim, Dims, alike, factors, find
from weft.align.spec import Axis, Group, Node, PermutationSpec
from weft.align.terms import Chain, Term, chain, groups_in, product, written
from weft.align.trace import Row, Trace

At = Mapping[Dim, int]
"""The part of each chain that is spoken of."""


def lowered(trace: Trace, state: Mapping[str, Row], ties: Mapping[str, str]) -> PermutationSpec:
    """The specification for tensors whose axes are `state`; `ties`: other names of one tensor."""
    return replace(_Lowering(trace, state).spec(), ties=dict(ties))


class _Lowering:
    def __init__(self, trace: Trace, state: Mapping[str, Row]) -> None:
        self.trace, self.state = trace, state
        self._settle(trace.dims)
        self.within = self._within()
        self.names = self._names()

    def _settle(self, dims: Dims) -> None:
        """Tie what cannot be written down apart, fix what was never seen in use, until nothing changes."""
        used: set[Dim] = set()
        changed = True
        while changed:
            changed = False
            for row in self.state.values():
                for d in row:
                    for family in _loose(d, frozenset()):
                        dims.collapse(family)
                        changed = True
            used = {leaf for row in self.trace.used for d in row for leaf in leaves(d)}
            for name, row in self.state.items():
                for k, d in enumerate(row):
                    for leaf in leaves(d):
                        if leaf not in used and not leaf.reason and leaf.size > 1:
                            dims.fix(leaf, "never seen in use")
                            self.trace.notes[f"{name} axis {k}: in part never seen in use, so left alone"] = (
                                None
                            )

    def _within(self) -> dict[Dim, list[Dim]]:
        """For each leaf the leaves beside it in every tensor that it stands in: it may vary with those."""
        ours = [leaf for row in self.state.values() for d in row for leaf in leaves(d) if leaf.size > 1]
        found: dict[Dim, set[Dim] | None] = dict.fromkeys(ours)
        rows = [(row, True) for row in self.state.values()] + [(row, False) for row in self.trace.rows]
        done: set[tuple[bool, tuple[int, ...]]] = set()
        for row, ordered in rows:
            key = (ordered, tuple(id(find(d)) for d in row))
            if key in done:
                continue
            done.add(key)
            for leaf, beside in _beside(row, ordered):
                if leaf in found:
                    before = found[leaf]
                    found[leaf] = set(beside) if before is None else before & beside
        place = {leaf: i for i, leaf in enumerate(found)}
        return {
            leaf: sorted((b for b in beside or () if b in place and b is not leaf), key=lambda b: place[b])
            for leaf, beside in found.items()
        }

    def _names(self) -> dict[Dim, str]:
        """Names of movable leaves and of those that they are within: the first parameter that they stand in."""
        wanted = {d for d in self.within if not d.reason}
        wanted |= {o for d in wanted for o in self.within[d]}
        names: dict[Dim, str] = {}
        taken: set[str] = set()
        for tensor, row in self.state.items():
            for d in row:
                for leaf in leaves(d):
                    if leaf not in wanted or leaf in names:
                        continue
                    stem = tensor.removesuffix(".weight").removesuffix(".bias")
                    stem = f"layer.{stem}" if stem.isdigit() else stem
                    n = 1
                    while (made := stem if n == 1 else f"{stem}/{n}") in taken:
                        n += 1
                    names[leaf] = made
                    taken.add(made)
        return names

    def spec(self) -> PermutationSpec:
        axes: dict[str, tuple[Axis, ...]] = {
            name: tuple(self.term(d, {}) for d in row) for name, row in self.state.items()
        }
        nodes = self._nodes()
        groups: dict[str, Group] = {}

        def add(leaf: Dim) -> None:
            name = self.names[leaf]
            if name in groups:
                return
            within = [] if leaf.reason else self.within[leaf]
            for outer in within:
                add(outer)
            groups[name] = Group(
                leaf.size, tuple(self.names[o] for o in within), bool(leaf.reason), tuple(nodes.get(name, ()))
            )

        for leaf in self.names:
            add(leaf)
        return PermutationSpec(groups, axes, tuple(self.trace.notes))

    def _nodes(self) -> dict[str, list[Node]]:
        found: dict[str, dict[Node, None]] = {}
        for seen in self.trace.seen:
            for k, d in enumerate(seen.row):
                if all(leaf.reason or leaf not in self.names for leaf in leaves(d)) or list(
                    _loose(d, frozenset())
                ):
                    continue
                term = self.term(d, {})
                here = set(groups_in(term))
                side = "input" if seen.side == "input" else "output"
                made = Node(seen.module, side, k, str(written(term)))  # type: ignore[arg-type]
                for leaf in set(leaves(d)):
                    name = self.names.get(leaf)
                    if name in here and {self.names[o] for o in self.within.get(leaf, ())} <= here:
                        found.setdefault(str(name), {})[made] = None
        return {name: list(nodes) for name, nodes in found.items()}

    def term(self, d: Dim, at: At) -> Term:
        d = find(d)
        if d.family is not None:
            over, members = find(d.family[0]), d.family[1]
            if over in at:
                return self.term(members[at[over]], at)
            return self.term(members[0], at)
        if d.factors is not None:
            return self._product(factors(d), at)
        if d.parts is not None:
            return chain([self.term(p, {**at, d: j}) for j, p in enumerate(d.parts)])
        return self.names.get(d, d.size)

    def _product(self, parts: Sequence[Dim], at: At) -> Term:
        first, rest = find(parts[0]), parts[1:]
        if not rest:
            return self.term(first, at)
        if first.parts is not None and any(_depends(r, first) for r in rest):
            pieces = [self._product([p, *rest], {**at, first: j}) for j, p in enumerate(first.parts)]
            return chain(pieces) if all(isinstance(p, Term) for p in pieces) else Chain(tuple(pieces))
        return product([self.term(first, at), self._product(rest, at)])


def leaves(d: Dim) -> Iterator[Dim]:
    """Every leaf that a dim is made of."""
    d = find(d)
    if d.leaf:
        yield d
    for child in d.children():
        yield from leaves(child)


def _depends(d: Dim, over: Dim) -> bool:
    d = find(d)
    if d.family is not None and find(d.family[0]) is over and _differs(d):
        return True
    return any(_depends(c, over) for c in d.children())


def _differs(family: Dim) -> bool:
    assert family.family is not None
    first, *others = family.family[1]
    return not all(alike(first, other) for other in others)


def _loose(d: Dim, known: frozenset[Dim]) -> Iterator[Dim]:
    """Families that vary with a chain that does not stand before them along the same axis."""
    d = find(d)
    if d.family is not None:
        over = find(d.family[0])
        if _differs(d) and over not in known:
            yield d
            return
        for j, member in enumerate(d.family[1]):
            part = find(over.parts[j]) if over.parts is not None else over
            yield from _loose(member, known | {part} if part.parts is not None else known)
    elif d.factors is not None:
        for f in factors(d):
            yield from _loose(f, known)
            if find(f).parts is not None:
                known = known | {find(f)}
    elif d.parts is not None:
        for part in d.parts:
            yield from _loose(part, known | {d})


def _certain(d: Dim) -> frozenset[Dim]:
    """The leaves that a position along a dim always has a unit of."""
    d = find(d)
    more = _certain(d.of) if d.of is not None and find(d.of) is not d else frozenset()
    if d.leaf:
        return more | {d}
    if d.factors is not None:
        return more.union(*map(_certain, d.factors))
    if d.family is not None and not _differs(d):
        return more | _certain(d.family[1][0])
    return more


def _beside(row: Row, ordered: bool) -> Iterator[tuple[Dim, frozenset[Dim]]]:
    """Each leaf of a tensor with the leaves that stand beside it; before it only, if `ordered`."""
    known = [_certain(d) for d in row]
    for k, d in enumerate(row):
        others = known[:k] if ordered else known[:k] + known[k + 1 :]
        yield from _in(d, frozenset().union(*others), ordered)


def _in(d: Dim, beside: frozenset[Dim], ordered: bool) -> Iterator[tuple[Dim, frozenset[Dim]]]:
    d = find(d)
    if d.leaf:
        yield d, beside
    elif d.factors is not None:
        parts = factors(d)
        known = [_certain(p) for p in parts]
        for i, p in enumerate(parts):
            others = known[:i] if ordered else known[:i] + known[i + 1 :]
            yield from _in(p, beside.union(*others), ordered)
    elif d.parts is not None:
        for p in d.parts:
            yield from _in(p, beside, ordered)
    elif d.family is not None:
        over = find(d.family[0])
        for j, member in enumerate(d.family[1]):
            more = _certain(over.parts[j]) if over.parts is not None else frozenset()
            yield from _in(member, beside | more, ordered)
