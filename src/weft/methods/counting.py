"""What a counting pass over magnitudes leaves: tables of digits, and the few keys that need another digit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from weft.checkpoints.bits import Array
from weft.checkpoints.execution import execution

DIGIT = 16
"""Bits of the lower half of a key."""


def add_up(counts: Sequence[Array]) -> Array:
    """The sum of integer tables, int64; made in the first if that is int64 (a summary is joined once)."""
    total = counts[0].astype(np.int64, copy=False)
    for more in counts[1:]:
        total += more
    return total


@dataclass(frozen=True)
class Counted:
    """What one pass finds of magnitudes that nearly surely have an upper half in a bracket.

    Differences of 16-bit weights are short numbers, with few lower halves, so that these can be kept, and one
    pass is nearly always enough.
    """

    LIMIT: ClassVar[int] = 1 << 21

    counts: Array
    """`[k, q or 1, 1 + digits]`: keys above all digits counted, then how often each upper half occurs."""
    first: Array
    """`[k, q or 1]`: the first upper half that is counted."""
    bracket: Array
    """`[k, q, 2]`: the first upper half of which keys are kept, and one past the last."""
    rest: tuple[tuple[Array, ...], ...] | None
    """Per model and magnitude the keys in the bracket whose lower half is not zero; None if they were many."""

    @staticmethod
    def join(parts: Sequence[Counted]) -> Counted:
        counts = add_up([p.counts for p in parts])
        kept = [p.rest for p in parts if p.rest is not None]
        if len(kept) < len(parts):
            return replace(parts[0], counts=counts, rest=None)
        rest = tuple(_few(sum(rows, ())) for rows in zip(*kept, strict=True))
        # ranges are as long as the memory budget allows, so twice that many keys fit where a range did
        most = min(Counted.LIMIT, 2 * execution().chunk)
        few = all(sum(piece.size for piece in row) <= most for row in rest)
        return replace(parts[0], counts=counts, rest=rest if few else None)

    def upper_digits(self, rank: Array) -> tuple[Array, Array] | None:
        """Upper halves at `rank` `[k, q]` (from the largest), and the ranks among the keys that have them.

        None where one was not counted, after all.
        """
        above, digits = self.counts[..., :1], self.counts[..., :0:-1]  # from the largest down
        reached = np.concatenate([above, digits], -1).cumsum(-1)
        where, before = reach(reached, rank)
        if bool(((where == 0) | (where == reached.shape[-1])).any()):
            return None
        return self.first + digits.shape[-1] - where, rank - before

    def lower_digits(self, prefix: Array, rank: Array) -> Array | None:
        """The lower halves at `rank` (from the largest) below each prefix `[k, q]`; None where not kept."""
        first, last = self.bracket[..., 0], self.bracket[..., 1]
        if self.rest is None or bool(((prefix < first) | (prefix >= last)).any()):
            return None
        found = np.zeros(prefix.size, np.int64)
        for i, pieces in enumerate(self.rest):
            row = np.concatenate([np.zeros(0, np.uint32), *pieces])
            p, r = int(prefix.flat[i]), int(rank.flat[i])
            inside = row[(row >> DIGIT) == p] & ((1 << DIGIT) - 1)
            if r <= inside.size:  # behind them come those whose lower half is zero
                found[i] = np.partition(inside, inside.size - r)[inside.size - r]
        return found.reshape(prefix.shape)


def reach(reached: Array, rank: Array) -> tuple[Array, Array]:
    """Where running counts `[k, 1 or q, n]` first come to `rank` `[k, q]`, and how much they had just before."""
    where, before = np.empty(rank.shape, np.int64), np.zeros(rank.shape, np.int64)
    for at in np.ndindex(rank.shape):
        row = reached[at if reached.shape[1] > 1 else (at[0], 0)]
        where[at] = np.searchsorted(row, rank[at])
        if where[at]:
            before[at] = row[where[at] - 1]
    return where, before


def _few(pieces: tuple[Array, ...]) -> tuple[Array, ...]:
    """The same keys in few pieces, each longer than the next: thousands of short ones would litter the heap."""
    kept: list[Array] = []
    for piece in pieces:
        while kept and kept[-1].size <= 2 * piece.size:
            piece = np.concatenate([kept.pop(), piece])
        kept.append(piece)
    return tuple(kept)
