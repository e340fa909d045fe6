"""Bytes by range, from a local file: what every file format is read through.

No mmap: a mapped file that is truncated while we read it is a SIGBUS, which no program survives. One
descriptor is opened, checked and kept, so the file that was validated is the file that is read.
"""

from __future__ import annotations

import os
import stat
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from weft.checkpoints.trail import TRAIL
from weft.errors import DataError, UnsafeFile

_CALL = 1 << 30  # Linux moves at most 2 GiB a call
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
    | getattr(os, "O_NONBLOCK", 0)  # opening a FIFO must not wait for a writer
)


class ByteSource(ABC):
    """A named run of `size` bytes, read by range from any thread."""

    name: str
    size: int
    sha256: str | None = None
    """In hex, where whoever keeps the file says it."""

    @abstractmethod
    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (writable bytes) from `offset`. DataError if that cannot be done in full."""

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        made = bytearray(length)
        if length:
            self.read_into(memoryview(made), offset)
        return bytes(made)

    def prefetch(self, offset: int, length: int) -> None:  # noqa: B027 - a hint may be ignored
        """Hint that a range will be read soon. Returns at once; may do nothing."""

    @property
    def path(self) -> Path | None:
        """The local file, where there is one."""
        return None


class LocalSource(ByteSource):
    """One regular file, through one descriptor."""

    def __init__(self, path: Path | str, *, follow: bool = True) -> None:
        self._path = Path(path)
        self.name = str(path)
        flags = _FLAGS | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        try:
            self._fd = _open(self._path, flags)
        except IsADirectoryError:
            raise DataError(f"{self.name} is a folder where a file is needed") from None
        except OSError as error:
            raise DataError(f"{self.name} cannot be opened: {error.strerror}") from None
        self._close = weakref.finalize(self, os.close, self._fd)
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            self._close()
            raise UnsafeFile("not-regular", f"{self.name} is not a regular file; pass a file")
        self.size = status.st_size
        self._version = (status.st_size, status.st_mtime_ns)
        file = (status.st_dev, status.st_ino)
        TRAIL.opened(file, self.size)
        weakref.finalize(self, TRAIL.closed, file)
        self._seeking = threading.Lock()

    @property
    def path(self) -> Path | None:
        return self._path

    def read_into(self, buffer: memoryview, offset: int) -> None:
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _CALL]
            try:
                count = self._fill(part, offset + done)
            except OSError as error:
                raise DataError(f"{self.name} cannot be read: {error.strerror}") from None
            if count == 0:
                raise self._changed()
            done += count
        status = os.fstat(self._fd)
        if (status.st_size, status.st_mtime_ns) != self._version:
            raise self._changed()
        TRAIL.read(self, offset, done)

    def forget(self, offset: int, length: int) -> None:
        """Let the system take a range out of the page cache."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def prefetch(self, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise") and length > 0:
            os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self._path, self.name, self._version)

    def _fill(self, part: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [part], offset)
        with self._seeking:  # Windows has neither preadv nor pread
            os.lseek(self._fd, offset, os.SEEK_SET)
            data = os.read(self._fd, len(part))
        part[: len(data)] = data
        return len(data)

    def _changed(self) -> DataError:
        return DataError(
            f"{self.name}: the file changed while being read; let whatever writes it finish and start again"
        )


def _reopened(path: Path, name: str, version: tuple[int, int]) -> LocalSource:
    """The same file in another process; DataError if it is not the same any more."""
    source = LocalSource(path)
    source.name = name
    if source._version != version:
        raise source._changed()
    return source


class MemorySource(ByteSource):
    """Bytes that are already here, under the name they came by."""

    def __init__(self, name: str, data: bytes) -> None:
        self.name, self._data, self.size = name, data, len(data)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        part = self._data[offset : offset + len(buffer)]
        if len(part) != len(buffer):
            raise DataError(f"{self.name} ends before byte {offset + len(buffer)}; fetch it again")
        buffer[:] = part


def _open(path: Path, flags: int) -> int:
    """os.open that lifts the soft limit on open files once: a large model has hundreds of shards."""
    import errno

    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return os.open(path, flags)
