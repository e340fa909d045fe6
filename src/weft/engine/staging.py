"""The folder in which an output grows, and the journal by which an interrupted run goes on.

The output lives under a temporary name beside its final place until it is whole; then it is renamed. The
journal names the tensors that are written, after a line that says what is being made: a run with the same
fingerprint continues, any other starts over. Data reaches the disk when the system likes, so a journal
from before the machine's last start is not believed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import uuid
from pathlib import Path

from weft._version import __version__
from weft.engine.plan import Plan
from weft.engine.writer import disk_error
from weft.errors import UsageError

JOURNAL = "weft-journal.jsonl"


def fingerprint(plan: Plan) -> str:
    """What an output depends on, as one hash; unique where the inputs are in memory only."""
    identity = plan.checkpoint.identity() or uuid.uuid4().hex
    parts = [__version__, identity]
    parts += [h.hex() for h in plan.layout.headers.values()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


class Staging:
    """The temporary folder of one output. One process at a time may hold it."""

    def __init__(self, out: Path, mark: str, *, overwrite: bool) -> None:
        self.out, self.overwrite = out, overwrite
        self.folder = out.parent / f".{out.name}.weft-partial"
        self._guard = threading.Lock()
        refuse_existing(out, overwrite)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(exist_ok=True)
            self._lock_fd = os.open(self.folder / "weft-lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise disk_error(error, self.folder, 0) from None
        self._lock()
        self.done = self._read_journal(mark)
        self._journal = open(self.folder / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115

    def _lock(self) -> None:
        try:
            import fcntl

            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            os.close(self._lock_fd)
            raise UsageError(
                f"another weft is writing {self.out}: wait for it or choose another name"
            ) from None

    def _read_journal(self, mark: str) -> set[str]:
        """Names already written by an earlier run of the same work; else a clean folder."""
        path = self.folder / JOURNAL
        head = {"fingerprint": mark, "boot": _boot(), "weft": __version__}
        try:
            first, *rest = path.read_text(encoding="utf-8").splitlines()
            if json.loads(first) == head:
                return {json.loads(line) for line in rest if line.endswith('"') and len(line) > 1}
        except (OSError, ValueError):
            pass
        for entry in self.folder.iterdir():
            if entry.name != "weft-lock":
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        try:
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        except OSError as error:
            raise disk_error(error, path, 0) from None
        return set()

    def record(self, name: str) -> None:
        """Note that a tensor is written."""
        with self._guard:
            try:
                self._journal.write(json.dumps(name) + "\n")
                self._journal.flush()
            except OSError as error:
                raise disk_error(error, self.folder / JOURNAL, 0) from None

    def publish(self) -> None:
        """Give the output its final name: the folder's, or a single file's."""
        self._journal.close()
        refuse_existing(self.out, self.overwrite)
        try:
            for leftover in (JOURNAL, "weft-lock"):
                (self.folder / leftover).unlink(missing_ok=True)
            if self.out.suffix == ".safetensors":
                for file in sorted(self.folder.iterdir(), key=lambda f: f.name == self.out.name):
                    file.replace(self.out.parent / file.name)
                self.folder.rmdir()
            else:
                self._replace_folder()
            sync_folder(self.out.parent)
        except OSError as error:
            raise disk_error(error, self.out, 0) from None
        finally:
            os.close(self._lock_fd)

    def _replace_folder(self) -> None:
        sync_folder(self.folder)
        old = None
        if self.out.is_dir() and any(self.out.iterdir()):
            old = self.out.parent / f".{self.out.name}.weft-old-{uuid.uuid4().hex[:8]}"
            self.out.rename(old)
        os.replace(self.folder, self.out)
        if old is not None:
            shutil.rmtree(old)

    def abandon(self) -> None:
        """Let go of the folder, leaving it for a run that goes on."""
        self._journal.close()
        os.close(self._lock_fd)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """UsageError if the output is there already and may not be replaced."""
    if out.suffix == ".safetensors":
        if out.is_dir():
            raise UsageError(f"{out} is a folder: name a file, or drop the .safetensors")
        exists = out.exists()
    else:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file: name a folder, or end the name in .safetensors")
        exists = out.is_dir() and any(out.iterdir())
    if exists and not overwrite:
        raise UsageError(f"{out} exists and is not empty: choose another name, or say --overwrite")


def refuse_inputs(out: Path, plan: Plan) -> None:
    """UsageError if writing `out` would touch a file that is read."""
    target = out.resolve()
    for file in plan.checkpoint.files:
        if "://" in file.path:
            continue
        path = Path(file.path).resolve()
        if path == target or target in path.parents:
            raise UsageError(f"{out} holds {path.name}, which this merge reads: choose another output")


def sync_folder(folder: Path) -> None:
    """Make names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
