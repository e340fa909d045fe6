"""A residual that is one vector for all experts, and a bit an entry for each: R = s · m ⊙ u (EMR, TALL masks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import byte_range, code_bytes, pack_bits, unpack_bits
from weft.deltas.pair import Part, Values


@dataclass(frozen=True, slots=True)
class Masked:
    """Parts: `mask` uint8 [⌈n / 8⌉], `scale` float32 [1]. What `decode` takes for the base is u."""

    kind: ClassVar[str] = "masked"

    def problem(self, info: TensorInfo) -> str | None:
        return None

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        return {
            "mask": TensorInfo((code_bytes(info.numel, 1),), torch.uint8),
            "scale": TensorInfo((1,), torch.float32),
        }

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        a, b, shift = byte_range(start, stop, 1)
        kept = unpack_bits(part("mask", a, b), 1, shift, stop - start)
        return base(start, stop, None).double() * kept * part("scale", 0, 1).double()

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        return 40 * count


def masked(mask: Tensor, scale: float) -> dict[str, Tensor]:
    """The parts of one mask, bool of any shape."""
    return {"mask": pack_bits(mask.reshape(-1).cpu(), 1), "scale": torch.tensor([scale])}
