"""Weights that are already in memory: a module, a state dict, one tensor or array.

They are held by reference and never written to. Two names are tied when they show the very same elements
in the same way; views that merely overlap (a fused weight and its parts) are tensors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.limits import shown, tensor_name_problem
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems, UsageError
from weft.late import Tensor, torch

SINGLE = "tensor"
"""The name a lone tensor or array gets."""


class StateDict(Checkpoint):
    """Named tensors in memory, on any device."""

    def __init__(
        self,
        source: torch.nn.Module | Mapping[str, Any] | Tensor | np.ndarray[Any, Any],
        origin: str | None = None,
    ) -> None:
        self.origin = origin or _called(source)
        self.skipped: list[str] = []
        """Entries that are no tensors (extra state, counters of a trainer), by name."""
        self._values: dict[str, Tensor] = {}
        self._aliases: dict[str, str] = {}
        first: dict[tuple[Any, ...], str] = {}
        problems = []
        for name, value in _items(source):
            problem = tensor_name_problem(name) if isinstance(name, str) else "is not text"
            tensor = _tensor(value)
            if problem is None and isinstance(tensor, str):
                problem = tensor
            if problem:
                problems.append(f"{shown(name)} {problem}")
            elif isinstance(tensor, Tensor):
                identity = _identity(tensor)
                tied = first.setdefault(identity, name) if identity else name
                if tied == name:
                    self._values[name] = tensor
                else:
                    self._aliases[name] = tied
            else:
                self.skipped.append(name)
        if problems:
            raise DataProblems(f"{self.origin} holds what weft cannot read", problems)
        self._tensors = {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in self._values.items()}
        self._turned = _turned(source)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def inputs_first(self, name: str) -> bool:
        return name in self._turned or super().inputs_first(name)

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop)
        values = flat_range(self._values[name], start, stop).cpu()
        values = values.resolve_conj().resolve_neg()
        return values if dtype is None else round_to(values, dtype)


def flat_range(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Elements `[start, stop)` of the flattened tensor, copying no more than the rows they lie in."""
    if tensor.is_contiguous() or tensor.dim() == 0:
        return tensor.reshape(-1)[start:stop]
    row = max(tensor[0].numel(), 1) if len(tensor) else 1
    top = start // row
    rows = tensor[top : -(-stop // row)].reshape(-1)
    return rows[start - top * row : stop - top * row]


def _called(source: object) -> str:
    return "state dict" if isinstance(source, Mapping) else type(source).__name__


def _turned(source: object) -> frozenset[str]:
    """The weights of a module's layers of transformers' class Conv1D, which are stored [in, out]."""
    if not isinstance(source, torch.nn.Module):
        return frozenset()
    layers = (n for n, m in source.named_modules() if type(m).__name__ == "Conv1D")
    return frozenset(f"{n}.weight" if n else "weight" for n in layers)


def _items(source: object) -> list[tuple[Any, Any]]:
    if isinstance(source, torch.nn.Module):
        return list(source.state_dict().items())
    if isinstance(source, Mapping):
        return list(source.items())
    if isinstance(source, Tensor | np.ndarray):
        return [(SINGLE, source)]
    raise UsageError(
        f"cannot load a {type(source).__name__}: pass a path, a Hub id, a URL, a module, a state dict, "
        "a tensor or a checkpoint"
    )


def _tensor(value: object) -> Tensor | str | None:
    """The value as a plain tensor; a sentence saying why it cannot be one; None if it is no array."""
    if isinstance(value, np.ndarray):
        try:
            # negative strides and read-only memory are beyond torch's sharing, so those are copied
            plain = value if value.flags.writeable and min(value.strides, default=0) >= 0 else value.copy()
            return torch.from_numpy(plain)
        except TypeError:
            return f"is an array of {value.dtype}, which torch does not have; convert it"
    if not isinstance(value, Tensor):
        return None
    if value.is_meta:
        return "is on the meta device and has no values; load the weights first"
    if value.layout != torch.strided or value.is_quantized:
        return f"is a {value.layout} or quantised tensor; make it dense first"
    if hasattr(value, "full_tensor"):
        return "is a distributed tensor; gather it with .full_tensor() first"
    return value.detach()


def _identity(tensor: Tensor) -> tuple[Any, ...] | None:
    """Equal for two tensors exactly when they show the same elements; None for empty ones."""
    if tensor.numel() == 0:
        return None
    return (
        tensor.device,
        tensor.dtype,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.is_conj(),
        tensor.is_neg(),
    )
