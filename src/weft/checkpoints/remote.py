"""Bytes by range from http(s), s3 and whatever else fsspec knows; nothing is written to disk.

A read is cut into pieces that are fetched by a few threads, never more than a bounded number of bytes ahead
of what is asked for, so latency is hidden and memory stays small. A server that ignores ranges would send
the whole file for every tensor; such a file is held in memory if it is small and refused otherwise.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from weft.checkpoints.folders import Folder
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, check_file_name
from weft.checkpoints.sources import ByteSource, MemorySource
from weft.errors import DataError, MissingExtra, UsageError, WeftError

PIECE = 8 << 20
"""Bytes of one request: long enough to amortise its latency."""
AHEAD = 64 << 20
"""Bytes that one source may hold in flight."""
_WAITING = 64  # requests of one source in flight, however small
_TRIES = 4


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=8, thread_name_prefix="weft-fetch")


class RemoteSource(ByteSource):
    """One file at a URL."""

    def __init__(self, url: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.name = url
        fs, path = _filesystem(url)
        try:
            info = _retried(url, lambda: fs.info(path))
        except FileNotFoundError:
            raise DataError(f"{url} does not exist; check the address") from None
        size = info.get("size")
        if info.get("type") == "directory" or not isinstance(size, int):
            raise DataError(f"{url} does not say how long it is, so it cannot be read by range")
        self.size = size
        stated = getattr(info.get("lfs"), "sha256", None)  # the Hub tells it of its large files
        self.sha256 = stated if isinstance(stated, str) and len(stated) == 64 else None
        self._whole: MemorySource | None = None
        self._fetch = _retried(url, lambda: _range_reader(fs, path, size))
        self._limits, self._fs, self._fs_path = limits, fs, path
        self._lock = threading.Lock()
        self._flying: dict[tuple[int, int], Future[bytes]] = {}

    def read_into(self, buffer: memoryview, offset: int) -> None:
        if self._whole is not None:
            return self._whole.read_into(buffer, offset)
        done = 0
        while done < len(buffer):
            at = offset + done
            ready = self._take(at, len(buffer) - done)
            if ready is None:
                self._start(at, len(buffer) - done, evict=True)
                ready = self._take(at, len(buffer) - done)
            if ready is None:
                begin, data = at, self._get(at, min(PIECE, len(buffer) - done))
            else:
                begin, data = ready
            part = memoryview(data)[at - begin : at - begin + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)

    def prefetch(self, offset: int, length: int) -> None:
        if self._whole is None and length > 0:
            self._start(offset, length)

    def __reduce__(self) -> tuple[type[RemoteSource], tuple[str, Limits]]:
        return RemoteSource, (self.name, self._limits)

    def _start(self, offset: int, length: int, *, evict: bool = False) -> None:
        """Put the pieces of a range in flight, as far as the bounds allow.

        With `evict`, pieces that nobody came for make room: the oldest guess is the worst.
        """
        with self._lock:
            for at, size in _pieces(offset, length):
                if any(a <= at and at + size <= a + s for a, s in self._flying):
                    continue
                stale = [k for k, f in self._flying.items() if f.done()] if evict else []
                while not self._room(size) and stale:
                    del self._flying[stale.pop(0)]
                if not self._room(size):
                    return
                evict = False
                self._flying[at, size] = _pool().submit(self._get, at, size)

    def _room(self, size: int) -> bool:
        flying = sum(size for _, size in self._flying)
        return len(self._flying) < _WAITING and flying + size <= AHEAD

    def _take(self, at: int, length: int) -> tuple[int, bytes] | None:
        """The piece in flight that holds byte `at`. It is let go once its last byte is taken."""
        with self._lock:
            key = next((k for k in self._flying if k[0] <= at < k[0] + k[1]), None)
            if key is None:
                return None
            future = self._flying[key]
            if at + length >= sum(key) or (future.done() and future.exception()):
                del self._flying[key]
        return key[0], future.result()

    def _get(self, offset: int, length: int) -> bytes:
        try:
            data: bytes = _retried(self.name, lambda: self._fetch(offset, offset + length))
        except _NoRanges:
            return self._hold_whole().read(offset, length)
        except FileNotFoundError:
            raise DataError(f"{self.name} has gone while being read; start again") from None
        if len(data) != length:
            raise DataError(f"{self.name} sent {len(data)} of {length} bytes; try again later")
        return data

    def _hold_whole(self) -> MemorySource:
        with self._lock:
            if self._whole is not None:
                return self._whole
            if self.size > self._limits.whole_remote_bytes:
                raise DataError(
                    f"{self.name}: the server ignores ranges, so reading one tensor would fetch all "
                    f"{self.size:,} bytes; download the file, or use a server that supports ranges"
                )
            data = _retried(self.name, lambda: self._fs.cat_file(self._fs_path))
            self._whole = MemorySource(self.name, data)
            return self._whole


class RemoteFolder(Folder):
    """A folder at a URL. Where it cannot be listed (http), the names in `probed` are asked for."""

    def __init__(self, url: str, probed: Sequence[str] = ()) -> None:
        self.name = url.rstrip("/")
        self._fs, self._path = _filesystem(self.name)
        self._probed = probed
        self._listed: dict[str, tuple[list[str], list[str]]] = {}

    def files(self, subfolder: str = "") -> Sequence[str]:
        return self._list(subfolder)[0]

    def subfolders(self) -> Sequence[str]:
        return self._list("")[1]

    def exists(self, name: str) -> bool:
        if name in self.files():
            return True
        url = f"{self._path}/{name}"
        return self._cannot_list() and bool(_retried(url, lambda: self._fs.exists(url)))

    def open(self, name: str) -> ByteSource:
        check_file_name(name, self.name)
        return RemoteSource(f"{self.name}/{name}")

    def _cannot_list(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    def _list(self, subfolder: str) -> tuple[list[str], list[str]]:
        if subfolder not in self._listed:
            self._listed[subfolder] = self._probe() if self._cannot_list() else self._ls(subfolder)
        return self._listed[subfolder]

    def _probe(self) -> tuple[list[str], list[str]]:
        urls = [f"{self._path}/{name}" for name in self._probed]
        there = _pool().map(lambda url: _retried(url, lambda: self._fs.exists(url)), urls)
        return sorted(n for n, found in zip(self._probed, there, strict=True) if found), []

    def _ls(self, subfolder: str) -> tuple[list[str], list[str]]:
        path = f"{self._path}/{subfolder}".rstrip("/")
        try:
            found = _retried(path, lambda: self._fs.ls(path, detail=True))
        except FileNotFoundError:
            raise DataError(f"{self.name} does not exist; check the address") from None
        prefix = f"{subfolder}/" if subfolder else ""
        split: tuple[list[str], list[str]] = ([], [])
        for entry in found:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            split[entry["type"] == "directory"].append(prefix + name)
        return sorted(split[0]), sorted(split[1])


def remote_parent(url: str, probed: Sequence[str]) -> tuple[RemoteFolder, str]:
    """The folder a remote file lies in, and the file's name."""
    parent, _, name = url.rpartition("/")
    return RemoteFolder(parent, probed), name


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError:
        raise MissingExtra("fsspec", "remote", f"reading {url}") from None
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UsageError(f"reading {url} needs a package that is not installed: {error}") from None
    except ValueError as error:
        raise UsageError(f"{url} is no address weft can read: {error}") from None


