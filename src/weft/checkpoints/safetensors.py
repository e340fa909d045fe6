"""safetensors files, by our own reading of the format.

The library accepts things a merge must not carry on: the same key twice, names that are paths, 2^62-long
empty dimensions, megabytes of metadata. What is accepted here is a subset of what it accepts. Values are
read by range straight into the tensor's memory, so a file of any size costs what is asked of it.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DTYPES, DType, round_to
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown, tensor_name_problem
from weft.checkpoints.ranges import element_range
from weft.checkpoints.sources import ByteSource, LocalSource
from weft.checkpoints.strictjson import parse_json
from weft.errors import UnsafeFile
from weft.late import Tensor, torch

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True, slots=True)
class Header:
    """Where each tensor lies: name → (info, absolute offset), in the order of the offsets."""

    entries: Mapping[str, tuple[TensorInfo, int]]
    metadata: Mapping[str, str]


def read_header(source: ByteSource, limits: Limits = DEFAULT_LIMITS) -> Header:
    """Parse and check everything that can be known without reading a value. Raises UnsafeFile."""
    where = source.name
    if source.size < 8:
        raise UnsafeFile("truncated", f"{where} has {source.size} bytes and no header; fetch it again")
    (length,) = struct.unpack("<Q", source.read(0, 8))
    if length > limits.header_bytes:
        raise UnsafeFile(
            "header-size",
            f"{where} announces a header of {length:,} bytes, over the limit of {limits.header_bytes:,}; "
            "it is no safetensors file, or needs a larger Limits.header_bytes",
        )
    if 8 + length > source.size:
        raise UnsafeFile("truncated", f"{where} ends inside its header; fetch it again")
    raw = source.read(8, length)
    if not raw.startswith(b"{"):
        raise UnsafeFile("header-json", f"{where} is no safetensors file: its header is not JSON")
    # counted before parsing, so that a header of millions of entries costs no millions of objects
    if raw.count(b'"data_offsets"') > limits.tensors:
        raise _too_many(where, limits)
    begin = 8 + length
    with _no_collection(len(raw)):
        parsed = parse_json(raw, f"{where}: the header", "header-json", depth=None, naturals=True)
        metadata = _metadata(parsed.pop("__metadata__", {}), where, limits)
        if len(parsed) > limits.tensors:
            raise _too_many(where, limits)
        laid = sorted(
            ((name, *_entry(name, entry, where, limits)) for name, entry in parsed.items()),
            key=lambda item: (item[2], item[3]),
        )
    _check_layout(laid, source.size - begin, where)
    return Header({name: (info, begin + first) for name, info, first, _ in laid}, metadata)


@contextmanager
def _no_collection(size: int) -> Iterator[None]:
    """A header of 200,000 tensors makes a million live objects, which collections walk again and again."""
    pause = size > 1 << 20 and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def _too_many(where: str, limits: Limits) -> UnsafeFile:
    return UnsafeFile(
        "too-many-tensors",
        f"{where} lists more than {limits.tensors:,} tensors; raise Limits.tensors if that is meant",
    )


def _metadata(found: Any, where: str, limits: Limits) -> Mapping[str, str]:
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UnsafeFile("metadata", f"{where}: __metadata__ must map text to text; write the file again")
    try:
        size = sum(len(k.encode()) + len(v.encode()) for k, v in found.items())
    except UnicodeEncodeError:
        raise UnsafeFile("metadata", f"{where}: __metadata__ is not Unicode; write it again") from None
    if size > limits.metadata_bytes:
        raise UnsafeFile(
            "metadata",
            f"{where} carries {size:,} bytes of metadata, over the limit of {limits.metadata_bytes:,}; "
            "remove it, or raise Limits.metadata_bytes",
        )
    return found


def _entry(name: str, entry: Any, where: str, limits: Limits) -> tuple[TensorInfo, int, int]:
    """Info, first and last byte (relative to the data) of one tensor."""
    problem = tensor_name_problem(name, limits)
    if problem:
        raise UnsafeFile(
            "tensor-name", f"{where}: the tensor name {shown(name)} {problem}; rename the tensor"
        )
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise UnsafeFile(
            "header-json",
            f"{where}: tensor {shown(name)} must have just dtype, shape and data_offsets; "
            "write the file again",
        )
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise UnsafeFile(
            "dtype",
            f"{where}: tensor {shown(name)} has dtype {shown(kind)}, which weft cannot read; "
            "dequantise or convert the checkpoint first",
        )
    nbytes = dtype.itemsize if type(shape) is list and len(shape) <= limits.rank else -1
    extent = 1
    for n in shape if nbytes > 0 else ():
        if type(n) is not int or not 0 <= n <= limits.dimension:
            nbytes = -1
            break
        nbytes *= n
        extent *= n or 1  # [0, 2^40, 2^40] is empty, yet its strides overflow
    if nbytes < 0 or extent >= 2**63:
        raise UnsafeFile(
            "shape",
            f"{where}: tensor {shown(name)} has the shape {shown(shape)}, which no tensor has; "
            "write the file again",
        )
    first, last = offsets if type(offsets) is list and len(offsets) == 2 else (None, None)
    if type(first) is not int or type(last) is not int or not 0 <= first <= last:
        raise UnsafeFile(
            "offsets",
            f"{where}: tensor {shown(name)} has no valid data_offsets; write the file again",
        )
    if nbytes != last - first:
        raise UnsafeFile(
            "shape",
            f"{where}: tensor {shown(name)} of shape {shown(shape)} needs {nbytes:,} bytes but the header "
            f"gives it {last - first:,}; write the file again",
        )
    return TensorInfo(tuple(shape), dtype), first, last


def _check_layout(laid: list[tuple[str, TensorInfo, int, int]], available: int, where: str) -> None:
    """The tensors must cover the data exactly: what nobody claims or two claim is where payloads hide."""
    end = 0
    for name, _, first, last in laid:
        if first < end:
            raise UnsafeFile(
                "overlap", f"{where}: tensor {shown(name)} overlaps another; write the file again"
            )
        if first > end:
            raise UnsafeFile(
                "hole",
                f"{where}: {first - end:,} bytes before tensor {shown(name)} belong to no tensor; "
                "write the file again",
            )
        end = last
    if end > available:
        raise UnsafeFile(
            "truncated",
            f"{where} is {end - available:,} bytes shorter than its header says; fetch it again",
        )
    if end < available:
        raise UnsafeFile(
            "trailing-bytes",
            f"{where} has {available - end:,} bytes after its last tensor; write the file again",
        )


class SafetensorsFile(Checkpoint):
    """One .safetensors file."""

    def __init__(self, source: ByteSource | Path | str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._source = source if isinstance(source, ByteSource) else LocalSource(source)
        self.origin = self._source.name
        header = read_header(self._source, limits)
        self.metadata = header.metadata
        self._tensors = {name: info for name, (info, _) in header.entries.items()}
        self._offsets = {name: offset for name, (_, offset) in header.entries.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        values = self.bits(name, start, stop).tensor()
        return values if dtype is None else round_to(values, dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        info = self.info(name)
        if dtype is not None and dtype != info.kind:
            return super().bits(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop)
        values = Bits.empty(stop - start, info.kind)
        if stop > start:
            self._source.read_into(values.memory, self._offsets[name] + start * info.kind.itemsize)
        return values

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop)
        width = info.kind.itemsize
        self._source.prefetch(self._offsets[name] + start * width, (stop - start) * width)

    def at_hand(self, name: str) -> bool:
        return self._source.path is not None

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return (weight_file(self._source),)


def weight_file(source: ByteSource) -> WeightFile:
    """How the manifest records a source; only local files can be hashed without reading them twice."""
    path, stated = source.path, source.sha256
    if stated is not None:
        return WeightFile(source.name, source.size, lambda: stated)
    if path is None:
        return WeightFile(source.name, source.size)

    def digest() -> str:
        from weft.checkpoints.digests import sha256_of

        return sha256_of(path)

    return WeightFile(source.name, source.size, digest)
