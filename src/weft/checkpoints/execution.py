"""How lazy nodes carry out their work: range length, device, threads. Set by the engine, read by nodes.

A node that must stream over a tensor (a first pass, say) takes the length of its ranges and the way to map
over them from here, so that the graph knows nothing of threads, and the engine nothing of methods.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from math import lcm
from typing import Any, TypeVar

from weft.late import Tensor, torch

TILE = 1 << 14
"""Elements of one tile. Every range begins at a multiple, so that sums kept by tile don't depend on the cut."""

T = TypeVar("T")
R = TypeVar("R")


def map_here(fn: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Map in this thread, in order."""
    return [fn(item) for item in items]


@dataclass(frozen=True)
class Execution:
    """The present way of working."""

    chunk: int = 1 << 18
    """Elements of one range; a power of two not below the statistics' tile."""
    where: str = "cpu"
    """The device, as torch names it."""
    map: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]] = map_here
    """Maps a function over ranges, in parallel where there are threads; results in order."""
    kernels: Any = None
    """Fused kernels (engine/kernels) or None; an optimisation that never changes what is computed."""
    surveyed: Callable[[int], None] = lambda nbytes: None
    """Told how many stored bytes a first pass has read, for the progress display."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.where)


_CURRENT: ContextVar[Execution | None] = ContextVar("weft_execution", default=None)
_DEFAULT = Execution()


def execution() -> Execution:
    """The execution in force in this thread."""
    return _CURRENT.get() or _DEFAULT


_LOCAL = threading.local()


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a CUDA device, work on this thread's own stream, so that copies and kernels of threads overlap."""
    if device.type != "cuda":
        yield
        return
    streams = _LOCAL.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(streams[device]):
        yield


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Move a range to the device; through a pinned buffer, which the copy need not wait for, on CUDA."""
    if device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    pinned.copy_(values)
    return pinned.to(device, non_blocking=True)


@contextmanager
def executing(how: Execution) -> Iterator[Execution]:
    """Put an execution in force for the block."""
    token = _CURRENT.set(how)
    try:
        yield how
    finally:
        _CURRENT.reset(token)


def ranges(numel: int, grain: int, chunk: int) -> list[tuple[int, int]]:
    """Cut `[0, numel)` into ranges of about `chunk` elements that begin at multiples of grain and tile.

    They are longer than that where no shorter range does so.
    """
    unit = lcm(max(grain, 1), TILE)
    length = -(-chunk // unit) * unit
    return [(a, min(a + length, numel)) for a in range(0, numel, max(length, 1))]


def map_joined(
    how_map: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]],
    summarise: Callable[[Any], Any],
    cut: Sequence[Any],
    join: Callable[[Sequence[Any]], Any],
    ordered: bool,
) -> Any:
    """Summaries of all ranges as one. Counts are added up as they come, so that few are alive at a time."""
    if ordered:
        return join(how_map(summarise, cut))
    lock, running = threading.Lock(), list[Any]()

    def add(item: Any) -> None:
        part = summarise(item)
        with lock:
            running[:] = [join([running[0], part]) if running else part]

    how_map(add, cut)
    return running[0]
