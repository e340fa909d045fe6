"""Threads for an analysis: the same ranges, sums and order as in one thread, hence the same digits."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from weft.checkpoints.execution import executing, execution
from weft.engine.pool import WorkPool

CHUNK = 1 << 16
"""Elements of one range: a dozen float64 copies of it fit in a core's cache, and many threads in memory."""


@contextmanager
def in_parallel(threads: int | None = None) -> Iterator[None]:
    """Within the block, analyses share their ranges among `threads` (one a core by default)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranges are shared among threads; nested ones would only contend
    try:
        with WorkPool(threads or os.cpu_count() or 1) as pool:
            chunk = min(execution().chunk, CHUNK)
            with executing(replace(execution(), map=pool.map, chunk=chunk)):
                yield
    finally:
        torch.set_num_threads(before)
