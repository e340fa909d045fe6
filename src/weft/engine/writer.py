"""Writing safetensors in place: the header first, the values into their places from any thread in any order.

The layout of every file follows from names, shapes and dtypes alone, so a file is created at its full size,
and each range of values is written where it belongs. The header's keys have a fixed order, so the same
contents are the same bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from weft.checkpoints.base import TensorInfo
from weft.checkpoints.bits import Bits
from weft.errors import DataError


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the file, and the offset of its first byte in it."""

    file: str
    offset: int


@dataclass(frozen=True)
class Layout:
    """All files of an output: their headers, sizes, and the place of every tensor."""

    headers: dict[str, bytes]
    sizes: dict[str, int]
    places: dict[str, Place]

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def lay_out(
    tensors: Mapping[str, TensorInfo],
    shard_bytes: int,
    metadata: Mapping[str, str],
    stem: str = "model",
) -> Layout:
    """Distribute tensors over files of at most `shard_bytes` (one larger tensor gets a file of its own)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += info.nbytes
    headers: dict[str, bytes] = {}
    sizes: dict[str, int] = {}
    places: dict[str, Place] = {}
    for i, names in enumerate(shards, 1):
        many = len(shards) > 1
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" if many else f"{stem}.safetensors"
        header, offsets, end = _header({n: tensors[n] for n in names}, metadata)
        headers[file], sizes[file] = header, len(header) + end
        places |= {n: Place(file, len(header) + o) for n, o in offsets.items()}
    return Layout(headers, sizes, places)


def _header(
    tensors: Mapping[str, TensorInfo], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """(length prefix and JSON header, offset of each tensor behind it, bytes of all tensors)."""
    # widest dtypes first keeps every tensor aligned without holes, which the format forbids
    order = sorted(tensors, key=lambda n: -tensors[n].kind.itemsize)
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets, end = {}, 0
    for name in order:
        info = tensors[name]
        if info.kind.code is None:
            raise DataError(
                f"safetensors has no dtype {info.kind}, which {name!r} has: leave it out or convert it"
            )
        offsets[name] = end
        entries[name] = {
            "dtype": info.kind.code,
            "shape": list(info.shape),
            "data_offsets": [end, end + info.nbytes],
        }
        end += info.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


SINGLE_FILES = (".safetensors", ".gguf")
"""Endings of an output that is one file, with its manifest beside it, rather than a folder."""


class PlacedFiles:
    """The open files of a layout under a folder, created at full size (or found so by a resumed run)."""

    def __init__(
        self, folder: Path, layout: Layout, files: Sequence[str] | None = None, *, create: bool = True
    ) -> None:
        self.folder, self.layout = folder, layout
        self._fds: dict[str, int] = {}
        self._turns: dict[str, threading.Lock] = {}
        try:
            for file in layout.sizes if files is None else files:
                self._fds[file] = self._open(file, create)
                self._turns[file] = threading.Lock()
        except BaseException:
            self.close()
            raise

    def _open(self, file: str, create: bool) -> int:
        path, size = self.folder / file, self.layout.sizes[file]
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if create else 0)
        try:
            fd = os.open(path, flags, 0o644)
        except OSError as error:
            raise disk_error(error, path, size) from None
        try:
            if os.fstat(fd).st_size != size:
                if not create:
                    raise DataError(f"{path} has not the size it was made with: is this storage shared?")
                # claims the blocks now, so that a full disk is found before the work and not after
                _claim(fd, size)
            if create:  # of a file found there too: whoever sized it may have been killed before this line
                write_at(fd, memoryview(self.layout.headers[file]), 0)
        except OSError as error:
            os.close(fd)
            raise disk_error(error, path, size) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write(self, name: str, start: int, values: Bits) -> None:
        """Write elements from flat position `start` on."""
        place = self.layout.places[name]
        path = self.folder / place.file
        try:
            # one at a time: the system lets one writer into a file, and the others would spin at its door
            with self._turns[place.file]:
                write_at(self._fds[place.file], values.memory, place.offset + start * values.dtype.itemsize)
        except OSError as error:
            raise disk_error(error, path, self.layout.sizes[place.file]) from None

    def settle(self, name: str, nbytes: int) -> None:
        """Have the system begin to write out a tensor that is complete, so that `sync` has less to wait for."""
        place = self.layout.places[name]
        write_out(self._fds[place.file], place.offset, nbytes)

    def sync(self) -> None:
        """Make what is written durable; a disk that fails late says so here."""
        for file, fd in self._fds.items():
            try:
                os.fsync(fd)
            except OSError as error:
                raise disk_error(error, self.folder / file, self.layout.sizes[file]) from None

    def close(self) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()


def _claim(fd: int, size: int) -> None:
    os.ftruncate(fd, 0)
    try:
        os.posix_fallocate(fd, 0, max(size, 1))
    except AttributeError:
        os.ftruncate(fd, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, size)


_SYNC_FILE_RANGE_WRITE = 2


@cache
def _sync_file_range() -> Any:
    """Linux's call of that name, which Python lacks; None elsewhere."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows takes no None
        call = ctypes.CDLL(None).sync_file_range
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
        return call
    return None


def write_out(fd: int, offset: int, length: int) -> None:
    """Begin to write a range out, and don't wait for it. Only a hint: what goes wrong, `fsync` says."""
    call = _sync_file_range()
    if call is not None and length:
        call(fd, offset, length, _SYNC_FILE_RANGE_WRITE)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """pwrite all of `data`."""
    while data:
        done = os.pwrite(fd, data, offset)
        data, offset = data[done:], offset + done


def disk_error(error: OSError, path: Path, size: int) -> DataError:
    """What the operating system said, as one sentence with a remedy."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DataError(
            f"{path}: no room for {size:,} bytes ({error.strerror}): free some space, then run the same "
            f"command again to go on from here; or choose another folder"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DataError(
            f"{path}: cannot be written ({error.strerror}): choose a folder that you may write to"
        )
    return DataError(f"{path}: {error.strerror}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is either whole or absent: temporary name, sync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as error:
        raise disk_error(error, path, len(data)) from None
