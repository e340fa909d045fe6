"""Whole adapters in a common basis, as lazy checkpoints that any method of weft merges.

What a method needs of the whole model (TIES's and KnOTS's masks are over all layers at once) is gathered by the
same streaming first pass as for models; coordinates are small, so they are computed whenever they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from weft.adapters.spaces import BASES, Coordinates, Space, coordinate_shape
from weft.adapters.together import Together, scales
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.ranges import element_range


class Shared:
    """The coordinates of all adapters, weight by weight; the last few weights are kept."""

    def __init__(self, together: Together, space: Space) -> None:
        self.together, self.space = together, space
        self._start()

    def _start(self) -> None:
        self.at = lru_cache(maxsize=4)(self._compute)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "at"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _compute(self, name: str) -> Coordinates:
        return BASES[self.space](self.together.factors(name))

    def shape(self, name: str) -> tuple[int, int]:
        """Shape of one adapter's coordinates of a weight, without reading anything."""
        out, *rest = self.together.slots[name].dims
        return coordinate_shape(self.space, out, prod(rest), self.together.ranks(name))


class InBasis(Checkpoint):
    """One adapter of several, in the basis of all."""

    def __init__(self, shared: Shared, index: int) -> None:
        self.shared, self.index = shared, index
        self.origin = shared.together.adapters[index].origin
        self._tensors = {n: TensorInfo(shared.shape(n), torch.float64) for n in shared.together.slots}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.shared.together.adapters[self.index].lora.weights,)

    def ready(self, name: str) -> None:
        """Nothing: the basis is found when it is read."""

    def bytes_read(self, name: str) -> int:
        # all adapters are read at once for the basis; each node answers for its own
        together = self.shared.together
        return 4 * together.ranks(name)[self.index] * sum(_sides(together.slots[name].dims))

    def working_bytes(self, name: str, count: int) -> int:
        together = self.shared.together
        return 8 * 6 * sum(together.ranks(name)) * sum(_sides(together.slots[name].dims)) + 16 * count

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        start, stop = element_range(name, self.info(name), start, stop)
        values = self.shared.at(name).values[self.index].reshape(-1)[start:stop]
        return values if dtype is None else round_to(values, dtype)

    def identity(self) -> str | None:
        inner = super().identity()
        known = scales(self.shared.together.adapters[self.index])
        return inner and f"{self.shared.space}{known}{inner}"


def _sides(dims: tuple[int, ...]) -> tuple[int, int]:
    return dims[0], prod(dims[1:])
