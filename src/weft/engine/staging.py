"""The folder in which an output grows, and the journal by which an interrupted run goes on.

Beside its final place lies a hidden folder with the output's files, a lock, and the journal: a line that says
what is being made, then the names of the tensors that are written. A run with the same fingerprint continues,
any other starts over. When the output is whole its files get their final name, and the rest goes. Data
reaches the disk when the system likes, so a journal from before the machine's last start is not believed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import uuid
from pathlib import Path

from weft._version import __version__
from weft.engine.plan import Plan
from weft.engine.writer import SINGLE_FILES, disk_error
from weft.errors import UsageError

JOURNAL = "journal.jsonl"
_LOCK = "lock"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
_MODEL_FILES = {"config.json", "adapter_config.json", "weft-manifest.json"}


def fingerprint(plan: Plan) -> str:
    """What an output depends on, as one hash; unique where the inputs are in memory only."""
    identity = plan.checkpoint.identity() or uuid.uuid4().hex
    parts = [__version__, identity]
    parts += [h.hex() for h in plan.layout.headers.values()]
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


class Staging:
    """The temporary folder of one output. One process at a time may hold it."""

    def __init__(self, out: Path, mark: str, *, overwrite: bool) -> None:
        refuse_existing(out, overwrite)
        # behind a link, so that the rename stays on one disk and the link stays a link
        self.out, self.overwrite = Path(os.path.realpath(out)), overwrite
        if not self.out.name:
            raise UsageError(f"{out} is no place for a model: name a folder")
        self.home = self.out.parent / f".{self.out.name}.weft-partial"
        self.folder = self.home / "files"
        """Where the output's files grow."""
        self._guard = threading.Lock()
        self._lock_fd = self._locked()
        try:
            self.done = self._read_journal(mark)
            self._journal = open(self.home / JOURNAL, "a", encoding="utf-8")  # noqa: SIM115
        except BaseException as error:
            os.close(self._lock_fd)
            if isinstance(error, OSError):
                raise disk_error(error, self.home, 0) from None
            raise

    def _locked(self) -> int:
        """The lock's descriptor, held until it is closed."""
        while True:
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
                if self.home.is_symlink():
                    raise UsageError(f"{self.home} is a link where weft keeps its own folder: remove it")
                self.home.mkdir(exist_ok=True)
                fd = os.open(self.home / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as error:
                raise disk_error(error, self.home, 0) from None
            try:
                import fcntl

                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:
                return fd
            except OSError:
                os.close(fd)
                raise UsageError(
                    f"another weft is writing {self.out}: wait for it or choose another name"
                ) from None
            with contextlib.suppress(OSError):
                if (self.home / _LOCK).stat().st_ino == os.fstat(fd).st_ino:
                    return fd
            os.close(fd)  # whoever held it has finished and taken the folder away meanwhile

    def _read_journal(self, mark: str) -> set[str]:
        """Names already written by an earlier run of the same work; else a clean folder."""
        path = self.home / JOURNAL
        head = {"fingerprint": mark, "boot": _boot(), "weft": __version__}
        try:
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]  # a last line without an end was being written
            first, *rest = whole.decode().splitlines()
            names = [json.loads(line) for line in rest]
            if json.loads(first) == head and all(isinstance(n, str) for n in names):
                os.truncate(path, len(whole))
                return set(names)
        except (OSError, ValueError, RecursionError):
            pass
        for entry in self.home.iterdir():
            if entry.name != _LOCK:
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        self.folder.mkdir()
        path.write_text(json.dumps(head) + "\n", encoding="utf-8")
        return set()

    def forget_damaged(self, plan: Plan) -> None:
        """Believe only in tensors of this plan whose file is there at its full size."""
        there = set()
        for file, size in plan.layout.sizes.items():
            with contextlib.suppress(OSError):
                if (self.folder / file).stat().st_size == size:
                    there.add(file)
        self.done = {n for n in self.done if n in plan.tensors and plan.layout.places[n].file in there}

    def record(self, *names: str) -> None:
        """Note that tensors are written."""
        with self._guard:
            try:
                self._journal.write("".join(json.dumps(name) + "\n" for name in names))
                self._journal.flush()
            except OSError as error:
                raise disk_error(error, self.home / JOURNAL, 0) from None

    def publish(self) -> None:
        """Give the output its final name: the folder's, or a single file's."""
        try:
            self._journal.close()
            refuse_existing(self.out, self.overwrite)
            sync_folder(self.folder)
            if self.out.suffix in SINGLE_FILES:
                for file in sorted(self.folder.iterdir(), key=lambda f: f.name == self.out.name):
                    file.replace(self.out.parent / file.name)
            else:
                self._replace_folder()
            sync_folder(self.out.parent)
            shutil.rmtree(self.home)
        except OSError as error:
            raise disk_error(error, self.out, 0) from None
        finally:
            os.close(self._lock_fd)

    def _replace_folder(self) -> None:
        if not (self.out.is_dir() and any(self.out.iterdir())):
            self.folder.replace(self.out)
            return
        old = self.home / f"old-{uuid.uuid4().hex[:8]}"  # goes with the rest of the hidden folder
        self.out.rename(old)
        try:
            self.folder.replace(self.out)
        except OSError:
            old.rename(self.out)
            raise

    def abandon(self) -> None:
        """Let go of the folder, leaving it for a run that goes on."""
        try:
            self._journal.close()
        except OSError:
            pass  # a full disk; what was not noted is made again
        finally:
            os.close(self._lock_fd)


def refuse_existing(out: Path, overwrite: bool) -> None:
    """UsageError if the output is there already and may not be replaced."""
    if out.suffix in SINGLE_FILES:
        if out.is_dir():
            raise UsageError(f"{out} is a folder: name a file, or drop the {out.suffix}")
        exists = out.exists()
    else:
        if out.exists() and not out.is_dir():
            raise UsageError(f"{out} is a file: name a folder, or end the name in .safetensors")
        exists = out.is_dir() and any(out.iterdir())
        if exists and overwrite and not _is_model(out):
            raise UsageError(f"{out} does not look like a model, so weft won't replace it: remove it first")
    if exists and not overwrite:
        raise UsageError(f"{out} exists and is not empty: choose another name, or say --overwrite")


def _is_model(folder: Path) -> bool:
    return any(e.name in _MODEL_FILES or e.name.endswith(_WEIGHTS) for e in folder.iterdir())


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
