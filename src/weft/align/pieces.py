"""A tensor taken apart until one group, or nothing that moves, stands along each axis, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.align.spec import Axis
from weft.align.terms import Chain, Product, Term, size_of

Labels = tuple[Term, ...]


@dataclass(frozen=True)
class Piece:
    """Part of a tensor: what stands along each axis (a group or a length), and which axis that was part of."""

    labels: Labels
    axes: tuple[int, ...]
    values: Tensor


def apart(values: Tensor, row: Sequence[Axis], sizes: Mapping[str, int]) -> Iterator[Piece]:
    """The pieces of a tensor, products opened and chains cut; views, in a fixed order."""
    labels = tuple(s if t is None else t for t, s in zip(row, values.shape, strict=True))
    yield from _apart(values, labels, tuple(range(values.dim())), sizes)


def _apart(values: Tensor, row: Labels, axes: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[Piece]:
    for k, term in enumerate(row):
        if isinstance(term, Product):
            lengths = [size_of(f, sizes) or 1 for f in term.factors]
            wide = (*axes[:k], *[axes[k]] * len(lengths), *axes[k + 1 :])
            yield from _apart(
                values.reshape(*values.shape[:k], *lengths, *values.shape[k + 1 :]),
                _put(row, k, term.factors),
                wide,
                sizes,
            )
            return
        if isinstance(term, Chain):
            lengths = [size_of(p, sizes) or 0 for p in term.parts]
            for part, some in zip(term.parts, torch.split(values, lengths, k), strict=True):
                yield from _apart(some, _put(row, k, (part,)), axes, sizes)
            return
    yield Piece(row, axes, values)


def together(pieces: Iterator[Tensor], row: Labels) -> Tensor:
    """The tensor whose pieces come in the order of `apart`, whatever their sizes have become."""
    for k, term in enumerate(row):
        if isinstance(term, Product):
            return together(pieces, _put(row, k, term.factors)).flatten(k, k + len(term.factors) - 1)
        if isinstance(term, Chain):
            return torch.cat([together(pieces, _put(row, k, (p,))) for p in term.parts], k)
    return next(pieces)


def in_front(piece: Piece, wanted: Sequence[str]) -> Tensor:
    """A piece's values, [*wanted, all else]."""
    order = [piece.labels.index(w) for w in wanted]
    rest = [k for k in range(piece.values.dim()) if k not in order]
    return piece.values.permute(*order, *rest).reshape(*(piece.values.shape[k] for k in order), -1)


def _put(row: Labels, k: int, terms: Labels) -> Labels:
    return (*row[:k], *terms, *row[k + 1 :])
