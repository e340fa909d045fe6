"""One number for each group of g neighbouring elements of τ: mean magnitudes, extremes. g may be a row or all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from weft.checkpoints.base import TensorInfo
from weft.deltas.pair import BATCH, Pair
from weft.errors import UsageError
from weft.methods.stats import fold, tile_sums

Group = int | str
"""So many elements, or "row", or "tensor"."""
_Reduce = Callable[[Tensor], Tensor]


def group_size(group: Group, info: TensorInfo) -> int:
    """`"row"` (what follows the first axis), `"tensor"` or a number → elements of a group, at most all."""
    row = info.numel // info.shape[0] if len(info.shape) > 1 and info.shape[0] else info.numel
    sizes = {"tensor": info.numel, "row": row}
    size = sizes.get(group) if isinstance(group, str) else group
    if size is None or isinstance(size, bool) or (not isinstance(group, str) and size < 1):
        raise UsageError(f"group must be tensor, row or a number of elements, not {group!r}")
    return max(1, min(size, info.numel))


def group_count(numel: int, size: int) -> int:
    return -(-numel // size)


def mean_magnitudes(pair: Pair, size: int) -> Tensor:
    """mean |τ| of each group, float64 [groups]. Added up in an order that depends on the group's size alone."""
    sums = _reduced(pair, size, lambda x: fold(x.abs()), lambda x: tile_sums(x.abs()[None])[:, 0], fold)
    last = pair.info.numel - (len(sums) - 1) * size
    lengths = torch.full_like(sums, size)
    lengths[-1:] = last
    return sums / lengths


def extremes(pair: Pair, size: int) -> tuple[Tensor, Tensor]:
    """(min(τ, 0), max(τ, 0)) of each group, float64 [groups] each: zero is always in the range."""

    def least(x: Tensor) -> Tensor:
        return x.amin(-1).clamp(max=0)

    def most(x: Tensor) -> Tensor:
        return x.amax(-1).clamp(min=0)

    def both(x: Tensor) -> Tensor:
        return torch.stack([least(x), most(x)], -1)

    found = _reduced(
        pair, size, both, lambda x: both(x[None]), lambda p: torch.stack([p[0].amin(), p[1].amax()])
    )
    return found[:, 0], found[:, 1]


def _reduced(pair: Pair, size: int, rows: _Reduce, piece: _Reduce, join: _Reduce) -> Tensor:
    """`rows` maps [m, size] to [m, …]. A longer group than a batch goes in pieces, joined from […, t]."""
    numel, found = pair.info.numel, []
    if size <= BATCH:
        table = torch.empty(0)
        for a, b in pair.cuts(size):
            tau = pair.delta(a, b)
            part = rows(pad(tau, (0, -len(tau) % size)).reshape(-1, size))
            if a == 0:  # one block for all: small ones would lie scattered over the memory that batches leave
                table = part.new_empty(group_count(numel, size), *part.shape[1:])
            table[a // size : a // size + len(part)] = part
        return table
    step = max(BATCH, size) if pair.grain > BATCH else BATCH
    for low in range(0, numel, size):
        high = min(low + size, numel)
        pieces = [piece(pair.delta(a, min(a + step, high))) for a in range(low, high, step)]
        found.append(join(torch.cat(pieces).movedim(0, -1)))
    return torch.stack(found)


def spread(table: Tensor, size: int, start: int, stop: int) -> Tensor:
    """The group's number for each element of [start, stop); `table` begins with the group of `start`."""
    index = torch.arange(start, stop) // size - start // size
    return table[index]
