"""The plan of a save: what is read and written, how tensors are cut, what memory it takes. Moves no bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import DType
from weft.checkpoints.execution import TILE, ranges
from weft.engine.budget import show_size
from weft.engine.writer import Layout, lay_out
from weft.errors import DataProblems, UsageError
from weft.late import torch

MAX_CHUNK = 1 << 19
DEVICE_CHUNK = 1 << 22


@dataclass(frozen=True)
class Plan:
    """What a save will do."""

    checkpoint: Checkpoint
    tensors: Mapping[str, TensorInfo]
    """Output tensors with their output dtypes."""
    layout: Layout
    chunk: int
    threads: int
    memory: int
    device: str
    bytes_read: int
    bytes_written: int
    peak_memory: int
    """Upper bound of what all threads hold at once, the interpreter and torch excepted."""
    largest: int
    """What the most expensive range of all holds."""

    def ranges(self, name: str) -> list[tuple[int, int]]:
        return ranges(self.tensors[name].numel, self.checkpoint.grain(name), self.chunk)

    @property
    def crowded(self) -> bool:
        """True where not every thread can hold its largest range at once, so that some have to wait."""
        return self.threads * self.largest > self.memory

    def cost(self, name: str, count: int) -> int:
        """Bytes held while a range is computed and written."""
        return self.checkpoint.working_bytes(name, count) + count * self.tensors[name].kind.itemsize

    def describe(self) -> dict[str, object]:
        """The plan as plain data, for `--dry-run` and the log."""
        return {
            "tensors": len(self.tensors),
            "parameters": sum(i.numel for i in self.tensors.values()),
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "files": dict(self.layout.sizes),
            "threads": self.threads,
            "device": self.device,
            "memory": self.memory,
            "peak_memory": self.peak_memory,
            "chunk_elements": self.chunk,
            "dtypes": sorted({i.kind.name for i in self.tensors.values()}),
        }


def make_plan(
    checkpoint: Checkpoint,
    *,
    threads: int,
    memory: int,
    device: str = "cpu",
    dtype: torch.dtype | DType | str | None = None,
    shard_bytes: int = 5 * 10**9,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
    layout: Layout | None = None,
) -> Plan:
    """Lay out the output and cut the work so that it fits the memory; DataProblems lists what cannot.

    It is laid out as safetensors unless a `layout` of another format is given.
    """
    where = parse_device(device)
    tensors = {
        n: TensorInfo(i.shape, dtype) if dtype is not None and i.kind.mergeable else i
        for n, i in checkpoint.tensors.items()
    }
    if not tensors:
        raise UsageError(f"{checkpoint.origin} has no tensors to write")
    if threads < 1:
        raise UsageError(f"cannot work on {threads} threads: give at least 1")
    # tied names go where safetensors.torch.save_model puts them, so that load_model finds them
    if layout is None:
        layout = lay_out(tensors, shard_bytes, metadata or {"format": "pt", **checkpoint.aliases}, stem)
    chunk = MAX_CHUNK if where == "cpu" else DEVICE_CHUNK
    # tensors that are needed whole don't get smaller with the chunk, so they have no say in it
    while chunk > TILE and threads * _range_cost(checkpoint, tensors, chunk, whole=False) > memory:
        chunk //= 2
    too_large = []
    for name, info in tensors.items():
        cuts = ranges(info.numel, checkpoint.grain(name), chunk)
        longest = max((b - a for a, b in cuts), default=0)
        need = checkpoint.working_bytes(name, longest) + longest * info.kind.itemsize
        if need > memory:
            whole = "whole" if longest == info.numel else f"{longest:,} elements at a time"
            too_large.append(f"{name} {list(info.shape)} is needed {whole}: {show_size(need)}")
    if too_large:
        raise DataProblems(
            f"{show_size(memory)} of memory is not enough for this merge: raise --memory or choose a method "
            f"that streams",
            too_large,
        )
    largest = _range_cost(checkpoint, tensors, chunk, whole=True)
    return Plan(
        checkpoint, tensors, layout, chunk, threads, memory, where,
        bytes_read=sum(checkpoint.bytes_read(n) for n in tensors),
        bytes_written=layout.total, peak_memory=min(memory, threads * largest), largest=largest,
    )  # fmt: skip


def _range_cost(checkpoint: Checkpoint, tensors: Mapping[str, TensorInfo], chunk: int, whole: bool) -> int:
    """The most that one range takes, over all tensors (or only those that may be cut)."""
    cost = 0
    for name, info in tensors.items():
        grain = checkpoint.grain(name)
        if not whole and 1 < info.numel <= grain:
            continue
        n = max((b - a for a, b in ranges(info.numel, grain, chunk)), default=0)
        cost = max(cost, checkpoint.working_bytes(name, n) + n * info.kind.itemsize)
    return cost


def parse_device(device: str) -> str:
    """`"cpu"`, `"cuda"`, `"cuda:1"` as torch writes it; UsageError if it is not there."""
    if device == "cpu":
        return device  # whose looks torch need not be asked for
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UsageError(f"{device!r} is no device: use cpu, cuda or cuda:1") from None
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"{device!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    if where.type not in ("cpu", "cuda"):
        raise UsageError(f"{device!r} is not supported: use cpu, cuda or cuda:1")
    return str(where)
