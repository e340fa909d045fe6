"""Normal numbers drawn from a counter, and `Noisy`: a checkpoint with such noise on its weights."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.methods.random import uniform_bits
from weft.methods.step import At


def normal(at: At, stream: int, n: int) -> Tensor:
    """`[n]` float64, normal with variance 1: Box and Muller's √(−2 ln u) cos 2πv of two uniform streams."""
    u, v = ((uniform_bits(at, 2 * stream + i, n).double() + 0.5) / 2**32 for i in (0, 1))
    return (-2 * u.log()).sqrt() * (2 * pi * v).cos()


class Noisy(Derived):
    """θ + σ·z with z normal and independent, keyed by seed, `stream`, tensor name and position.

    Computed in float64 and rounded once. Integer and bool tensors are carried.
    """

    def __init__(self, source: Checkpoint, scale: float, seed: int = 0, stream: int = 0) -> None:
        super().__init__(source)
        self.scale, self.seed, self.stream = scale, seed, stream
        self.origin = source.origin

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        if not is_mergeable(info.dtype):
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        at = At(f"noise/{name}", info.shape, start, self.seed)
        z = normal(at, self.stream, stop - start)
        values = self.first.read(name, start, stop).double() + self.scale * z
        return values if dtype is None else round_to(values, dtype)

    def working_bytes(self, name: str, count: int) -> int:
        return super().working_bytes(name, count) + 48 * count

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.scale},{self.seed},{self.stream}{inner}"
