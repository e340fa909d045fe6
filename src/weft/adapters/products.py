"""Updates expanded row by row, merged entry by entry, and factored again: the one way that is not exact.

Trimming or dropping entries of ΔW = BA itself (rather than of A and B) makes a matrix M of full rank. Rows are
expanded where they are read, merged, and used at once. Where the shorter side of M has at most 4096 entries, it
is factored by its Gram matrix: the best approximation of the rank, to √eps. Beyond, by a random sketch with power
iterations: nearly the best. What is lost is measured in both cases, not estimated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from weft.adapters.difference import Difference
from weft.adapters.factors import Adapter, Factors
from weft.adapters.lowrank import finite, kept_rank
from weft.adapters.together import scales
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.ranges import element_range

GRAM = 4096
"""The longest side for which a Gram matrix is formed: 128 MiB of float64."""


class Deltas(Checkpoint):
    """The updates of an adapter as a checkpoint of dense matrices in the base's shapes, expanded when read.

    `shapes` names all weights; those that the adapter lacks are zeros.
    """

    def __init__(self, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.adapter, self.origin = adapter, adapter.origin
        self._tensors = {n: TensorInfo(tuple(s), torch.float64) for n, s in shapes.items()}
        self._start()

    def _start(self) -> None:
        self._factors = lru_cache(maxsize=2)(self._read)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_factors"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def _read(self, name: str) -> tuple[Tensor, Tensor]:
        """Two factors whose product is ΔW as the base stores it, kernels flattened."""
        made = finite(self.adapter.factors(name), name, self.origin)
        return (made.a.T, made.b.T) if made.transposed else (made.b, made.a)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.adapter.lora.weights,)

    def grain(self, name: str) -> int:
        shape = self.info(name).shape
        return max(prod(shape[1:]), 1)

    def bytes_read(self, name: str) -> int:
        if name not in self.adapter.names:
            return 0
        return 8 * self.adapter.rank(name) * sum(_matrix(self.info(name).shape))

    def working_bytes(self, name: str, count: int) -> int:
        return 2 * self.bytes_read(name) + 16 * count

    def ready(self, name: str) -> None:
        """Nothing: factors are read as they are."""

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info, row = self.info(name), self.grain(name)
        start, stop = element_range(name, info, start, stop, row)
        if name not in self.adapter.names:
            values = torch.zeros(stop - start, dtype=torch.float64)
        else:
            left, right = self._factors(name)
            values = (left[start // row : -(-stop // row)] @ right).reshape(-1)
        return values if dtype is None else round_to(values, dtype)

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{scales(self.adapter)}{inner}"


class Zeros(Checkpoint):
    """What updates are differences from: zeros in the shapes of `like`, whose sources it names as its own."""

    def __init__(self, like: Checkpoint) -> None:
        self.like, self.origin = like, like.origin

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.like.tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.like.inputs

    def ready(self, name: str) -> None:
        """Nothing is read."""

    def bytes_read(self, name: str) -> int:
        return 0

    def working_bytes(self, name: str, count: int) -> int:
        return 8 * count

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        start, stop = element_range(name, self.info(name), start, stop)
        return torch.zeros(stop - start, dtype=dtype or torch.float64)


def factor_product(
    merged: Checkpoint, name: str, *, transposed: bool, rank: int, energy: float | None = None
) -> tuple[Factors, float]:
    """One tensor of a merge of `Deltas` as factors of at most a rank, and ‖M − BA‖ / ‖M‖, measured."""
    shape = merged.info(name).shape
    product = Difference(merged, Zeros(merged), name)
    if min(product.rows, product.columns) <= GRAM:
        if energy is not None:
            rank = kept_rank(product.spectrum(), rank=rank, energy=energy)
        made = product.best(rank)
    else:
        made, spectrum = product.sketched(rank, seed=0)
        if energy is not None and made.norm:
            kept = (spectrum[:rank].square().cumsum(0) / made.norm**2).tolist()
            enough = 1 + sum(k < energy for k in kept)
            made = product.sketched(min(rank, enough), seed=0)[0]
    b, a = (made.right.T, made.left.T) if transposed else (made.left, made.right)
    return Factors(b, a, shape, transposed), made.error


def product_bytes(merged: Checkpoint, name: str) -> int:
    """An upper bound of what `factor_product` holds."""
    product = Difference(merged, Zeros(merged), name)
    small = min(product.rows, product.columns)
    reading = merged.working_bytes(name, max(product.columns, 1 << 20))
    return reading + product.working_bytes - 8 * 4 * max(small - GRAM, 0) * (small + GRAM)


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A weight's shape with its kernels flattened."""
    return shape[0], prod(shape[1:])
