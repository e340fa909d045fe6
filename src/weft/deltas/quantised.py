"""τ in b-bit codes: q = clamp(⌊τ/Δ⌉ + z, 0, 2^b − 1), τ̂ = Δ (q − z), for each group of neighbouring entries.

TVQ (Kim et al., ICCV 2025, arXiv:2503.06921): Δ = (max τ − min τ) / (2^b − 1), z = ⌊−min τ / Δ⌉, so |τ̂ − τ| ≤ Δ/2.
τ's range is much narrower than θ's, which is why so few bits suffice. The paper takes one group a tensor. The
range is widened to hold zero where it does not, so that what did not change stays as it was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import byte_range, code_bytes, pack_bits, unpack_bits
from weft.deltas.groups import extremes, group_count, spread
from weft.deltas.pair import Part, Values
from weft.deltas.scheme import Encoder, code_batches, code_grain, joined


@dataclass(frozen=True, slots=True)
class Quantised:
    """Parts: `codes` uint8 [⌈n·b / 8⌉], `step` float32 (Δ) and `zero` uint8 (z) [⌈n / group⌉]."""

    bits: int
    group: int
    kind: ClassVar[str] = "quantised"

    def problem(self, info: TensorInfo) -> str | None:
        if not 1 <= self.bits <= 8:
            return f"codes of {self.bits} bits"
        return None if 1 <= self.group <= info.numel else f"groups of {self.group} of {info.numel} elements"

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        groups = group_count(info.numel, self.group)
        return {
            "codes": TensorInfo((code_bytes(info.numel, self.bits),), torch.uint8),
            "step": TensorInfo((groups,), torch.float32),
            "zero": TensorInfo((groups,), torch.uint8),
        }

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        a, b, shift = byte_range(start, stop, self.bits)
        q = unpack_bits(part("codes", a, b), self.bits, shift, stop - start)
        first, last = start // self.group, (stop - 1) // self.group + 1
        step = spread(part("step", first, last).double(), self.group, start, stop)
        zero = spread(part("zero", first, last).to(torch.int64), self.group, start, stop)
        values: Tensor = base(start, stop, None).double() + step * (q - zero)
        return values

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        return (96 + 2 * self.bits) * count


class QuantisedEncoder(Encoder):
    """Codes, steps and zeros of one tensor."""

    scheme: Quantised
    step: Tensor
    zero: Tensor

    def prepare(self) -> None:
        low, high = extremes(self.pair, self.scheme.group)
        self.step = ((high - low) / (2**self.scheme.bits - 1)).float()
        self.zero = torch.where(self.step > 0, (-low / self.step.double()).round(), 0.0)
        self.zero.clamp_(0, 2**self.scheme.bits - 1)

    def forget(self) -> None:
        self.step = self.zero = torch.empty(0)

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        if part == "step":
            return self.step[start:stop]
        if part == "zero":
            return self.zero[start:stop].to(torch.uint8)
        cuts = code_batches(self.pair, self.scheme.bits, start, stop)
        return joined([self._codes(a, b) for a, b in cuts], torch.uint8)

    def _codes(self, start: int, stop: int) -> Tensor:
        group, bits = self.scheme.group, self.scheme.bits
        first, last = start // group, (stop - 1) // group + 1
        step = spread(self.step[first:last].double(), group, start, stop)
        zero = spread(self.zero[first:last], group, start, stop)
        q = torch.where(step > 0, (self.pair.delta(start, stop) / step).round(), 0.0) + zero
        codes: Tensor = q.clamp(0, 2**bits - 1)
        return pack_bits(codes, bits)

    def grain(self, part: str) -> int:
        bits = self.scheme.bits
        return code_grain(self.pair, bits, code_bytes(self.pair.info.numel, bits)) if part == "codes" else 1
