"""What the reader refuses, as numbers and as rules for names.

A checkpoint is input from a stranger. Every length in it may lie, every name may be a path and every
path may leave its folder, so each is held against the rules below before anything is allocated or
opened. A broken rule is an `UnsafeFile` whose code is stable, so that tools can act on it:

    header-size header-json too-many-tensors duplicate-key tensor-name metadata dtype shape offsets
    overlap hole trailing-bytes truncated                                    (safetensors)
    index-size index-json index shard-missing total-size                     (index of shards)
    path symlink not-regular extension                                       (file names)
    zip pickle-opcode pickle-global pickle-size stride legacy-tar            (torch files)
    config-size config-json asset-size                                       (config.json and its kin)
"""

from __future__ import annotations

import os
import stat
import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from weft.errors import DataError, UnsafeFile, UsageError

HARD_HEADER_BYTES = 100_000_000
"""The safetensors library reads no longer header, so a larger limit could not be honoured anyway."""

_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$", "clock$"} | {
    f"{port}{n}" for port in ("com", "lpt") for n in "123456789¹²³"
}


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest sizes and counts a reader accepts. Raise one for a real file that exceeds it."""

    header_bytes: int = 25_000_000
    tensors: int = 200_000
    dimension: int = 2**40
    rank: int = 64
    name_bytes: int = 512
    metadata_bytes: int = 1 << 20
    index_bytes: int = 64 << 20
    index_entries: int = 200_000
    shards: int = 10_000
    total_size_slack: float = 0.01
    pickle_bytes: int = 64 << 20
    pickle_opcodes: int = 1_000_000
    zip_entries: int = 100_000
    config_bytes: int = 4 << 20
    config_depth: int = 64
    asset_bytes: int = 256 << 20
    whole_remote_bytes: int = 256 << 20
    """A remote file that cannot be read by ranges is held in memory up to this size, else refused."""

    def __post_init__(self) -> None:
        if self.header_bytes > HARD_HEADER_BYTES:
            raise UsageError(f"header_bytes must be at most {HARD_HEADER_BYTES:,}")


DEFAULT_LIMITS = Limits()


def shown(name: object) -> str:
    """A name for a message: quoted, control characters escaped, never longer than a line."""
    text = repr(name)
    return text if len(text) <= 120 else f"{text[:100]}…({len(text)} characters)"


def tensor_name_problem(name: str, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """Why a tensor may not carry this name, or None."""
    if not name:
        return "is empty"
    if not name.isprintable():  # also true of lone surrogates, which no file can hold
        return "contains characters that cannot be printed"
    if len(name) * 4 > limits.name_bytes and len(name.encode()) > limits.name_bytes:
        return f"is longer than {limits.name_bytes} bytes"
    if "/" in name or "\\" in name or ".." in name:
        parts = name.replace("\\", "/").split("/")
        if parts[0] == "" or ".." in parts:
            return "is a path that leaves its folder"
    return None


def file_name_problem(name: str, suffixes: tuple[str, ...] = ()) -> str | None:
    """Why an index may not name this file, or None. The same answer on every operating system."""
    if not name or any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in name):
        return "is empty or contains control characters"
    if unicodedata.normalize("NFC", name) != name:
        return "is not in Unicode's composed form (NFC)"
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ":" in name:
        return "is an absolute path or names a drive"
    if "\\" in name:
        return "contains a backslash"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "has an empty, '.' or '..' part"
        if len(part.encode()) > 255:
            return "has a part longer than 255 bytes"
        if part[-1] in " ." or part.split(".")[0].strip().lower() in _RESERVED:
            return "is a name Windows reserves"
    if suffixes and not name.endswith(suffixes):
        return f"does not end in {' or '.join(suffixes)}"
    return None


def check_file_name(name: str, where: str, suffixes: tuple[str, ...] = ()) -> None:
    """Raise UnsafeFile unless `name` is a plain relative file name."""
    problem = file_name_problem(name, suffixes)
    if problem:
        code = "extension" if problem.startswith("does not end") else "path"
        raise UnsafeFile(
            code,
            f"{where} names the file {shown(name)}, which {problem}; "
            "do not use this checkpoint unless you can repair the name",
        )


def resolve_inside(root: Path, name: str) -> Path:
    """The real path of `root/name`, which must be a regular file that really lies inside `root`.

    A link is refused, with one exception: in the Hub's cache a snapshot links to `blobs/` of its repository.
    """
    check_file_name(name, str(root))
    root = Path(os.path.realpath(root))
    path = root / name
    real = Path(os.path.realpath(path))
    try:
        mode = real.stat().st_mode
    except FileNotFoundError:
        if path.is_symlink():
            raise UnsafeFile("symlink", f"{path} is a link to nothing; fetch the file again") from None
        raise DataError(f"{path} does not exist; the checkpoint is incomplete") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if real != path and not _is_hub_blob(root, real):
        raise UnsafeFile(
            "symlink",
            f"{path} is, or lies behind, a link to {real}; pass the real folder, or copy the file there",
        )
    if not stat.S_ISREG(mode):
        raise UnsafeFile("not-regular", f"{path} is not a regular file; replace it by the file meant")
    return real


def _is_hub_blob(root: Path, real: Path) -> bool:
    """True where `root` is (in) `<repo>/snapshots/<revision>` and `real` is directly in `<repo>/blobs`."""
    for folder in (root, *root.parents):
        if folder.parent.name == "snapshots":
            return real.parent == folder.parent.parent / "blobs"
    return False
