"""gpt-oss: the experts' weights as MXFP4 blocks (OCP Microscaling Formats, arXiv 2310.10537), transposed.

`x_blocks` `[E, R, G, 16]` holds, for each expert and row, G blocks of 32 4-bit floats, two in a byte, the
first in the low half; `x_scales` `[E, R, G]` their exponents, biased by 127. The plain checkpoint has `x`
`[E, 32·G, R]`:

    x[e, 32·g + k, r] = code[e, r, g, k] · 2^(scale[e, r, g] − 127)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.quantised.node import Part
from weft.checkpoints.quantised.packing import e2m1, unpack_nibbles
from weft.late import Tensor, torch

_BLOCK = 32


@dataclass(frozen=True, slots=True)
class ExpertBlocks:
    """The weights of all experts of a layer."""

    name: str
    size: tuple[int, int, int]
    """(E, R, G)."""

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.size[0], _BLOCK * self.size[2], self.size[1]

    @property
    def parts(self) -> tuple[str, ...]:
        return f"{self.name}_blocks", f"{self.name}_scales"

    @property
    def grain(self) -> int:
        return 1

    @property
    def scattered(self) -> bool:
        return True

    def values(self, part: Part, start: int, stop: int) -> Tensor:
        _, rows, groups = self.size
        expert = rows * groups * _BLOCK
        found = []
        for e in range(start // expert, -(-stop // expert)):
            low, high = max(start - e * expert, 0), min(stop - e * expert, expert)
            found.append(self._expert(part, e, low, high))
        return torch.cat(found)

    def _expert(self, part: Part, e: int, start: int, stop: int) -> Tensor:
        """A range of one expert's `[32·G, R]`: of the blocks, only those whose columns it touches."""
        _, rows, groups = self.size
        first, last = start // rows // _BLOCK, -(-stop // (rows * _BLOCK))
        one = rows * groups
        blocks = part(f"{self.name}_blocks", e * one * 16, (e + 1) * one * 16).reshape(rows, groups, 16)
        scales = part(f"{self.name}_scales", e * one, (e + 1) * one).reshape(rows, groups)
        codes = e2m1(unpack_nibbles(blocks[:, first:last], low_first=True))
        factors = scales[:, first:last].contiguous().view(torch.float8_e8m0fnu).double()
        values = (codes * factors[:, :, None]).reshape(rows, -1).T.reshape(-1)
        begin = first * _BLOCK * rows
        return values[start - begin : stop - begin]


def find_experts(model: Checkpoint, problems: list[str]) -> dict[str, ExpertBlocks]:
    """Every `x_blocks` of bytes with its `x_scales`."""
    found = {}
    for stored, info in model.tensors.items():
        name = stored.removesuffix("_blocks")
        if name == stored or info.dtype != torch.uint8:
            continue
        scales = f"{name}_scales"
        if scales not in model:
            problems.append(f"{shown(stored)} has no {shown(scales)} beside it; fetch the file again")
            continue
        wanted = model.info(scales)
        fits = len(info.shape) == 4 and info.shape[-1] == 16 and info.shape[:-1] == wanted.shape
        if not fits or wanted.dtype != torch.uint8 or not prod(info.shape):
            problems.append(
                f"{shown(stored)} of shape {list(info.shape)} and {shown(scales)} of shape "
                f"{list(wanted.shape)} are no MXFP4 blocks; fetch the file again"
            )
            continue
        found[name] = ExpertBlocks(name, (info.shape[0], info.shape[1], info.shape[2]))
    return found
