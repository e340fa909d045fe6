"""Factors and zero points that are each for a block of a weight, and weights that are codes times factors.

    w[i, j] = (code[i, j] − zero[i // h, j // w]) · scale[i // h, j // w] · …

This one form holds float8, int8, packed integers, NVFP4 and MXFP4; they differ in how a code is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.quantised.node import Part
from weft.checkpoints.quantised.packing import e2m1, unpack_nibbles, unpack_words, word_count
from weft.errors import DataError
from weft.late import Tensor, torch

_DEFAULT_BLOCK = (128, 128)


class Codes(Protocol):
    """How the codes of a weight are stored."""

    @property
    def name(self) -> str:
        """The stored tensor."""

    def read(self, part: Part, start: int, stop: int) -> Tensor:
        """The codes of a flat range as float64."""


@dataclass(frozen=True, slots=True)
class Plain:
    """One code an element: int8, float8."""

    name: str

    def read(self, part: Part, start: int, stop: int) -> Tensor:
        return part(self.name, start, stop).double()


@dataclass(frozen=True, slots=True)
class Float4:
    """Two 4-bit floats in a byte, the first in the low half."""

    name: str

    def read(self, part: Part, start: int, stop: int) -> Tensor:
        first = start // 2
        data = part(self.name, first, -(-stop // 2)).view(torch.uint8)
        return e2m1(unpack_nibbles(data, low_first=True))[start - 2 * first : stop - 2 * first]


@dataclass(frozen=True, slots=True)
class Words:
    """Signed integers of 1 to 8 bits, offset by 2^(bits−1), rows packed into 32-bit words."""

    name: str
    bits: int
    columns: int

    def read(self, part: Part, start: int, stop: int) -> Tensor:
        width = word_count(self.columns, self.bits)
        first, last = start // self.columns, -(-stop // self.columns)
        words = part(self.name, first * width, last * width).reshape(last - first, width)
        codes = unpack_words(words, self.bits)[:, : self.columns] - (1 << self.bits - 1)
        return codes.reshape(-1)[start - first * self.columns : stop - first * self.columns].double()


@dataclass(frozen=True, slots=True)
class Grid:
    """A stored tensor with one entry for each block of the last two dimensions of a weight of `shape`."""

    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    index: str | None = None
    """Where groups are no runs of columns: the tensor that says the group of each column."""
    bits: int = 0
    """Not 0 where the entries are signed integers packed along the rows (zero points)."""

    def at(self, part: Part, start: int, stop: int) -> Tensor:
        """The entry of each element in `[start, stop)`, float64, reading only the rows of entries needed."""
        rows, columns = _matrix(self.shape)
        height, width = self.block
        if height >= rows and width >= columns and len(self.shape) <= 2 and self.index is None:
            return self._rows(part, 0, 1, 1).reshape(-1).expand(stop - start)
        down, across = -(-rows // height), -(-columns // width)
        first, last = start // columns, -(-stop // columns)
        row = torch.arange(first, last)
        block_row = (row // rows) * down + (row % rows) // height
        low, high = int(block_row[0]), int(block_row[-1]) + 1
        table = self._rows(part, low, high, across)
        if self.index is None:
            table = table.repeat_interleave(width, dim=1)[:, :columns]
        else:
            table = table[:, column_groups(part, self.index, columns, across)]
        if len(table) != len(row) or height > 1:
            table = table[block_row - low]
        return table.reshape(-1)[start - first * columns : stop - first * columns]

    def _rows(self, part: Part, low: int, high: int, across: int) -> Tensor:
        """Rows `[low, high)` of the entries, float64; 8-bit unsigned entries are powers of two."""
        if not self.bits:
            entries = part(self.name, low * across, high * across)
            if entries.dtype == torch.uint8:
                entries = entries.view(torch.float8_e8m0fnu)
            return entries.double().reshape(high - low, across)
        # 32 rows of entries fill a whole number of words
        top = low // 32 * 32
        words = part(self.name, top * self.bits // 32 * across, word_count(high, self.bits) * across)
        entries = unpack_words(words.reshape(-1, across).T, self.bits).T - (1 << self.bits - 1)
        return entries[low - top : high - top].double()


def column_groups(part: Part, index: str, columns: int, groups: int) -> Tensor:
    """The group of each column; DataError if there is no such group."""
    found = part(index, 0, columns).long()
    if len(found) and not (int(found.min()) >= 0 and int(found.max()) < groups):
        raise DataError(
            f"{shown(index)} names groups {int(found.min())} to {int(found.max())}, but there are {groups}; "
            "the file is damaged, fetch it again"
        )
    return found


@dataclass(frozen=True, slots=True)
class Scaled:
    """`(code − zero) · ∏ scales / ∏ divisors · factor`."""

    shape: tuple[int, ...]
    codes: Codes
    scales: tuple[Grid, ...]
    divisors: tuple[Grid, ...] = ()
    zero: Grid | None = None
    factor: float = 1.0
    others: tuple[str, ...] = ()
    """Stored tensors that go with the weight and say nothing about its values."""

    @property
    def grids(self) -> tuple[Grid, ...]:
        return (*self.scales, *self.divisors, *((self.zero,) if self.zero else ()))

    @property
    def parts(self) -> tuple[str, ...]:
        indexes = [g.index for g in self.grids if g.index]
        return tuple(dict.fromkeys((self.codes.name, *(g.name for g in self.grids), *indexes, *self.others)))

    @property
    def grain(self) -> int:
        return 1

    @property
    def scattered(self) -> bool:
        return False

    def values(self, part: Part, start: int, stop: int) -> Tensor:
        found = self.codes.read(part, start, stop)
        if self.zero:
            found = found - self.zero.at(part, start, stop)
        for scale in self.scales:
            found = found * scale.at(part, start, stop)
        for divisor in self.divisors:
            found = found / divisor.at(part, start, stop)
        return found * self.factor if self.factor != 1.0 else found


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of the last two dimensions; a vector is one column."""
    if len(shape) < 2:
        return (shape[0] if shape else 1), 1
    return shape[-2], shape[-1]


