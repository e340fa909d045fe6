"""`weft verify` and `weft merge --verify`: the smoke run, as a table or as JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import DEFAULT_LIMITS
from weft.checkpoints.strictjson import parse_json
from weft.cli.output import figure, note, one_line, print_json, report_error
from weft.engine.card import README, with_evaluation
from weft.engine.save import MANIFEST
from weft.engine.writer import write_whole
from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.llm.verify import Verification

FAILED = 1
"""The exit status where the model has collapsed or cannot be run."""


def verify_folder(
    model: str,
    parents: Sequence[str],
    *,
    text: Path | None,
    tokens: int,
    device: str,
    record: bool,
    as_json: bool,
) -> int:
    """Carry out `weft verify`; the exit status."""
    from weft.llm.verify import verify

    if record and not (Path(model) / MANIFEST).is_file():
        raise UsageError(f"--record writes to {MANIFEST}, which {model} does not hold")
    report = verify(model, parents, texts=text, device=device, limit_tokens=tokens)
    if record:
        write_record(Path(model), report.describe())
    if as_json:
        print_json(report.describe())
    else:
        show(report, sys.stdout)
    return close(report)


def verify_output(
    out: Path, checkpoint: Checkpoint, text: Path | None, device: str
) -> tuple[Verification, Mapping[str, Any]]:
    """Verify what `weft merge` has written against the models it was made from, and record it there."""
    from weft.llm.verify import parents_of, verify

    report = verify(out, parents_of(checkpoint), texts=text, device=device)
    described = report.describe()
    write_record(out, described)
    return report, described


def write_record(folder: Path, verification: Mapping[str, Any]) -> None:
    """Put a verification into the manifest and the card; the weights are not touched."""
    manifest = folder / MANIFEST
    data = parse_json(manifest.read_bytes(), str(manifest), "config-json", depth=256)
    data["verification"] = verification
    write_whole(manifest, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())
    card = folder / README
    if card.is_file() and card.stat().st_size < DEFAULT_LIMITS.config_bytes:
        text = with_evaluation(card.read_text(encoding="utf-8"), folder.resolve().name, verification)
        write_whole(card, text.encode())


def show(report: Verification, to: TextIO) -> None:
    """The result and its parents, one a line."""
    rows = [("result", report.result), *(("parent", p) for p in report.parents)]
    told = {True: "finite", False: "not finite", None: "not run"}
    for role, row in rows:
        measured = f", perplexity {figure(row.perplexity)}" if row.perplexity is not None else ""
        print(
            f"{role} {one_line(row.origin)}: {row.architecture}, outputs {told[row.finite]}{measured}",
            file=to,
        )
    if report.unigram is not None:
        print(f"token frequencies alone: {figure(report.unigram)}, on {one_line(report.text)}", file=to)
    if report.result.continuation is not None:
        print(f"it goes on: {one_line(report.result.continuation)}", file=to)


def close(report: Verification) -> int:
    """Say notes and problems on stderr; the exit status."""
    for told in report.notes:
        note(told)
    for problem in report.problems:
        report_error(f"{report.result.origin}: {problem}")
    return 0 if report.ok else FAILED
