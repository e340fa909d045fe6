"""A Hugging Face Hub id → the folder of its files: the local cache if it holds them, else by range reads.

Without a network, without huggingface_hub, or with HF_HUB_OFFLINE set, the cache alone is looked at; its
layout is a public convention (`models--org--name/refs`, `snapshots`, `blobs`).
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from weft.checkpoints.folders import Folder, LocalFolder
from weft.errors import DataError, MissingExtra, UsageError

_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*")


def hub_folder(repo_id: str, revision: str | None = None) -> Folder:
    """The files of `repo_id` at `revision` (a branch, tag or commit; "main" by default).

    DataError where neither the cache nor the Hub has them; MissingExtra where only the Hub could.
    """
    wanted = revision or "main"
    if not _REVISION.fullmatch(wanted) or ".." in wanted:
        raise UsageError(f"{wanted!r} is no revision of {repo_id}; give a branch, a tag or a commit")
    cached = cached_snapshot(repo_id, wanted)
    if offline():
        if cached is None:
            raise DataError(
                f"{repo_id}@{wanted} is not in the Hub cache {hub_cache()} and HF_HUB_OFFLINE is set; "
                "unset it, or download the model first"
            )
        return _local(cached, repo_id, revision)
    try:
        import huggingface_hub
    except ImportError:
        if cached is not None and is_complete(cached):
            return _local(cached, repo_id, revision)
        raise MissingExtra(
            "huggingface_hub", "hub", f"{repo_id!r} is no local path, and reading it from the Hub"
        ) from None
    try:
        commit = _commit(huggingface_hub, repo_id, revision)
    except DataError:
        # the Hub cannot be asked; what it said last time is the best answer there is
        if cached is None or not is_complete(cached):
            raise
        return _local(cached, repo_id, revision)
    snapshot = cached_snapshot(repo_id, commit)
    if snapshot is not None and is_complete(snapshot):
        return _local(snapshot, repo_id, revision)
    from weft.checkpoints.remote import RemoteFolder

    return RemoteFolder(f"hf://{repo_id}@{commit}")


def offline() -> bool:
    """True where the user forbids the network."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def hub_cache() -> Path:
    """The folder of the Hub's cache, by the variables that huggingface_hub reads."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable])
    home = os.environ.get("HF_HOME")
    if not home:
        home = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    return Path(home) / "hub"


def cached_snapshot(repo_id: str, revision: str) -> Path | None:
    """The snapshot folder the cache has for a branch, tag or commit."""
    repo = hub_cache() / ("models--" + repo_id.replace("/", "--"))
    commit = revision
    reference = repo / "refs" / revision
    if reference.is_file():
        with open(reference, "rb") as file:
            commit = file.read(64).decode("ascii", "replace").strip()
    if not re.fullmatch(r"\w+", commit):
        return None
    snapshot = repo / "snapshots" / commit
    return snapshot if snapshot.is_dir() else None


def is_complete(snapshot: Path) -> bool:
    """True if the snapshot holds weights, and all of the shards that its index names."""
    names = {p.name for p in snapshot.iterdir()}
    for index in (n for n in names if n.endswith((".safetensors.index.json", ".bin.index.json"))):
        try:
            listed = json.loads((snapshot / index).read_bytes())["weight_map"]
            return set(listed.values()) <= names
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
    return any(n.endswith((".safetensors", ".bin", ".pt", ".pth", ".ckpt")) for n in names)


def _local(snapshot: Path, repo_id: str, revision: str | None) -> LocalFolder:
    folder = LocalFolder(snapshot)
    folder.name = f"{repo_id}@{revision}" if revision else repo_id
    return folder


def _commit(huggingface_hub: Any, repo_id: str, revision: str | None) -> str:
    try:
        info = huggingface_hub.HfApi().model_info(repo_id, revision=revision, timeout=20)
    except Exception as error:  # its errors derive from several HTTP libraries
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(
            f"{repo_id!r} is no local path and cannot be had from the Hub: {reason}; "
            "check the name, the network and your token"
        ) from None
    return str(info.sha)
