"""The two containers of torch.save: a zip file of storages, and before it a stream of pickles and storages.

Both are taken apart by our own rules to the description of their content and the place of each storage.
A zip reader that is lenient is a hiding place: entries are stored, named once, and fit into the file.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, check_file_name, shown
from weft.checkpoints.pickles import Storage, StoredTensor, read_pickle
from weft.checkpoints.sources import ByteSource
from weft.errors import DataError, UnsafeFile, WeftError

_MAGIC = 0x1950A86A20F9469CFC6C

Storages = Mapping[str, tuple[int, int]]
"""Storage key → absolute offset and bytes."""


def read_container(source: ByteSource, limits: Limits = DEFAULT_LIMITS) -> tuple[Any, Storages]:
    """What the file's pickle describes, and where its storages lie. Raises UnsafeFile or DataError."""
    start = source.read(0, min(4, source.size))
    return (_read_zip if start == b"PK\x03\x04" else _read_legacy)(source, limits)


def _read_zip(source: ByteSource, limits: Limits) -> tuple[Any, Storages]:
    where = source.name
    if _directory_bytes(source) > 128 * limits.zip_entries:
        raise UnsafeFile("zip", f"{where} has more than {limits.zip_entries:,} entries; save it again")
    try:
        with zipfile.ZipFile(io.BufferedReader(_Raw(source))) as archive:
            listed = archive.infolist()
    except WeftError:
        raise
    except Exception as error:  # a damaged directory makes zipfile fail in ways of all kinds
        raise UnsafeFile("zip", f"{where} is a damaged zip file ({error}); fetch it again") from None
    entries = _checked_entries(listed, source, limits)
    pickles = [n for n in entries if n.endswith("/data.pkl") and n.count("/") == 1]
    if len(pickles) != 1:
        raise UnsafeFile("zip", f"{where} is a zip file but not one of torch.save; unpack it")
    root = pickles[0].removesuffix("data.pkl")
    data = _small(source, entries[pickles[0]], limits)
    order = entries.get(f"{root}byteorder")
    if order is not None and _small(source, order, limits) != b"little":
        raise DataError(f"{where} is in big-endian byte order; save it again on a little-endian machine")
    content, _ = read_pickle(data, where, limits)
    storages = {
        name.removeprefix(f"{root}data/"): (_data_offset(source, entry), entry.file_size)
        for name, entry in entries.items()
        if name.startswith(f"{root}data/")
    }
    return content, _Checked(storages, where)


def _checked_entries(
    entries: list[zipfile.ZipInfo], source: ByteSource, limits: Limits
) -> dict[str, zipfile.ZipInfo]:
    where = source.name
    named = {entry.filename: entry for entry in entries}
    problem = None
    if len(entries) > limits.zip_entries:
        problem = f"has more than {limits.zip_entries:,} entries"
    elif len(named) != len(entries):
        problem = "has two entries of one name"
    elif any(e.compress_type != zipfile.ZIP_STORED or e.compress_size != e.file_size for e in entries):
        problem = "has compressed entries, which torch never writes"
    elif any(e.flag_bits & 1 for e in entries):
        problem = "is encrypted"
    elif sum(e.file_size for e in entries) > source.size:
        problem = "claims more bytes than it has"
    if problem:
        raise UnsafeFile("zip", f"{where} {problem}; save it again with torch.save")
    for entry in entries:
        check_file_name(entry.orig_filename, where)
    return named


def _small(source: ByteSource, entry: zipfile.ZipInfo, limits: Limits) -> bytes:
    """A whole entry with its checksum verified; storages are not, that would read the model twice."""
    if entry.file_size > limits.pickle_bytes:
        raise UnsafeFile("pickle-size", f"{source.name} holds a pickle over {limits.pickle_bytes:,} bytes")
    data = source.read(_data_offset(source, entry), entry.file_size)
    if zlib.crc32(data) != entry.CRC:
        raise UnsafeFile("zip", f"{source.name}: {shown(entry.filename)} is damaged; fetch it again")
    return data