class _NoRanges(Exception):
    pass


def _range_reader(fs: Any, path: str, size: int) -> Callable[[int, int], bytes]:
    """`fetch(start, stop)`: one request, by the interface every buffered fsspec file implements."""
    from fsspec.spec import AbstractBufferedFile

    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    known = {"size": size} if "http" in protocols else {}  # else it asks for the size again
    file = fs.open(path, "rb", block_size=PIECE, cache_type="none", **known)
    if isinstance(file, AbstractBufferedFile) and type(file).__name__ != "HTTPStreamFile":

        def fetch(start: int, stop: int) -> bytes:
            try:
                return bytes(file._fetch_range(start, stop))
            except ValueError as error:
                if "http" in protocols and "range" in str(error):
                    raise _NoRanges from None
                raise

        return fetch
    if "http" in protocols:

        def refuse(start: int, stop: int) -> bytes:
            raise _NoRanges

        return refuse
    return lambda start, stop: fs.cat_file(path, start=start, end=stop)  # type: ignore[no-any-return]


def _pieces(offset: int, length: int) -> Iterator[tuple[int, int]]:
    for at in range(offset, offset + length, PIECE):
        yield at, min(PIECE, offset + length - at)


def _retried(what: str, call: Callable[[], Any]) -> Any:
    """The call's result, after some tries with growing pauses; DataError where they are used up."""
    for attempt in range(_TRIES):
        try:
            return call()
        except (WeftError, FileNotFoundError, _NoRanges):
            raise
        except Exception as error:  # each backend has errors of its own
            if attempt == _TRIES - 1 or isinstance(error, PermissionError | ImportError | TypeError):
                raise DataError(f"{what} cannot be read: {type(error).__name__}: {error}") from None
            time.sleep(0.2 * 4**attempt * (0.5 + random.random()))
