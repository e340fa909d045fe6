"""Inputs larger than memory leave no trail in the page cache.

What is read of files that do not fit is pushed out by what is read after it. To find what to push out costs the
system more than the reading (here 0.24 s a GiB and up, against 0.15 with this), and the user's other files go with
it. So where the open files exceed half of the memory, ranges are given back some time after they were read; the
last eighth of the memory stays, since a second pass over a tensor follows soon on the first.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter, deque
from typing import Protocol

_PAGE = 1 << 12


class Source(Protocol):
    def forget(self, offset: int, length: int) -> None: ...


def memory() -> int:
    """Bytes of physical memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


class Trail:
    """The ranges that were read last, of all open files; the oldest are forgotten."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._files: Counter[tuple[int, int]] = Counter()
        self._sizes: dict[tuple[int, int], int] = {}
        self._open = 0  # bytes in open files
        self._ranges: deque[tuple[weakref.ref[Source], int, int]] = deque()
        self._kept = 0
        self._lock = threading.RLock()

    def opened(self, file: tuple[int, int], size: int) -> None:
        """A file, by device and inode, was opened."""
        with self._lock:
            self._files[file] += 1
            if self._files[file] == 1:
                self._sizes[file] = size
                self._open += size

    def closed(self, file: tuple[int, int]) -> None:
        with self._lock:
            self._files[file] -= 1
            if self._files[file] <= 0:
                del self._files[file]
                self._open -= self._sizes.pop(file, 0)

    def crowded(self) -> bool:
        """Whether the open files are more than half of the memory."""
        return 0 < self.total < 2 * self._open

    def read(self, source: Source, offset: int, length: int) -> None:
        """A range was read; forget those that were read longest ago."""
        if length < _PAGE or not self.crowded():
            return
        with self._lock:
            self._ranges.append((weakref.ref(source), offset, length))
            self._kept += length
            old = []
            while self._kept > self.total // 8:
                old.append(self._ranges.popleft())
                self._kept -= old[-1][2]
        for ref, start, size in old:
            if (behind := ref()) is not None:
                behind.forget(start, size)


TRAIL = Trail(memory())
