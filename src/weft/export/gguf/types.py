"""GGUF's types: which tensor is stored as what, and values as blocks of codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range
from weft.errors import DataError, UsageError, did_you_mean

PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CODED = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
TYPES = ("auto", *PLAIN, *CODED)
_ALWAYS_F32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight")


@dataclass(frozen=True, slots=True)
class Stored:
    """How one tensor is stored: GGML's name of the type, and what its blocks hold."""

    type: str
    shape: tuple[int, ...]
    elements: int = 1
    """Values of a block."""
    nbytes: int = 0
    """Bytes of a block; 0 for plain types."""

    @property
    def info(self) -> TensorInfo:
        if self.type in PLAIN:
            return TensorInfo(self.shape, PLAIN[self.type])
        count = TensorInfo(self.shape, torch.uint8).numel
        return TensorInfo((count // self.elements * self.nbytes,), torch.uint8)


def choose_type(checkpoint: Checkpoint, type: str) -> str:
    """`auto` → what most of the checkpoint's values are stored as; UsageError for an unknown type."""
    if type not in TYPES:
        raise UsageError(f"there is no GGUF type {type!r} to write{did_you_mean(type, TYPES)}; "
                         f"choose from {', '.join(TYPES)}")  # fmt: skip
    if type != "auto":
        return type
    numbers = dict.fromkeys(PLAIN, 0)
    for info in checkpoint.tensors.values():
        name = next((n for n, d in PLAIN.items() if d == info.dtype), "f32")
        numbers[name] += info.numel
    return max(numbers, key=lambda n: numbers[n])


def stored_as(source: Checkpoint, type: str, notes: list[str]) -> dict[str, Stored]:
    """The type of every tensor.

    Vectors, norms, routers and positions stay float32. With codes of 4 or 5 bits the head (or the embedding,
    where it is the head) takes q8_0; rows that are no whole number of blocks are stored as f16.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    found = {}
    for name, info in source.tensors.items():
        chosen = type
        if len(info.shape) < 2 or name.endswith(_ALWAYS_F32):
            chosen = "f32"
        elif type in CODED:
            head = name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in source)
            chosen = "q8_0" if head else type
        if chosen in PLAIN:
            found[name] = Stored(chosen, info.shape)
            continue
        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[chosen.upper()]]
        if info.shape[-1] % elements:
            notes.append(f"{name}: stored as f16, since its rows of {info.shape[-1]} are no whole blocks")
            found[name] = Stored("f16", info.shape)
        else:
            found[name] = Stored(chosen, info.shape, elements, nbytes)
    return found


class Encoded(Derived):
    """A checkpoint in GGUF's types: plain numbers, or bytes of blocks under an uint8 shape."""

    def __init__(self, source: Checkpoint, stored: Mapping[str, Stored]) -> None:
        super().__init__(source)
        self.origin, self.stored = source.origin, dict(stored)
        self._tensors = {name: s.info for name, s in stored.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return {}

    @property
    def config(self) -> Mapping[str, Any] | None:
        return None  # it is in the file's head

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.stored}{inner}"

    def grain(self, name: str) -> int:
        stored, grain = self.stored[name], self.first.grain(name)
        if not stored.nbytes:
            return grain
        return min(lcm(grain, stored.elements) // stored.elements * stored.nbytes, self.info(name).numel)

    def _elements(self, name: str, position: int) -> int:
        """The element at which a byte's block begins."""
        stored = self.stored[name]
        return position // stored.nbytes * stored.elements if stored.nbytes else position

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        last = None if stop is None else self._elements(name, stop)
        self.first.prefetch(name, self._elements(name, start), last)

    def working_bytes(self, name: str, count: int) -> int:
        stored = self.stored[name]
        if not stored.nbytes:
            return self.first.working_bytes(name, count) + 8 * count
        elements = -(-count // stored.nbytes) * stored.elements
        # the package's numpy code makes several copies in float32 and float64
        return self.first.working_bytes(name, elements) + 64 * elements

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        stored, info = self.stored[name], self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        if stored.nbytes:
            return self._blocks(name, stored, start, stop)
        values = self.first.read(name, start, stop, dtype=info.dtype)
        if info.dtype == torch.float16 and bool(values.isinf().any()):
            raise DataError(
                f"{self.origin}: {name} holds values beyond float16's largest, 65504; write bf16 or f32 instead"
            )
        return values

    def _blocks(self, name: str, stored: Stored, start: int, stop: int) -> Tensor:
        from gguf import GGMLQuantizationType, quants

        if start == stop:
            return torch.empty(0, dtype=torch.uint8)
        first, last = self._elements(name, start), self._elements(name, stop)
        values = self.first.read(name, first, last, dtype=torch.float32)
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{self.origin}: {name} holds NaN or infinity, which {stored.type} cannot; write f32"
            )
        # as one row: blocks know nothing of rows, and the package works through few rows at a time
        blocks = quants.quantize(values.numpy().reshape(1, -1), GGMLQuantizationType[stored.type.upper()])
        return torch.from_numpy(np.ascontiguousarray(blocks).reshape(-1))
