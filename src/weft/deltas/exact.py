"""Lossless differences: the fine-tune comes back bit for bit, whatever its dtype.

Stored floats are put in order as integers (neighbouring numbers differ by one), so a fine-tune that moves weights
by a few units in the last place is a field of small whole numbers d = ord(θ) − ord(θ0). Each is a code of b bits;
where d does not fit, the element is listed with its new value. With b = 0 that is a sparse delta of what changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import MOST, byte_range, code_bytes, pack_bits, unpack_bits
from weft.deltas.pair import BATCH, Pair, Part, Values
from weft.deltas.positions import BLOCK, Index, Places, block_count, cheapest, find, index_bytes, index_parts
from weft.deltas.scheme import Encoder, code_batches, code_grain, joined

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_NEVER = MOST + 1
"""The width of what no code holds."""


def raw(values: Tensor) -> Tensor:
    """The bit patterns as integers of the same width."""
    return values.view(_INTEGERS[values.dtype.itemsize])


def ordered(values: Tensor) -> Tensor:
    """Bit patterns as int64, such that neighbouring floats differ by one; a bijection, NaN and −0 included."""
    bits = raw(values).to(torch.int64)
    width = 8 * values.dtype.itemsize
    if width == 8:
        bits = (bits ^ 0x80) - 0x80  # uint8 → signed
    return _mirrored(bits, width) if values.dtype.is_floating_point else bits


def _mirrored(bits: Tensor, width: int) -> Tensor:
    """Floats are sign and magnitude: those with the sign are counted downwards. Its own inverse."""
    return torch.where(bits < 0, ~(bits & (2 ** (width - 1) - 1)), bits)


def unordered(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `ordered`."""
    width = 8 * dtype.itemsize
    bits = _mirrored(numbers, width) if dtype.is_floating_point else numbers
    if dtype == torch.bool:
        return (bits & 1).to(torch.bool)
    if width == 8:
        return (bits & 0xFF).to(torch.uint8).view(dtype)
    return bits.to(_INTEGERS[dtype.itemsize]).view(dtype)


def widths(d: Tensor) -> Tensor:
    """The least b for each d with −2^(b−1) ≤ d < 2^(b−1); 0 for 0; `MOST` + 1 where that is wider than a code."""
    magnitude = torch.where(d < 0, ~d, d).clamp(max=2**MOST)
    need = torch.frexp(magnitude.double()).exponent.to(torch.int64) + (d != 0)
    return need.clamp(max=_NEVER)


@dataclass(frozen=True, slots=True)
class Exact:
    """b-bit codes (none for 0) and `count` listed elements with their new values.

    Parts: `codes` uint8 (d + 2^(b−1)), the positions' parts, `value` [count] in the fine-tune's dtype.
    """

    bits: int
    count: int
    index: Index
    kind: ClassVar[str] = "exact"

    def problem(self, info: TensorInfo) -> str | None:
        if not 0 <= self.bits <= MOST:
            return f"codes of {self.bits} bits"
        return None if 0 <= self.count <= info.numel else f"{self.count} of {info.numel} elements"

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        found = index_parts(info.numel, self.count, self.index)
        if self.bits:
            found["codes"] = TensorInfo((code_bytes(info.numel, self.bits),), torch.uint8)
        if self.count:
            found["value"] = TensorInfo((self.count,), info.dtype)
        return found

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        values = base(start, stop, info.dtype)
        if self.bits:
            a, b, shift = byte_range(start, stop, self.bits)
            d = unpack_bits(part("codes", a, b), self.bits, shift, stop - start) - 2 ** (self.bits - 1)
            values = unordered(ordered(values) + d, info.dtype)
        at, number = find(part, info.numel, self.count, self.index, start, stop)
        if len(at):
            values = values.clone()
            raw(values)[at] = raw(part("value", number, number + len(at)))
        return values

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        wide = min(count + 2 * BLOCK, info.numel)
        return (64 + 2 * self.bits) * count + (24 * wide if self.count else 0)


