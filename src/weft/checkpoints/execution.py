"""How lazy nodes carry out their work: range length, device, threads. Set by the engine, read by nodes.

A node that must stream over a tensor (a first pass, say) takes the length of its ranges and the way to map
over them from here, so that the graph knows nothing of threads, and the engine nothing of methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from math import lcm
from typing import Any, TypeVar

import torch

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
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    map: Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]] = map_here
    """Maps a function over ranges, in parallel where there are threads; results in order."""
    kernels: Any = None
    """Fused kernels (engine/kernels) or None; an optimisation that never changes what is computed."""
    surveyed: Callable[[int], None] = lambda nbytes: None
    """Told how many stored bytes a first pass has read, for the progress display."""


_CURRENT: ContextVar[Execution | None] = ContextVar("weft_execution", default=None)
_DEFAULT = Execution()


def execution() -> Execution:
    """The execution in force in this thread."""
    return _CURRENT.get() or _DEFAULT


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

    Where the least common multiple is many chunks long, the tensor is one range.
    """
    unit = lcm(max(grain, 1), TILE)
    length = numel if unit > 16 * chunk else -(-chunk // unit) * unit
    return [(a, min(a + length, numel)) for a in range(0, numel, max(length, 1))]
