"""What the axes of tensors are made of, unknown at first and learned by unification.

A `Dim` is an unknown, or it has been found to be a product of others (heads × dimensions), a chain of others (q,
k, v one after the other), or a family: another dim for each part of a chain that stands along another axis.
Tying two dims together makes both have what either was found to have. What cannot be brought together is
fixed: its units stay where they are. So the worst that an unforeseen network can do is to have less symmetry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod

Key = tuple[int, ...]


class Dim:
    """A set of `size` positions along an axis. Compared by identity, after `find`."""

    __slots__ = ("factors", "family", "key", "link", "of", "of_weights", "parts", "reason", "size")

    def __init__(self, size: int, key: Key, of_weights: bool = False, reason: str = "") -> None:
        self.size, self.key, self.of_weights, self.reason = size, key, of_weights, reason
        self.link: Dim | None = None
        self.factors: list[Dim] | None = None
        self.parts: list[Dim] | None = None
        self.family: tuple[Dim, list[Dim]] | None = None
        """The chain that it varies with, and what it is for each part of that."""
        self.of: Dim | None = None
        """The dim whose units stand along it, picked by an index (experts, by token)."""

    @property
    def leaf(self) -> bool:
        return self.factors is None and self.parts is None and self.family is None

    def children(self) -> list[Dim]:
        """What it is made of."""
        return self.factors or self.parts or (self.family[1] if self.family else [])


Same = Callable[[Dim], Dim]


def find(d: Dim) -> Dim:
    """The dim that this one has become."""
    while d.link is not None:
        d = d.link
    return d


class Dims:
    """Makes dims and ties them together."""

    def __init__(self) -> None:
        self._count = 0

    def new(self, size: int, *, of_weights: bool = False, reason: str = "") -> Dim:
        """An unknown; fixed for `reason`, where there is one."""
        self._count += 1
        return Dim(size, (self._count,), of_weights, reason)

    def product(self, factors: Sequence[Dim]) -> Dim:
        """For each position of the first one of the next."""
        kept = [f for f in factors if f.size != 1]
        if len(kept) == 1:
            return kept[0]
        made = self.new(prod(f.size for f in kept))
        made.factors = kept or None
        return made

    def chain(self, parts: Sequence[Dim]) -> Dim:
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        made = self.new(sum(p.size for p in parts), of_weights=any(find(p).of_weights for p in parts))
        made.parts = list(parts)
        return made

    def family(self, over: Dim, members: Sequence[Dim]) -> Dim:
        """One for each part of `over`; the only one, where they are all the same."""
        if len({id(find(m)) for m in members}) == 1:
            return members[0]
        made = self.new(members[0].size, of_weights=True)
        made.family = (over, list(members))
        return made

    def fix(self, d: Dim, reason: str) -> None:
        """Its units stay where they are."""
        d = find(d)
        for child in d.children():
            self.fix(child, reason)
        if d.leaf:
            d.reason = d.reason or reason

    # -- tying together ----------------------------------------------------------------------------

    def tie(self, a: Dim, b: Dim) -> None:
        """Position i of one is position i of the other."""
        a, b = find(a), find(b)
        if a is b:
            return
        if a.size != b.size:
            self._give_up(a, b, "tied to an axis of another length")
        elif a.leaf or b.leaf:
            self._bind(a, b)
        elif a.family is not None or b.family is not None:
            self._tie_family(*((a, b) if a.family is not None else (b, a)))
        elif a.factors is not None and b.factors is not None:
            self._tie_products(a, b)
        elif a.parts is not None and b.parts is not None:
            self._tie_chains(a, b)
        else:
            self._tie_mixed(*((a, b) if a.factors is not None else (b, a)))

    def _bind(self, a: Dim, b: Dim) -> None:
        if not a.leaf or (b.leaf and a.key < b.key):
            a, b = b, a
        if _inside(b, a):
            if b.family is not None:  # one of what varies is what does not
                self._tie_family(b, a)
            else:
                self.fix(b, "tied to a part of itself")
            return
        if a.reason:
            self.fix(b, a.reason)
        if a.of_weights:
            _mark(b)
        if a.of is not None:  # picked by two indices, it is no longer known which unit stands where
            b.of = a.of if b.of in (None, a.of) else b
        a.link = b

    def _tie_family(self, a: Dim, b: Dim) -> None:
        assert a.family is not None
        over, members = a.family
        if b.family is not None and find(b.family[0]) is find(over) and len(b.family[1]) == len(members):
            for x, y in zip(members, b.family[1], strict=True):
                self.tie(x, y)
            return
        a.family = None  # what does not vary ties all members together
        a.link = b
        for member in members:
            self.tie(member, b)

    def collapse(self, family: Dim) -> None:
        """Make it the same for every part of what it varies with."""
        family = find(family)
        if family.family is None:
            return
        first, *others = family.family[1]
        for other in others:
            self.tie(first, other)
        if not _inside(first, family):
            family.family = None
            family.link = find(first)

    def _tie_products(self, a: Dim, b: Dim) -> None:
        left, right = factors(a), factors(b)
        while left and right:
            x, y = left.pop(0), right.pop(0)
            small = min(x.size, y.size)
            if max(x.size, y.size) % small:
                self._give_up(a, b, "the same axis is cut into factors in two ways that do not agree")
                return
            if x.size > small:
                x, *rest = self.split(x, [small, x.size // small])
                left[:0] = rest
            elif y.size > small:
                y, *rest = self.split(y, [small, y.size // small])
                right[:0] = rest
            self.tie(x, y)

    def _tie_chains(self, a: Dim, b: Dim) -> None:
        cuts = sorted({*_cuts(a), *_cuts(b)})
        for start, stop in pairwise(cuts):
            self.tie(self.segment(a, start, stop)[0], self.segment(b, start, stop)[0])

    def _tie_mixed(self, a: Dim, b: Dim) -> None:
        """A product with a chain: the product's first factor is then a chain too."""
        inner = a.size // factors(a)[0].size
        cuts = _cuts(b)
        if any(c % inner for c in cuts):
            self._give_up(a, b, "an axis is a product in one place and a chain in another")
            return
        for start, stop in pairwise(cuts):
            self.tie(self.segment(a, start, stop)[0], self.segment(b, start, stop)[0])

    def _give_up(self, a: Dim, b: Dim, reason: str) -> None:
        self.fix(a, reason)
        self.fix(b, reason)

    # -- taking apart ------------------------------------------------------------------------------

    def split(self, d: Dim, sizes: Sequence[int]) -> list[Dim]:
        """Factors of these sizes. Where they cannot be had, fixed ones, and the dim is fixed."""
        d = find(d)
        kept = [s for s in sizes if s != 1]
        if len(kept) < len(sizes):
            got = iter(self.split(d, kept))
            return [self.new(1) if s == 1 else next(got) for s in sizes]
        if len(sizes) < 2:
            return [d] * len(sizes)
        if len(sizes) > 2:
            first, rest = self.split(d, [sizes[0], prod(sizes[1:])])
            return [first, *self.split(rest, sizes[1:])]
        if d.leaf:
            d.factors = [Dim(s, (*d.key, i), d.of_weights, d.reason) for i, s in enumerate(sizes)]
            return list(d.factors)
        made: list[Dim] | None = None
        if d.factors is not None:
            made = self._split_product(factors(d), sizes)
        elif d.parts is not None and all(c % sizes[1] == 0 for c in _cuts(d)):
            halves = [self.split(p, [find(p).size // sizes[1], sizes[1]]) for p in d.parts]
            over = self.new(sizes[0], of_weights=True)
            over.parts = [h[0] for h in halves]
            made = [over, self.family(over, [h[1] for h in halves])]
        elif d.family is not None:
            halves = [self.split(m, sizes) for m in d.family[1]]
            made = [self.family(d.family[0], [h[i] for h in halves]) for i in range(2)]
        if made is None:
            self.fix(d, "an axis is cut in a way that does not agree with how it was made")
            return [self.new(s, reason="cut in a way that does not agree") for s in sizes]
        return made

    def _split_product(self, left: list[Dim], sizes: Sequence[int]) -> list[Dim] | None:
        first: list[Dim] = []
        wanted = sizes[0]
        while wanted > 1:
            x = left.pop(0)
            if x.size <= wanted:
                if wanted % x.size:
                    return None
                first.append(x)
                wanted //= x.size
            elif x.size % wanted:
                return None
            else:
                x, rest = self.split(x, [wanted, x.size // wanted])
                first.append(x)
                left.insert(0, rest)
                wanted = 1
        return [self.product(first) if first else self.new(1), self.product(left) if left else self.new(1)]

    def segment(self, d: Dim, start: int, stop: int) -> tuple[Dim, Same]:
        """Positions `[start, stop)`, and what becomes of the dims of other axes where only those are left."""
        d = find(d)
        if (start, stop) == (0, d.size):
            return d, lambda x: x
        if d.leaf:
            cuts = sorted({0, start, stop, d.size})
            d.parts = [
                Dim(b - a, (*d.key, i), d.of_weights, d.reason) for i, (a, b) in enumerate(pairwise(cuts))
            ]
        if d.parts is not None:
            return self._segment_of_chain(d, start, stop)
        if d.factors is not None:
            head, *rest = factors(d)
            inner = d.size // head.size
            if start % inner == 0 and stop % inner == 0:
                part, restrict = self.segment(head, start // inner, stop // inner)
                return self.product([part, *map(restrict, rest)]), restrict
        if d.family is not None:
            over, members = d.family
            return self.family(over, [self.segment(m, start, stop)[0] for m in members]), lambda x: x
        self.fix(d, "part of an axis is taken that cuts through its units")
        return self.new(stop - start, reason="cuts through units"), lambda x: x

    def _segment_of_chain(self, d: Dim, start: int, stop: int) -> tuple[Dim, Same]:
        assert d.parts is not None
        pieces: list[tuple[Dim, Same]] = []
        at = 0
        for j, part in enumerate(d.parts):
            a, b = max(start, at), min(stop, at + part.size)
            if a < b:
                piece, inner = self.segment(part, a - at, b - at)
                pieces.append((piece, lambda x, j=j, inner=inner: inner(self._restricted(x, d, j))))  # type: ignore[misc]
            at += part.size
        if len(pieces) == 1:
            return pieces[0]
        made = self.chain([p for p, _ in pieces])
        return made, lambda x: self.family(made, [restrict(x) for _, restrict in pieces])

    def _restricted(self, d: Dim, over: Dim, j: int) -> Dim:
        """What a dim is beside part j of `over`."""
        d = find(d)
        if d.reason or d.size == 1 or not over.of_weights or d is over:
            return d
        if d.family is not None:
            if find(d.family[0]) is over:
                return d.family[1][j]
            return self.family(d.family[0], [self._restricted(m, over, j) for m in d.family[1]])
        if d.factors is not None:
            return self.product([self._restricted(f, over, j) for f in d.factors])
        if d.parts is not None:
            return self.chain([self._restricted(p, over, j) for p in d.parts])
        assert over.parts is not None
        d.family = (over, [Dim(d.size, (*d.key, i), d.of_weights) for i in range(len(over.parts))])
        return d.family[1][j]


def factors(d: Dim) -> list[Dim]:
    """The factors of a product, nested ones opened."""
    d = find(d)
    return [d] if d.factors is None else [g for f in d.factors for g in factors(f)]


def alike(a: Dim, b: Dim) -> bool:
    """Whether two dims are one, or made of the same ones in the same way."""
    a, b = find(a), find(b)
    if a is b:
        return True
    kinds = [(d.factors is not None, d.parts is not None, d.family is not None) for d in (a, b)]
    if a.leaf or kinds[0] != kinds[1] or len(a.children()) != len(b.children()):
        return False
    if a.family is not None and b.family is not None and find(a.family[0]) is not find(b.family[0]):
        return False
    return all(alike(x, y) for x, y in zip(a.children(), b.children(), strict=True))


def _cuts(d: Dim) -> list[int]:
    """Where the parts of a chain begin and end."""
    cuts = [0]
    for part in find(d).parts or [d]:
        cuts.append(cuts[-1] + part.size)
    return cuts


def _inside(d: Dim, what: Dim) -> bool:
    d = find(d)
    return d is what or any(_inside(c, what) for c in d.children())


def _mark(d: Dim) -> None:
    d = find(d)
    d.of_weights = True
    for child in d.children():
        _mark(child)