def block_of(
    weight: tuple[int, ...], entries: tuple[int, ...], stated: Iterable[tuple[int, int]]
) -> tuple[int, int] | None:
    """Rows and columns that one entry is for, such that the blocks cover the weight exactly."""
    rows, columns = _matrix(weight)
    whole = (max(rows, 1), max(columns, 1))
    if prod(entries) == 1 and prod(weight[:-2]) == 1:
        return whole
    choices = [*stated, whole, (1, whole[1]), _DEFAULT_BLOCK]
    runs = entries[-1] if len(entries) == len(weight) > 1 and entries[-2] == rows else 0
    if runs and columns % runs == 0:
        choices.append((1, columns // runs))
    for height, width in choices:
        grid = (*weight[:-2], -(-rows // height), -(-columns // width))
        short = next((n for n in (2, 1) if grid[-n:] == (1,) * n and entries == grid[:-n]), 0)
        if entries == grid or short:
            return height, width
    return None


def stated_blocks(quantisation: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Blocks that config.json speaks of: weight_block_size, or the groups of compressed-tensors."""
    groups = quantisation.get("config_groups")
    schemes = [g.get("weights") for g in groups.values() if isinstance(g, Mapping)] if isinstance(
        groups, Mapping) else []  # fmt: skip
    found: list[Any] = [quantisation.get("weight_block_size")]
    for scheme in schemes:
        if isinstance(scheme, Mapping):
            found += [scheme.get("block_structure"), [1, scheme.get("group_size")]]
    return [
        (pair[0], pair[1])
        for pair in found
        if isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n > 0 for n in pair)
    ]


def fitted(
    model: Checkpoint,
    weight: tuple[int, ...],
    called: str,
    name: str,
    stated: Sequence[tuple[int, int]],
    problems: list[str],
) -> Grid | None:
    """The grid of entries `name` over a weight, or None and a problem noted."""
    entries = model.info(name).shape
    block = block_of(weight, entries, stated)
    if block is None:
        problems.append(
            f"{shown(name)} of shape {list(entries)} does not fit {shown(called)} of shape {list(weight)}; "
            "state quantization_config.weight_block_size in config.json"
        )
        return None
    return Grid(name, weight, block)
