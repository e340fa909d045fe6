"""What a counting pass over magnitudes leaves: tables of digits, and the few keys that need another digit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from weft.checkpoints.execution import execution

DIGIT = 16
"""Bits of the lower half of a key."""


def add_up(counts: Sequence[Tensor]) -> Tensor:
    """The sum of integer tables, int64; made in the first if that is int64 (a summary is joined once)."""
    total = counts[0].long()
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

    counts: Tensor
    """`[k, q or 1, 1 + digits]`: keys above all digits counted, then how often each upper half occurs."""
    first: Tensor
    """`[k, q or 1]`: the first upper half that is counted."""
    bracket: Tensor
    """`[k, q, 2]`: the first upper half of which keys are kept, and one past the last."""
    rest: tuple[tuple[Tensor, ...], ...] | None
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
        few = all(sum(piece.numel() for piece in row) <= most for row in rest)
        return replace(parts[0], counts=counts, rest=rest if few else None)

    def upper_digits(self, rank: Tensor) -> tuple[Tensor, Tensor] | None:
        """Upper halves at `rank` `[k, q]` (from the largest), and the ranks among the keys that have them.

        None where one was not counted, after all.
        """
        above, digits = self.counts[..., :1], self.counts[..., 1:].flip(-1)  # from the largest down
        reached = torch.cat([above, digits], -1).cumsum(-1)
        reached = reached.expand(*rank.shape, -1).contiguous()
        where = torch.searchsorted(reached, rank[..., None])
        if bool(((where == 0) | (where == reached.shape[-1])).any()):
            return None
        before = reached.gather(-1, where - 1)[..., 0]
        return self.first + digits.shape[-1] - where[..., 0], rank - before

    def lower_digits(self, prefix: Tensor, rank: Tensor) -> Tensor | None:
        """The lower halves at `rank` (from the largest) below each prefix `[k, q]`; None where not kept."""
        first, last = self.bracket.unbind(-1)
        if self.rest is None or bool(((prefix < first) | (prefix >= last)).any()):
            return None
        found = torch.zeros_like(prefix).reshape(-1)
        for i, pieces in enumerate(self.rest):
            row = torch.cat([torch.zeros(0, dtype=torch.int64), *(p.long() for p in pieces)])
            p, r = int(prefix.reshape(-1)[i]), int(rank.reshape(-1)[i])
            inside = row[(row >> DIGIT) == p] & ((1 << DIGIT) - 1)
            if r <= inside.numel():  # behind them come those whose lower half is zero
                found[i] = inside.kthvalue(inside.numel() - r + 1).values
        return found.reshape(prefix.shape)


def _few(pieces: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same keys in few pieces, each longer than the next: thousands of short ones would litter the heap."""
    kept: list[Tensor] = []
    for piece in pieces:
        while kept and kept[-1].numel() <= 2 * piece.numel():
            piece = torch.cat([kept.pop(), piece])
        kept.append(piece)
    return tuple(kept)
