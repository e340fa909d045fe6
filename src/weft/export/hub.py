"""A finished model folder → a repository on the Hugging Face Hub.

huggingface_hub moves the bytes: with its Xet client an interrupted upload goes on where it stopped when the same
call is made again, and content that the Hub has already is not sent twice. Token and endpoint are taken as
that library takes them (HF_TOKEN, `hf auth login`, HF_ENDPOINT).
"""

from __future__ import annotations

import glob
import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from weft.checkpoints.hub import offline
from weft.checkpoints.limits import DEFAULT_LIMITS, shown
from weft.checkpoints.load import ADAPTER_CONFIG, load
from weft.checkpoints.refs import Kind, parse_ref
from weft.checkpoints.strictjson import parse_json
from weft.engine.save import MANIFEST
from weft.engine.staging import JOURNAL
from weft.errors import DataError, DataProblems, MissingExtra, UsageError

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_INTERNAL = re.compile(r"\..*|.*\.tmp|__pycache__")
_REASONS = {
    401: "log in with `hf auth login` or set HF_TOKEN",
    403: "the token may not write there; use one with write access",
    404: "check the name, and that the token may write there",
}


@dataclass(frozen=True)
class Pushed:
    """What an upload did."""

    repo: str
    url: str
    commit: str
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    """Files of the folder that were not uploaded: hidden, temporary, or links."""


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload with weft",
    create_pr: bool = False,
) -> Pushed:
    """Upload a model folder to `repo` ("org/name"), which is made if it isn't there.

    `private` makes a new repository private (an existing public one is refused), `revision` is a branch, made
    if need be, `create_pr` opens a pull request instead. Hidden and temporary files, journals and links are
    never uploaded. Nothing that is in the repository already is deleted.

    Raises UsageError for a name that is none, a folder that is no finished model and HF_HUB_OFFLINE,
    DataProblems where files are not as the manifest has them, DataError for what the Hub refuses.
    """
    path = Path(folder)
    ref = parse_ref(repo)
    if ref.kind is not Kind.HUB or ref.revision or ref.lora:
        raise UsageError(f"{repo!r} is no repository; write org/name, and the branch as revision")
    if create_pr and revision:
        raise UsageError("a pull request is opened against the main branch: give a revision or create_pr")
    files, left_out = to_upload(path)
    check_whole(path, files)
    hub = _library(repo)
    if offline():
        raise UsageError(f"HF_HUB_OFFLINE is set, so {repo} cannot be written to; unset it")
    api = hub.HfApi(library_name="weft")
    try:
        _prepare(api, repo, private, revision)
        done = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=[glob.escape(name) for name in files],
            commit_message=message,
            revision=revision,
            create_pr=create_pr or None,
        )
    except UsageError:
        raise
    except Exception as error:  # its errors derive from several HTTP libraries
        raise DataError(_refused(repo, error)) from error
    url = getattr(done, "pr_url", None) or f"{api.endpoint}/{repo}"
    return Pushed(repo, str(url), str(done.oid), tuple(files), tuple(left_out))


def to_upload(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files to upload, and of those to leave out, relative and sorted."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder; push the folder that a merge has written")
    if any(part.endswith(".weft-partial") for part in folder.resolve().parts) or (folder / JOURNAL).exists():
        raise UsageError(
            f"{folder} belongs to an unfinished merge; run that merge again, then push its output"
        )
    wanted: list[str] = []
    left: list[str] = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        name = path.relative_to(folder).as_posix()
        inner = any(_INTERNAL.fullmatch(part) for part in name.split("/"))
        linked = path.is_symlink() or any((folder / p).is_symlink() for p in Path(name).parents if p.name)
        (left if inner or linked or not path.is_file() else wanted).append(name)
    return wanted, left


def check_whole(folder: Path, files: list[str]) -> None:
    """Raise where the folder is no whole model: no weights, shards missing, files the manifest has otherwise."""
    if not any(name.endswith(_WEIGHTS) for name in files):
        raise UsageError(f"{folder} holds no weights; push the folder that a merge has written")
    if any(name.endswith(".index.json") for name in files) and ADAPTER_CONFIG not in files:
        load(folder)  # reads the headers, and names what is missing
    if MANIFEST not in files:
        return
    limit = DEFAULT_LIMITS.index_bytes
    if (folder / MANIFEST).stat().st_size > limit:
        raise DataError(f"{folder / MANIFEST} is longer than {limit:,} bytes; it is not what its name says")
    record = parse_json((folder / MANIFEST).read_bytes(), str(folder / MANIFEST), "index-json")
    problems = []
    for entry in record.get("outputs", []):
        name, size = entry.get("file"), entry.get("size")
        if name not in files:
            problems.append(f"{shown(name)} is missing")
        elif (there := (folder / name).stat().st_size) != size:
            problems.append(f"{shown(name)} has {there:,} bytes, not the {size:,} that weft wrote")
    if problems:
        raise DataProblems(
            f"{folder} is not as {MANIFEST} has it; merge again, or remove that file", problems
        )


def _prepare(api: Any, repo: str, private: bool | None, revision: str | None) -> None:
    """Make the repository and the branch where they are not there yet."""
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise UsageError(f"{repo} exists and is public, so nothing was uploaded; choose another name")
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo, branch=revision, exist_ok=True)


def _refused(repo: str, error: Exception) -> str:
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0] if lines else type(error).__name__
    remedy = _REASONS.get(status or 0, "run the same command again to go on where it stopped")
    return f"{repo} could not be written to: {reason}; {remedy}"


def _library(repo: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError:
        raise MissingExtra("huggingface_hub", "hub", f"uploading to {repo}") from None
    module: ModuleType = huggingface_hub
    return module
