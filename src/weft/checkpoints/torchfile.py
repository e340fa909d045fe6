"""torch's own files (.bin, .pt, .pth, .ckpt), read by range and without running any pickle.

The pickle inside is interpreted as data (`pickles.py`), which yields where each tensor lies in the file; the
values are then read like those of a safetensors file, so a remote one needs no download and a local one
no memory map. Both the zip format and the older stream of pickles are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.bits import Bits
from weft.checkpoints.containers import read_container
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown, tensor_name_problem
from weft.checkpoints.pickles import StoredTensor
from weft.checkpoints.ranges import element_range
from weft.checkpoints.safetensors import weight_file
from weft.checkpoints.sources import ByteSource, LocalSource
from weft.errors import DataError, UnsafeFile
from weft.late import Tensor, torch

_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
_DEPTH = 32


class TorchFile(Checkpoint):
    """One file written by torch.save: a state dict, alone or under "state_dict" or "model"."""

    def __init__(self, source: ByteSource | Path | str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._source = source if isinstance(source, ByteSource) else LocalSource(source)
        self.origin = self._source.name
        content, self._storages = read_container(self._source, limits)
        self.skipped: list[str] = []
        """Entries that are no tensors (epoch, optimizer …), by name."""
        self._views: dict[str, StoredTensor] = {}
        self._aliases: dict[str, str] = {}
        self._sort_out(content, limits)
        self._tensors = {n: TensorInfo(v.shape, v.dtype) for n, v in self._views.items()}

    def _sort_out(self, content: Any, limits: Limits) -> None:
        first: dict[StoredTensor, str] = {}
        for count, (name, value) in enumerate(_entries(content, self.skipped, self.origin)):
            if count >= limits.tensors:
                raise UnsafeFile(
                    "too-many-tensors",
                    f"{self.origin} holds more than {limits.tensors:,} entries; raise Limits.tensors "
                    "if that is meant",
                )
            if not isinstance(value, StoredTensor):
                self.skipped.append(name)
                continue
            problem = tensor_name_problem(name, limits)
            if problem:
                raise UnsafeFile(
                    "tensor-name", f"{self.origin}: the tensor name {shown(name)} {problem}; rename it"
                )
            self._check_view(name, value, limits)
            tied = first.setdefault(value, name) if 0 not in value.shape else name
            if name in self._views or name in self._aliases:
                raise UnsafeFile("duplicate-key", f"{self.origin}: two tensors are named {shown(name)}")
            if tied == name:
                self._views[name] = value
            else:
                self._aliases[name] = tied
        if not self._views:
            raise DataError(f"{self.origin} holds no tensors; it is no checkpoint of weights")

    def _check_view(self, name: str, view: StoredTensor, limits: Limits) -> None:
        """A tensor must lie inside its storage and may not show one element twice."""
        numel, reach = 1, view.offset
        for n, step in zip(view.shape, view.stride, strict=True):
            numel *= n
            reach += max(n - 1, 0) * step
        if len(view.shape) > limits.rank or any(n > limits.dimension for n in view.shape):
            raise UnsafeFile("shape", f"{self.origin}: tensor {shown(name)} has an impossible shape")
        held = min(self._storages[view.storage.key][1], view.storage.nbytes) if numel else 0
        width = view.dtype.itemsize
        if numel and (numel * width > held or (reach + 1) * width > held):
            raise UnsafeFile(
                "stride",
                f"{self.origin}: tensor {shown(name)} of {numel:,} elements shows more than the {held:,} "
                "bytes it is stored in; save a contiguous copy of it",
            )

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def grain(self, name: str) -> int:
        """A transposed or sliced tensor is read whole: its elements do not lie in order."""
        info = self.info(name)
        return 1 if _in_order(self._views[name]) else max(info.numel, 1)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        view = self._views[name]
        start, stop = element_range(name, info, start, stop, self.grain(name))
        if start == stop:
            values = torch.empty(0, dtype=info.dtype)
        elif _in_order(view):
            values = self._elements(view, view.offset + start, stop - start)
        else:
            reach = sum((n - 1) * step for n, step in zip(view.shape, view.stride, strict=True))
            span = self._elements(view, view.offset, reach + 1)
            values = torch.as_strided(span, view.shape, view.stride).reshape(-1)
        return values if dtype is None else round_to(values, dtype)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        info = self.info(name)
        view = self._views[name]
        if info.numel and _in_order(view):
            start, stop = element_range(name, info, start, stop)
            width = view.dtype.itemsize
            begin = self._storages[view.storage.key][0] + (view.offset + start) * width
            self._source.prefetch(begin, (stop - start) * width)

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (weight_file(self._source),)

    def _elements(self, view: StoredTensor, first: int, count: int) -> Tensor:
        values = torch.empty(count, dtype=view.dtype)
        begin = self._storages[view.storage.key][0] + first * view.dtype.itemsize
        self._source.read_into(Bits.of(values).memory, begin)
        return values


def _in_order(view: StoredTensor) -> bool:
    step = 1
    for n, stride in zip(reversed(view.shape), reversed(view.stride), strict=True):
        if n != 1 and stride != step:
            return False
        step *= n
    return True


def _entries(content: Any, skipped: list[str], where: str) -> Iterator[tuple[str, Any]]:
    """Name and value of every entry, out of its wrapper; nested dicts get dotted names."""
    if isinstance(content, StoredTensor):
        yield "tensor", content
        return
    prefix = ""
    while isinstance(content, dict) and not any(isinstance(v, StoredTensor) for v in content.values()):
        wrapper = next((w for w in _WRAPPERS if isinstance(content.get(w), dict)), None)
        if wrapper is None:
            break
        skipped += [f"{prefix}{key}" for key in content if key != wrapper]
        prefix += f"{wrapper}."
        content = content[wrapper]
        if prefix.count(".") > _DEPTH:
            raise UnsafeFile("pickle-opcode", f"{where} is nested too deeply; save a flat state dict")
    if not isinstance(content, dict):
        raise DataError(f"{where} holds no state dict but a {type(content).__name__}")
    yield from _flat(content, "", where, 0)


def _flat(content: dict[Any, Any], prefix: str, where: str, depth: int) -> Iterator[tuple[str, Any]]:
    # dicts may be shared or contain themselves, so depth is bounded here and the count by the caller
    if depth > _DEPTH:
        raise UnsafeFile("pickle-opcode", f"{where} is nested too deeply; save a flat state dict")
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.", where, depth + 1)
        else:
            yield name, value
