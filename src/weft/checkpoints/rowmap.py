"""`RowMap`: which rows of which sources a row is made of, for every row of a tensor.

Kept as compressed sparse rows in numpy arrays, so that a vocabulary of any size is put together without a loop over
its tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RowMap:
    """The terms of every output row, in compressed rows: row i has the terms `indptr[i]` to `indptr[i + 1]`."""

    indptr: Ints
    """`[n + 1]`, from 0 to the number of terms."""
    source: Ints
    """`[terms]`: which source."""
    row: Ints
    """`[terms]`: which row of it."""
    coefficient: Floats
    """`[terms]`."""

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def counts(self) -> Ints:
        """`[n]`: how many terms each row has."""
        return np.diff(self.indptr)

    @classmethod
    def pick(cls, source: Ints | int, row: Ints) -> RowMap:
        """Row i is row `row[i]` of `source[i]` (or of one source); zero where `row[i]` is negative."""
        there = row >= 0
        sources = np.broadcast_to(np.asarray(source, np.int64), row.shape)[there]
        return cls(_pointers(there.astype(np.int64)), sources, row[there], np.ones(len(sources)))

    @classmethod
    def mean(cls, n: int, out: Ints, source: Ints, row: Ints) -> RowMap:
        """Row i of n is the mean of the rows listed with `out == i`, in the order listed; zero if there is none."""
        order = np.argsort(out, kind="stable")
        counts = np.bincount(out, minlength=n).astype(np.int64)
        coefficient = np.repeat(1.0 / np.maximum(counts, 1), counts)
        return cls(_pointers(counts), source[order], row[order], coefficient)

    @classmethod
    def chosen(cls, options: Sequence[RowMap], choice: Ints) -> RowMap:
        """Row i is row i of `options[choice[i]]`. All options have as many rows as `choice`."""
        i = np.arange(len(choice))
        counts = np.stack([o.counts for o in options])[choice, i]
        before = np.cumsum([0, *(len(o.row) for o in options)])
        first = np.stack([o.indptr[:-1] + b for o, b in zip(options, before[:-1], strict=True)])[choice, i]
        indptr = _pointers(counts)
        terms = np.repeat(first - indptr[:-1], counts) + np.arange(indptr[-1])
        return cls(
            indptr,
            np.concatenate([o.source for o in options])[terms],
            np.concatenate([o.row for o in options])[terms],
            np.concatenate([o.coefficient for o in options])[terms],
        )

    def digest(self) -> str:
        """The same for the same map."""
        made = hashlib.blake2b(digest_size=16)
        for array in (self.indptr, self.source, self.row, self.coefficient):
            made.update(np.ascontiguousarray(array).tobytes())
        return made.hexdigest()


def _pointers(counts: Ints) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
