"""One bit an entry: θ̂ = θ0 + s · sign(τ) with s = mean |τ|, of the tensor, of each row or of a group.

BitDelta (Liu et al., NeurIPS 2024, arXiv:2402.10193) without its optional distillation: s = mean |τ| minimises
‖τ − s · sign(τ)‖, which is then √(1 − s²n / ‖τ‖²) · ‖τ‖. As there, sign(0) is taken as +1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import byte_range, code_bytes, pack_bits, unpack_bits
from weft.deltas.groups import group_count, mean_magnitudes, spread
from weft.deltas.pair import Part, Values
from weft.deltas.scheme import Encoder, code_batches, code_grain, joined


@dataclass(frozen=True, slots=True)
class Sign:
    """Parts: `sign` uint8 [⌈n / 8⌉] (1 for +), `scale` float32 [⌈n / group⌉]."""

    group: int
    kind: ClassVar[str] = "sign"

    def problem(self, info: TensorInfo) -> str | None:
        return None if 1 <= self.group <= info.numel else f"groups of {self.group} of {info.numel} elements"

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        return {
            "sign": TensorInfo((code_bytes(info.numel, 1),), torch.uint8),
            "scale": TensorInfo((group_count(info.numel, self.group),), torch.float32),
        }

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        a, b, shift = byte_range(start, stop, 1)
        sign = unpack_bits(part("sign", a, b), 1, shift, stop - start)
        scale = part("scale", start // self.group, (stop - 1) // self.group + 1).double()
        return base(start, stop, None).double() + spread(scale, self.group, start, stop) * (2 * sign - 1)

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        return 64 * count


class SignEncoder(Encoder):
    """Signs and scales of one tensor."""

    scheme: Sign

    def prepare(self) -> None:
        self.scale = mean_magnitudes(self.pair, self.scheme.group).float()

    def forget(self) -> None:
        self.scale = torch.empty(0)

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        if part == "scale":
            return self.scale[start:stop]
        cuts = code_batches(self.pair, 1, start, stop)
        return joined([pack_bits(self.pair.delta(a, b) >= 0, 1) for a, b in cuts], torch.uint8)

    def grain(self, part: str) -> int:
        return code_grain(self.pair, 1, code_bytes(self.pair.info.numel, 1)) if part == "sign" else 1
