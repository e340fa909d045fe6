"""The largest entries of τ, the others dropped: θ̂ = θ0 + mask ⊙ τ, with τ rounded to 16 bits.

Exactly k entries are kept: those above the k-th magnitude, and of those equal to it the first. Both are found by
streaming selection, so no tensor is sorted or held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.checkpoints.dtypes import dtype_name, is_mergeable, parse_dtype, round_to
from weft.deltas.pair import BATCH, Pair, Part, Values
from weft.deltas.positions import BLOCK, Index, Places, block_count, cheapest, find, index_parts, positions_of
from weft.deltas.scheme import Encoder
from weft.errors import UsageError
from weft.methods.stats import Select, compared
from weft.methods.step import At


@dataclass(frozen=True, slots=True)
class Sparse:
    """`count` entries of τ. Parts: the positions' parts, and `value` [count] in the dtype `values`."""

    count: int
    index: Index
    values: str
    kind: ClassVar[str] = "sparse"

    def problem(self, info: TensorInfo) -> str | None:
        try:
            floating = is_mergeable(parse_dtype(self.values))
        except UsageError:
            floating = False
        if not floating or dtype_name(parse_dtype(self.values)) != self.values:
            return f"values of dtype {self.values!r}"
        return None if 1 <= self.count <= info.numel else f"{self.count} of {info.numel} elements"

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        found = index_parts(info.numel, self.count, self.index)
        return found | {"value": TensorInfo((self.count,), parse_dtype(self.values))}

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        values = base(start, stop, None).double().clone()
        at, number = find(part, info.numel, self.count, self.index, start, stop)
        values[at] += part("value", number, number + len(at)).double()
        return values

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        return 16 * count + 32 * min(count + 2 * BLOCK, info.numel)


@dataclass(frozen=True, slots=True)
class Largest:
    """Which entries are kept: |τ| > threshold, and the first `ties` of each block with |τ| = threshold."""

    threshold: float
    above: Tensor
    """int64 [blocks]"""
    ties: Tensor
    """int64 [blocks]"""

    @classmethod
    def of(cls, pair: Pair, k: int) -> Largest:
        """The k largest; fewer where fewer are not zero. Magnitudes are compared as float32."""
        threshold = kth_magnitude(pair, k)
        above, equal = _counts(pair, threshold)
        left = 0 if threshold == 0 else max(0, k - int(above.sum()))
        before = equal.cumsum(0) - equal
        return cls(threshold, above, (left - before).clamp(min=0).minimum(equal))

    @classmethod
    def over(cls, pair: Pair, threshold: float) -> Largest:
        """All whose magnitude is at least the threshold (but not zero)."""
        above, equal = _counts(pair, threshold)
        return cls(threshold, above, equal if threshold > 0 else torch.zeros_like(equal))

    @property
    def count(self) -> int:
        return int(self.above.sum() + self.ties.sum())

    def chosen(self, tau: Tensor, block: int) -> Tensor:
        """Which entries are kept; `tau` begins with that block."""
        magnitude = compared(tau)
        kept = magnitude > self.threshold
        equal = (magnitude == self.threshold) & (self.ties.sum() > 0)
        for i in range(block_count(len(tau))):
            tied = equal[i * BLOCK : (i + 1) * BLOCK].nonzero().reshape(-1)
            kept[i * BLOCK + tied[: int(self.ties[block + i])]] = True
        return kept

    def scheme(self, numel: int, values: torch.dtype) -> Sparse:
        return Sparse(self.count, cheapest(numel, self.count)[0], dtype_name(values))


def kth_magnitude(pair: Pair, k: int) -> float:
    """The k-th largest |τ|, exactly, in two counting passes; 0 past the end."""
    select, memo = Select("threshold", lambda params, models, numel: [[k]]), None
    at = At(pair.name, pair.info.shape)
    for _ in range(select.rounds()):
        total: Any = None
        for a, b in pair.cuts():
            part = select.partial(pair.delta(a, b)[None], memo, {}, at)
            total = part if total is None else select.join([total, part])
        assert total is not None
        memo = select.combine(total, memo, {}, pair.info.numel)
    return float(select.result(memo, {})["threshold"][0, 0])


def _counts(pair: Pair, threshold: float) -> tuple[Tensor, Tensor]:
    """Entries above and at the threshold, by block."""
    above, equal = torch.zeros(2, block_count(pair.info.numel), dtype=torch.int64)
    for a, b in pair.cuts(BLOCK):
        magnitude = compared(pair.delta(a, b))
        blocks = slice(a // BLOCK, a // BLOCK + block_count(b - a))
        above[blocks] = positions_of(magnitude > threshold)
        equal[blocks] = positions_of(magnitude == threshold)
    return above, equal


class SparseEncoder(Encoder):
    """Positions and values of one tensor."""

    def __init__(self, pair: Pair, scheme: Sparse, largest: Largest) -> None:
        super().__init__(pair, scheme)
        self.largest, self.dtype = largest, parse_dtype(scheme.values)
        self.places = Places(pair.info.numel, largest.above + largest.ties, self._listed)

    def _listed(self, start: int, stop: int) -> Tensor:
        return self.largest.chosen(self.pair.delta(start, stop), start // BLOCK)

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        if part != "value":
            return self.places.encode(part, start, stop)
        places, found = self.places.listed(start, stop), []
        for block in torch.unique_consecutive(places // BATCH).tolist():
            low, high = block * BATCH, min((block + 1) * BATCH, self.pair.info.numel)
            a, b = torch.searchsorted(places, torch.tensor([low, high])).tolist()
            found.append(self.pair.delta(low, high)[places[a:b] - low])
        return round_to(torch.cat(found), self.dtype) if found else torch.empty(0, dtype=self.dtype)