def _directory_bytes(source: ByteSource) -> int:
    """What the end of the file says the directory takes: zipfile would read it before we could count."""
    tail = source.read(max(0, source.size - 66_000), min(source.size, 66_000))
    end = tail.rfind(b"PK\x05\x06")
    wide = tail.rfind(b"PK\x06\x06", 0, max(end, 0))
    if wide >= 0 and len(tail) >= wide + 48:
        return int(struct.unpack("<Q", tail[wide + 40 : wide + 48])[0])
    return int(struct.unpack("<I", tail[end + 12 : end + 16])[0]) if 0 <= end <= len(tail) - 22 else 0


def _data_offset(source: ByteSource, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: its local header repeats the name and may pad."""
    header = source.read(entry.header_offset, 30) if entry.header_offset + 30 <= source.size else b""
    if header[:4] != b"PK\x03\x04" or header[8:10] != b"\0\0":
        raise UnsafeFile("zip", f"{source.name}: entry {shown(entry.filename)} is damaged; fetch it again")
    name, extra = struct.unpack("<HH", header[26:30])
    begin: int = entry.header_offset + 30 + name + extra
    if begin + entry.file_size > source.size:
        raise UnsafeFile("zip", f"{source.name} ends inside {shown(entry.filename)}; fetch it again")
    return begin


class _Checked(dict[str, tuple[int, int]]):
    """Storages by key; a missing one is the file's fault, not a KeyError."""

    def __init__(self, storages: Mapping[str, tuple[int, int]], where: str) -> None:
        super().__init__(storages)
        self._where = where

    def __missing__(self, key: str) -> tuple[int, int]:
        raise UnsafeFile("zip", f"{self._where} lacks the storage {shown(key)}; fetch it again")


def _read_legacy(source: ByteSource, limits: Limits) -> tuple[Any, Storages]:
    """Five pickles (magic, version, system, content, storage keys), then the storages one by one."""
    where = source.name
    head = source.read(0, min(source.size, limits.pickle_bytes, 1 << 16))
    if head[257:262] == b"ustar":
        raise UnsafeFile("legacy-tar", f"{where} is a tar file of an early torch; save it again")
    if not head.startswith(b"\x80"):
        raise DataError(f"{where} is no file of torch.save; check what it is")
    data = source.read(0, min(source.size, limits.pickle_bytes))
    parts, at = [], 0
    for _ in range(5):
        value, used = read_pickle(data[at:], where, limits, alone=False)
        parts.append(value)
        at += used
        if parts[0] != _MAGIC:
            raise UnsafeFile(
                "pickle-opcode",
                f"{where} is a bare pickle, not a file of torch.save; load it yourself if you trust it and "
                "save its tensors as safetensors",
            )
    content, keys = parts[3], parts[4]
    if parts[1] != 1001 or not isinstance(keys, list) or not all(isinstance(k, str) for k in keys):
        raise UnsafeFile("pickle-opcode", f"{where} is no valid file of torch.save; fetch it again")
    widths = {s.key: s.dtype.itemsize for s in _storages_in(content)}
    storages: dict[str, tuple[int, int]] = {}
    for key in keys:
        if at + 8 > source.size or key in storages or key not in widths:
            raise UnsafeFile("truncated", f"{where} does not hold what it lists; fetch it again")
        (count,) = struct.unpack("<q", source.read(at, 8))
        at += 8
        if not 0 <= count * widths[key] <= source.size - at:
            raise UnsafeFile("truncated", f"{where} ends inside a storage; fetch it again")
        storages[key] = (at, count * widths[key])
        at += count * widths[key]
    if at != source.size:
        raise UnsafeFile("trailing-bytes", f"{where} has bytes after its last storage; save it again")
    return content, _Checked(storages, where)


def _storages_in(content: Any) -> Iterator[Storage]:
    seen: set[int] = set()
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, StoredTensor):
            yield value.storage
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            todo += value.values() if isinstance(value, dict) else value
        elif isinstance(value, Storage):
            yield value


class _Raw(io.RawIOBase):
    """A source as the file object that zipfile wants."""

    def __init__(self, source: ByteSource) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._source.size)[whence]
        if self._at < 0:
            raise ValueError("negative seek position")
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._source.size - self._at))
        if count:
            self._source.read_into(memoryview(buffer)[:count].cast("B"), self._at)
        self._at += count
        return count
