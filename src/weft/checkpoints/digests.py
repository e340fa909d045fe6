"""sha256 of weight files, remembered: hashing a model takes longer than merging it.

A digest is kept under the file's real path, size, time of change and inode, in one JSON file that any
number of processes may share. It is a cache and nothing else: damaged, it is ignored; not writable, it is
not written. The Hub's cache names its large files by their sha256 already.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from weft.errors import DataError

_ENTRIES = 10_000
_SETTLED = 2.0  # seconds: a younger file may change again within one tick of its clock


def cache_folder() -> Path:
    """Where weft keeps what it may lose: $WEFT_CACHE, else the user's cache."""
    chosen = os.environ.get("WEFT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


def sha256_of(path: Path | str) -> str:
    """The file's sha256 in hex. DataError if it cannot be read or changes meanwhile."""
    real = Path(os.path.realpath(path))
    if re.fullmatch(r"[0-9a-f]{64}", real.name) and _in_hub_cache(real):
        return real.name
    try:
        before = real.stat()
        key = f"{real}|{before.st_size}|{before.st_mtime_ns}|{before.st_ino}"
        known = _read().get(key)
        if known:
            return known
        with open(real, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        after = real.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be hashed: {error.strerror}") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"{path}: the file changed while being hashed; start again")
    if time.time() - after.st_mtime > _SETTLED:
        _remember(key, digest)
    return digest


def _in_hub_cache(real: Path) -> bool:
    return real.parent.name == "blobs" and (real.parent.parent / "snapshots").is_dir()


def _file() -> Path:
    return cache_folder() / "digests.json"


def _read() -> dict[str, str]:
    try:
        found = json.loads(_file().read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    hexes = re.compile(r"[0-9a-f]{64}")
    return {k: v for k, v in found.items() if isinstance(v, str) and hexes.fullmatch(v)}


def _remember(key: str, digest: str) -> None:
    with contextlib.suppress(OSError):
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "digests.lock"):
            kept = list((_read() | {key: digest}).items())[-_ENTRIES:]
            handle, name = tempfile.mkstemp(dir=folder, prefix="digests.", suffix=".tmp")
            try:
                with open(handle, "w", encoding="utf-8") as file:
                    json.dump(dict(kept), file, indent=0)
                Path(name).replace(_file())
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Exclusive among processes where the system has flock; elsewhere a lost entry is hashed again."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
