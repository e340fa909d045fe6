"""The memory budget: bytes that work in flight may hold, acquired before the work begins."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from weft.errors import UsageError

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40,
          "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}  # fmt: skip

TIGHT = 512 << 20
"""Budgets below this feel what the C library's allocator keeps for itself."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def parse_size(text: str | int) -> int:
    """`"2GiB"`, `"500MB"`, `"4g"`, 1024 → bytes. Raises UsageError."""
    if isinstance(text, int):
        if isinstance(text, bool) or text < 0:
            raise UsageError(f"{text!r} is no size: write it like 2GiB, 500MB or 1073741824")
        return text
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not found or found[2].lower() not in _UNITS:
        raise UsageError(f"{text!r} is no size: write it like 2GiB, 500MB or 1073741824")
    return int(float(found[1]) * _UNITS[found[2].lower()])


def show_size(n: float) -> str:
    """1610612736 → `"1.5 GiB"`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError


def default_memory() -> int:
    """A quarter of what this process may have, between 1 and 16 GiB, but never more than half of it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" where there is none
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(max(there // 4, 1 << 30), 16 << 30, there // 2)


def keep_freed() -> None:
    """Has the C library keep what ranges free for the ranges that follow.

    By default it gives blocks of their size back and asks the system for others, which clears every page
    of them: half as much work again as to read the values. Under a small budget see `Frugal`.
    """
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it accepts
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def give_back(moved: int) -> None:
    """Has the C library give back what a save of `moved` bytes freed, and keep no more than it would by itself."""
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        if moved > 64 << 20:  # what less leaves behind is not worth going through the heap
            libc.malloc_trim(0)


def _glibc() -> Any:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows takes no None
        libc = ctypes.CDLL(None)
        if hasattr(libc, "gnu_get_libc_version"):
            return libc
    return None


class Frugal:
    """Has the C library give memory back that nobody uses, which it would rather keep.

    It learns to keep blocks as large as any that was freed (up to 32 MiB, for each thread), and what a first pass
    finds of each range lies between freed blocks, which then cannot be joined. Both are faster than to ask
    the system each time, but under a small budget they are more than the budget. Only glibc is known to need
    this; others are left alone.
    """

    EVERY = 8
    """Ranges between two tidyings: a few hundred KiB each."""

    def __init__(self, chunk: int) -> None:
        self._ranges = count(1)
        self._libc = _glibc()
        if self._libc is not None:
            # blocks longer than a range's float64 values go back when they are freed
            self._libc.mallopt(_M_MMAP_THRESHOLD, 8 * chunk + 4096)
            self._libc.mallopt(_M_TRIM_THRESHOLD, 8 * chunk)

    def tidy(self) -> None:
        if self._libc is not None:
            self._libc.malloc_trim(0)

    def map(self, plain: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        """A map over ranges that tidies up now and then."""

        def tidying(fn: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
            def one(item: Any) -> Any:
                found = fn(item)
                if next(self._ranges) % self.EVERY == 0:
                    self.tidy()
                return found

            return plain(one, items)

        return tidying


class Budget:
    """A counting lock over bytes. Work larger than the whole budget must be refused before it starts."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0
        self._freed = threading.Condition()

    def try_hold(self, nbytes: int) -> bool:
        """Hold `nbytes` if they are free now; to be given back by `free`."""
        with self._freed:
            if self.used + nbytes > self.total:
                return False
            self.used += nbytes
            self.peak = max(self.peak, self.used)
            return True

    def free(self, nbytes: int) -> None:
        with self._freed:
            self.used -= nbytes
            self._freed.notify_all()

    @contextmanager
    def holding(self, nbytes: int) -> Iterator[None]:
        """Hold `nbytes` for the block; waits until they are free."""
        assert nbytes <= self.total
        with self._freed:
            while self.used + nbytes > self.total:
                self._freed.wait()
            self.used += nbytes
            self.peak = max(self.peak, self.used)
        try:
            yield
        finally:
            self.free(nbytes)
