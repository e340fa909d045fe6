"""A tensor seen from the units of one group: `[units, what belongs to each of them]`.

Two units of two networks are compared by what belongs to them: their rows, columns, biases, slices of heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from weft.align.spec import Axis
from weft.align.terms import Chain, Product, Term, chain, product, size_of


@dataclass(frozen=True)
class Units:
    """Where the units of a group lie along one axis."""

    axis: int
    positions: Tensor
    """int64 [units, positions of one unit]."""
    rest: Term
    """What stands along the positions of one unit."""

    @cached_property
    def plain(self) -> bool:
        """Whether units lie one after the other and fill the axis."""
        return torch.equal(self.positions.flatten(), torch.arange(self.positions.numel()))

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor as `[units, …]`, with one unit's positions along the axis."""
        n, m = self.positions.shape
        if self.plain and n * m == tensor.shape[self.axis]:
            taken = tensor
        else:
            taken = tensor.index_select(self.axis, self.positions.flatten().to(tensor.device))
        shape = [*tensor.shape[: self.axis], n, m, *tensor.shape[self.axis + 1 :]]
        return taken.reshape(shape).movedim(self.axis, 0)


def units_along(axis: int, term: Axis, group: str, sizes: Mapping[str, int]) -> Units:
    """Where the units of `group` lie along an axis with this term, in which it stands."""
    found = _opened(term, group, sizes)
    assert found is not None
    return Units(axis, *found)


def _opened(term: Axis, group: str, sizes: Mapping[str, int]) -> tuple[Tensor, Term] | None:
    if term == group:
        return torch.arange(sizes[group])[:, None], 1
    if isinstance(term, Chain):
        start, positions, rests = 0, [], []
        for part in term.parts:
            found = _opened(part, group, sizes)
            if found is not None:
                positions.append(found[0] + start)
                rests.append(found[1])
            start += size_of(part, sizes) or 0
        return (torch.cat(positions, 1), chain(rests)) if positions else None
    if isinstance(term, Product):
        lengths = [size_of(f, sizes) or 1 for f in term.factors]
        for i, factor in enumerate(term.factors):
            found = _opened(factor, group, sizes)
            if found is None:
                continue
            own, rest = found
            outer, inner = prod(lengths[:i]), prod(lengths[i + 1 :])
            before = torch.arange(outer)[None, :, None, None] * lengths[i]
            after = torch.arange(inner)[None, None, None, :]
            where = (before + own[:, None, :, None]) * inner + after
            rests = [*term.factors[:i], rest, *term.factors[i + 1 :]]
            return where.reshape(len(own), -1), product(rests)
    return None


def without(term: Axis, kept: frozenset[str], sizes: Mapping[str, int]) -> Term:
    """The term with every group but the `kept` written as its size."""
    if isinstance(term, str):
        return term if term in kept else sizes[term]
    if isinstance(term, Product):
        return product([without(f, kept, sizes) for f in term.factors])
    if isinstance(term, Chain):
        return chain([without(p, kept, sizes) for p in term.parts])
    return 1 if term is None else term
