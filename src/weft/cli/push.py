"""`weft push`: a finished folder to the Hub."""

from __future__ import annotations

from pathlib import Path

from weft.cli.output import note, one_line, print_json
from weft.export.hub import check_whole, push, to_upload


def push_folder(
    folder: Path,
    repo: str,
    *,
    private: bool | None,
    revision: str | None,
    message: str,
    create_pr: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Carry out `weft push`."""
    if dry_run:
        files, left_out = to_upload(folder)
        check_whole(folder, files)
        told = {"repo": repo, "files": files, "left_out": left_out}
    else:
        done = push(folder, repo, private=private, revision=revision, message=message, create_pr=create_pr)
        told = {
            "repo": done.repo, "url": done.url, "commit": done.commit,
            "files": list(done.files), "left_out": list(done.left_out),
        }  # fmt: skip
    if as_json:
        print_json(told)
        return
    for name in told["left_out"]:
        note(f"not uploaded: {one_line(name)}")
    if dry_run:
        print(*map(one_line, told["files"]), sep="\n")
    else:
        print(f"{one_line(told['url'])}: {len(told['files'])} files")
