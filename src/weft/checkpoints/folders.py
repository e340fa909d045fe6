"""A folder of files, wherever it lies: the one view that the loader has of a disk, a Hub cache, a store."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from weft.checkpoints.limits import check_file_name, resolve_inside
from weft.checkpoints.sources import ByteSource, LocalSource
from weft.errors import DataError, UnsafeFile


class Folder(ABC):
    """Files under relative names."""

    name: str

    @abstractmethod
    def files(self, subfolder: str = "") -> Sequence[str]:
        """Names of the files directly in the folder, or in one of its subfolders, sorted."""

    @abstractmethod
    def open(self, name: str) -> ByteSource:
        """One file by its relative name, which may not leave the folder."""

    def subfolders(self) -> Sequence[str]:
        """Names of the folders directly in it; empty where that cannot be known."""
        return ()

    def exists(self, name: str) -> bool:
        return name in self.files()

    def check(self, name: str) -> None:
        """Raise now if opening the file would break a rule."""
        check_file_name(name, self.name)

    def read(self, name: str, limit: int, code: str) -> bytes:
        """A whole small file; UnsafeFile(code) if it is larger than `limit`."""
        source = self.open(name)
        if source.size > limit:
            raise UnsafeFile(
                code,
                f"{source.name} has {source.size:,} bytes, over the limit of {limit:,}; "
                "it is not what its name says",
            )
        return source.read(0, source.size)


class LocalFolder(Folder):
    """A directory on disk."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.name = str(path)

    def files(self, subfolder: str = "") -> Sequence[str]:
        prefix = f"{subfolder}/" if subfolder else ""
        return [prefix + e.name for e in self._scan(subfolder) if not e.is_dir()]

    def subfolders(self) -> Sequence[str]:
        # a link to a folder is not entered: what lies behind it is not part of this checkpoint
        return [e.name for e in self._scan("") if e.is_dir(follow_symlinks=False)]

    def open(self, name: str) -> ByteSource:
        source = LocalSource(resolve_inside(self.path, name), follow=False)
        source.name = str(self.path / name)
        return source

    def exists(self, name: str) -> bool:
        check_file_name(name, self.name)
        return os.path.lexists(self.path / name)

    def check(self, name: str) -> None:
        resolve_inside(self.path, name)

    def _scan(self, subfolder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.path / subfolder) as entries:
                return sorted(entries, key=lambda e: e.name)
        except OSError as error:
            raise DataError(f"{self.path / subfolder} cannot be listed: {error.strerror}") from None
