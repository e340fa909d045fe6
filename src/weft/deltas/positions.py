"""Which elements of a tensor are listed: blocks of 2^16 elements, and in each the 16-bit offsets, rising.

Parts: `blocks` int64 [⌈n / 2^16⌉ + 1], how many listed elements come before each block; and `at` uint16 [count],
the offsets in their blocks, or (where more than one in sixteen is listed) `mask` uint8 [⌈n / 8⌉], one bit each.
So a range of elements is found by reading a few numbers, and an element costs two bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import byte_range, code_bytes, pack_bits, unpack_bits
from weft.deltas.pair import Part
from weft.errors import DataError

BLOCK = 1 << 16
_TOGETHER = 4
"""Blocks that are looked at together."""
Index = Literal["list", "bitmap"]
Chosen = Callable[[int, int], Tensor]
"""Which of the elements [start, stop) are listed: bool `[stop − start]`; start is a multiple of `BLOCK`."""


def block_count(numel: int) -> int:
    return -(-numel // BLOCK)


def cheapest(numel: int, count: int) -> tuple[Index, int]:
    """The smaller way to say which `count` of `numel` elements are meant, and its bytes without `blocks`."""
    listed, mapped = 2 * count, code_bytes(numel, 1)
    return ("list", listed) if listed <= mapped else ("bitmap", mapped)


def index_bytes(numel: int, count: int) -> int:
    """Bytes of all parts that say where `count` elements are; 0 for none."""
    return cheapest(numel, count)[1] + 8 * (block_count(numel) + 1) if count else 0


def index_parts(numel: int, count: int, index: Index) -> dict[str, TensorInfo]:
    """The parts that say where `count` of `numel` elements are; none for none."""
    if not count:
        return {}
    kinds = {
        "list": ("at", TensorInfo((count,), torch.uint16)),
        "bitmap": ("mask", TensorInfo((code_bytes(numel, 1),), torch.uint8)),
    }
    name, info = kinds[index]
    return {"blocks": TensorInfo((block_count(numel) + 1,), torch.int64), name: info}


def find(part: Part, numel: int, count: int, index: Index, start: int, stop: int) -> tuple[Tensor, int]:
    """Listed elements of [start, stop), relative to start, rising; and how many are listed before them.

    DataError where the stored numbers contradict one another, which only a damaged or forged file does.
    """
    if not count or start == stop:
        return torch.empty(0, dtype=torch.int64), 0
    first, last = start // BLOCK, -(-stop // BLOCK)
    before = part("blocks", first, last + 1).to(torch.int64)
    _check_blocks(before, first, last, numel, count)
    low, high = int(before[0]), int(before[-1])
    origin = first * BLOCK
    if index == "list":
        block = torch.repeat_interleave(torch.arange(first, last) * BLOCK, before.diff())
        places = part("at", low, high).to(torch.int64) + block
    else:
        end = min(last * BLOCK, numel)
        a, b, _ = byte_range(origin, end, 1)
        places = unpack_bits(part("mask", a, b), 1, 0, end - origin).nonzero().reshape(-1) + origin
        per_block = torch.bincount((places - origin) // BLOCK, minlength=last - first)
        if not torch.equal(per_block, before.diff()):
            raise _forged("mask and blocks count differently")
    if len(places) and (bool((places.diff() <= 0).any()) or int(places[-1]) >= numel):
        raise _forged("positions do not rise, or lie outside the tensor")
    a, b = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
    return places[a:b] - start, low + a


def _check_blocks(before: Tensor, first: int, last: int, numel: int, count: int) -> None:
    counts = before.diff()
    wrong = bool((counts < 0).any() or (counts > BLOCK).any())
    wrong |= not 0 <= int(before[0]) <= int(before[-1]) <= count
    wrong |= first == 0 and int(before[0]) != 0
    wrong |= last == block_count(numel) and int(before[-1]) != count
    if wrong:
        raise _forged("the counts of its blocks do not add up")


def _forged(what: str) -> DataError:
    return DataError(f"the delta is damaged: {what}; pack or fetch it again")


class Places:
    """The writer's side: how many elements of each block are listed, and which, by asking `chosen` again."""

    def __init__(self, numel: int, counts: Sequence[int] | Tensor, chosen: Chosen) -> None:
        self.numel, self.chosen = numel, chosen
        self.before = torch.zeros(block_count(numel) + 1, dtype=torch.int64)
        self.before[1:] = torch.as_tensor(counts, dtype=torch.int64).cumsum(0)

    @property
    def count(self) -> int:
        return int(self.before[-1])

    def listed(self, start: int, stop: int) -> Tensor:
        """The listed elements number start … stop − 1, by their positions in the tensor, int64."""
        if start == stop:
            return torch.empty(0, dtype=torch.int64)
        first = int(torch.searchsorted(self.before, start, right=True)) - 1
        last = int(torch.searchsorted(self.before, stop))
        found = []
        for block in range(first, last, _TOGETHER):
            low, high = block * BLOCK, min(min(block + _TOGETHER, last) * BLOCK, self.numel)
            found.append(self.chosen(low, high).nonzero().reshape(-1) + low)
        skipped = start - int(self.before[first])
        return torch.cat(found)[skipped : skipped + stop - start]

    def encode(self, name: str, start: int, stop: int) -> Tensor:
        """A range of the part `blocks`, `at` or `mask`."""
        if name == "blocks":
            return self.before[start:stop]
        if name == "at":
            return (self.listed(start, stop) % BLOCK).to(torch.uint16)
        low, high = 8 * start, min(8 * stop, self.numel)
        first = low // BLOCK * BLOCK
        found = []
        for a in range(first, high, _TOGETHER * BLOCK):
            b = min(a + _TOGETHER * BLOCK, -(-high // BLOCK) * BLOCK, self.numel)
            found.append(self.chosen(a, b))
        return pack_bits(torch.cat(found)[low - first : high - first], 1)


def positions_of(mask: Tensor) -> Tensor:
    """How many of each block's elements are true; `mask` begins at a block. int64 `[⌈n / 2^16⌉]`."""
    return torch.bincount(mask.nonzero().reshape(-1) // BLOCK, minlength=block_count(len(mask)))
