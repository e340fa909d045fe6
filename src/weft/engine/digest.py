"""sha256 of output files, computed behind the writers' front while the bytes are still in the page cache."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path

from weft.checkpoints.base import TensorInfo
from weft.engine.writer import Layout
from weft.errors import DataError

_BLOCK = 1 << 20


class RunningDigest:
    """The digest of one file. `finished` marks a tensor as written; whoever can hashes up to the next gap."""

    def __init__(self, path: Path, layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
        self.path = path
        size, header = layout.sizes[path.name], len(layout.headers[path.name])
        mine = {n: p.offset for n, p in layout.places.items() if p.file == path.name}
        # segments in file order: the header, then each tensor; empty tensors share an offset with the next
        self._ends = [header] + [o + tensors[n].nbytes for n, o in sorted(mine.items(), key=lambda i: i[1])]
        self._ends[-1] = size  # a format may pad its last tensor
        self._index = {n: i for i, n in enumerate(sorted(mine, key=lambda n: mine[n]), 1)}
        self._written = [True] + [False] * len(mine)
        self._front = 0
        self._offset, self._size = 0, size
        self._hash = hashlib.sha256()
        self._busy = threading.Lock()

    def finished(self, name: str) -> None:
        """A tensor of this file is written: hash as far as there is no gap, unless someone does already."""
        self._written[self._index[name]] = True
        self._advance(blocking=False)

    def hexdigest(self) -> str:
        """The digest of the whole file; everything must be written."""
        self._written = [True] * len(self._written)
        self._advance(blocking=True)
        return self._hash.hexdigest()

    def _advance(self, blocking: bool) -> None:
        if not self._busy.acquire(blocking=blocking):
            return
        try:
            with open(self.path, "rb", buffering=0) as f:
                while self._front < len(self._ends) and self._written[self._front]:
                    self._hash_to(f.fileno(), self._ends[self._front])
                    self._front += 1
        except OSError as error:
            raise DataError(f"{self.path} cannot be read back: {error.strerror}") from None
        finally:
            self._busy.release()

    def _hash_to(self, fd: int, end: int) -> None:
        buffer = bytearray(_BLOCK)
        while self._offset < end:
            view = memoryview(buffer)[: min(_BLOCK, end - self._offset)]
            got = os.preadv(fd, [view], self._offset)
            if got <= 0:
                raise DataError(f"{self.path} was cut short while weft wrote it; run the command again")
            self._hash.update(view[:got])
            self._offset += got
