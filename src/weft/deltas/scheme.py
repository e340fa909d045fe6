"""What every way of storing a difference has in common: the scheme that a reader is told, and its encoder.

A `Scheme` is what `weft_delta.json` says of one tensor. From it and the tensor's shape and dtype follow the names,
shapes and dtypes of all stored parts, so the file can be held against it before a value is read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import period
from weft.deltas.pair import BATCH, Pair, Part, Values


class Scheme(Protocol):
    """How one tensor is stored."""

    kind: ClassVar[str]

    def problem(self, info: TensorInfo) -> str | None:
        """Why no tensor of this shape and dtype can be stored so, or None."""

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        """The stored parts."""

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        """θ̂ of a (not empty) flat range: in the storage dtype where it is exact, else float64."""

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        """Memory that decoding `count` elements takes, the base's own excepted."""


class Encoder(ABC):
    """Computes the parts of one tensor. `prepare` comes before the first read of any part."""

    def __init__(self, pair: Pair, scheme: Scheme) -> None:
        self.pair, self.scheme = pair, scheme

    def prepare(self) -> None:  # noqa: B027
        """Do the first pass that all parts need. Called once at a time."""

    def forget(self) -> None:  # noqa: B027
        """Drop what `prepare` found."""

    @abstractmethod
    def encode(self, part: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a part."""

    def grain(self, part: str) -> int:
        """Elements of a part that must be computed together."""
        return 1

    def bytes_read(self) -> int:
        """Stored bytes that computing a part reads."""
        return self.pair.bytes_read()

    def working_bytes(self, part: str, count: int) -> int:
        """Memory that `count` elements of a part take while they are computed."""
        return self.pair.working_bytes(count) + 32 * count


def code_grain(pair: Pair, bits: int, nbytes: int) -> int:
    """Bytes of a stream of codes that begin and end on whole codes; all where the models are read in one go."""
    return max(1, nbytes if pair.grain > BATCH else min(period(bits)[1], nbytes))


def code_batches(pair: Pair, bits: int, start: int, stop: int) -> list[tuple[int, int]]:
    """The ranges of elements whose codes fill the bytes [start, stop) of the stream."""
    codes, size = period(bits)
    low, high = start // size * codes, min(-(-stop // size) * codes, pair.info.numel)
    step = BATCH if pair.grain <= BATCH else high - low
    return [(a, min(a + step, high)) for a in range(low, high, step)]


def joined(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The parts end to end; nothing for none."""
    return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)