@dataclass(frozen=True, slots=True)
class Counted:
    """How many elements of each block need how many bits: int64 [blocks, MOST + 2]."""

    table: Tensor
    numel: int
    itemsize: int

    @classmethod
    def of(cls, pair: Pair) -> Counted:
        # one block for all: small ones would lie scattered over the memory that batches leave
        table = torch.zeros(block_count(pair.info.numel), _NEVER + 1, dtype=torch.int64)
        for a, b in pair.cuts(BLOCK):
            need = widths(_steps(pair, a, b))
            block = torch.arange(len(need)) // BLOCK
            blocks = block_count(len(need))
            counts = torch.bincount(block * (_NEVER + 1) + need, minlength=blocks * (_NEVER + 1))
            table[a // BLOCK : a // BLOCK + blocks] = counts.reshape(blocks, -1)
        return cls(table, pair.info.numel, pair.info.dtype.itemsize)

    @property
    def changed(self) -> int:
        """How many elements differ at all."""
        return int(self.table[:, 1:].sum())

    def beyond(self, bits: int) -> Tensor:
        """How many elements of each block no code of so many bits holds."""
        return self.table[:, bits + 1 :].sum(1)

    def bytes_at(self, bits: int) -> int:
        count = int(self.beyond(bits).sum())
        return code_bytes(self.numel, bits) + index_bytes(self.numel, count) + count * self.itemsize

    def scheme(self, bits: int) -> Exact:
        count = int(self.beyond(bits).sum())
        return Exact(bits, count, cheapest(self.numel, count)[0] if count else "list")

    def best(self) -> Exact:
        """The cheapest width."""
        return self.scheme(min(range(MOST + 1), key=self.bytes_at))


def _steps(pair: Pair, start: int, stop: int) -> Tensor:
    """d = ord(θ) − ord(θ0), int64."""
    theirs = pair.before(start, stop, pair.info.dtype)
    return ordered(pair.after(start, stop)) - ordered(theirs)


class ExactEncoder(Encoder):
    """Codes and listed values of one tensor."""

    def __init__(self, pair: Pair, scheme: Exact, counted: Counted) -> None:
        super().__init__(pair, scheme)
        self.bits = scheme.bits
        self.places = Places(pair.info.numel, counted.beyond(scheme.bits), self._listed)

    def _listed(self, start: int, stop: int) -> Tensor:
        return widths(_steps(self.pair, start, stop)) > self.bits

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        if part == "codes":
            cuts = code_batches(self.pair, self.bits, start, stop)
            return joined([self._codes(a, b) for a, b in cuts], torch.uint8)
        if part == "value":
            return values_at(self.pair, self.places.listed(start, stop))
        return self.places.encode(part, start, stop)

    def _codes(self, start: int, stop: int) -> Tensor:
        d = _steps(self.pair, start, stop)
        return pack_bits(torch.where(widths(d) > self.bits, 0, d) + 2 ** (self.bits - 1), self.bits)

    def grain(self, part: str) -> int:
        size = code_bytes(self.pair.info.numel, max(self.bits, 1))
        return code_grain(self.pair, self.bits, size) if part == "codes" else 1


def values_at(pair: Pair, places: Tensor) -> Tensor:
    """θ at rising positions, in the storage dtype; read block by block."""
    found = []
    for block in torch.unique_consecutive(places // BATCH).tolist():
        low, high = block * BATCH, min((block + 1) * BATCH, pair.info.numel)
        a, b = torch.searchsorted(places, torch.tensor([low, high])).tolist()
        found.append(raw(pair.after(low, high))[places[a:b] - low])
    return torch.cat(found).view(pair.info.dtype) if found else torch.empty(0, dtype=pair.info.dtype)


@dataclass(frozen=True, slots=True)
class Whole:
    """The tensor itself: new ones, and those of another shape or kind than the base's. Part: `whole`."""

    kind: ClassVar[str] = "whole"

    def problem(self, info: TensorInfo) -> str | None:
        return None

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        return {"whole": info}

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        return part("whole", start, stop)

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        return count * info.dtype.itemsize


class WholeEncoder(Encoder):
    """A copy."""

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        return self.pair.after(start, stop)

    def grain(self, part: str) -> int:
        return self.pair.model.grain(self.pair.name)

    def bytes_read(self) -> int:
        return self.pair.model.bytes_read(self.pair.name)

    def working_bytes(self, part: str, count: int) -> int:
        model, name = self.pair.model, self.pair.name
        return model.working_bytes(name, min(count + 2 * model.grain(name), self.pair.info.numel))
