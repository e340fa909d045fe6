"""Tensors read in another order, or offset: how GGUF's elements follow from a checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.errors import DataError


class Change(Protocol):
    """How one tensor differs from its source."""

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The shape afterwards."""

    def unit(self, source: tuple[int, ...]) -> int:
        """Elements that must be read together."""

    def apply(self, values: Tensor, source: tuple[int, ...]) -> Tensor:
        """What a run of whole units becomes, flattened."""


@dataclass(frozen=True, slots=True)
class RotaryRows:
    """Rows of each head from [first halves, second halves] to pairs side by side.

    transformers rotates element i of a head with element i + d/2, llama.cpp's older graphs 2i with 2i + 1: row
    2i + j there is row j·d/2 + i here.
    """

    head: int

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        return source

    def unit(self, source: tuple[int, ...]) -> int:
        return self.head * prod(source[1:])

    def apply(self, values: Tensor, source: tuple[int, ...]) -> Tensor:
        heads = values.reshape(-1, 2, self.head // 2, prod(source[1:]))
        return heads.transpose(1, 2).reshape(-1)


@dataclass(frozen=True, slots=True)
class PlusOne:
    """1 + w."""

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        return source

    def unit(self, source: tuple[int, ...]) -> int:
        return 1

    def apply(self, values: Tensor, source: tuple[int, ...]) -> Tensor:
        return values.double() + 1.0


@dataclass(frozen=True, slots=True)
class Transposed:
    """`[in, out]` as `[out, in]`."""

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        return source[::-1]

    def unit(self, source: tuple[int, ...]) -> int:
        return prod(source)

    def apply(self, values: Tensor, source: tuple[int, ...]) -> Tensor:
        return values.reshape(source).T.reshape(-1)


class Changed(Derived):
    """A checkpoint some of whose tensors are changed."""

    def __init__(self, source: Checkpoint, changes: Mapping[str, Change]) -> None:
        super().__init__(source)
        self.origin, self._changes = source.origin, dict(changes)
        self._tensors = {
            n: TensorInfo(changes[n].shape(i.shape), i.dtype) if n in changes else i
            for n, i in source.tensors.items()
        }
        for name, change in self._changes.items():
            if source.info(name).numel % change.unit(source.info(name).shape):
                raise DataError(
                    f"{source.origin}: {name} of shape {list(source.info(name).shape)} does not consist of whole "
                    "heads of the size config.json states; correct head_dim or num_attention_heads"
                )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self._changes}{inner}"

    def grain(self, name: str) -> int:
        grain = self.first.grain(name)
        if name not in self._changes:
            return grain
        unit = self._changes[name].unit(self.first.info(name).shape)
        return unit if unit % grain == 0 else self.info(name).numel

    def working_bytes(self, name: str, count: int) -> int:
        return self.first.working_bytes(name, count) + (16 * count if name in self._changes else 0)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        change = self._changes.get(name)
        if change is None:
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, self.info(name), start, stop, self.grain(name))
        # a whole unit at a time, and all of a tensor at once where its source needs that
        values = change.apply(self.first.read(name, start, stop), self.first.info(name).shape)
        return values if dtype is None else round_to(values, dtype)
