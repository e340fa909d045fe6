"""`weft demo`: real experts on five small tasks, merged by every method, measured on held-out data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weft.demo.results import Results

__all__ = ["demo"]


def demo(out: Path, *, json_path: Path | None = None) -> Results:
    """Merge the shipped experts, print the table, write `out/report.html`, and the rows as JSON if asked.

    Raises MissingExtra before any work if scikit-learn or matplotlib is not installed.
    """
    from rich.console import Console

    from weft.demo.plots import require_matplotlib
    from weft.demo.report import write_report
    from weft.demo.run import run
    from weft.demo.table import print_table
    from weft.demo.tasks import originals

    originals()
    require_matplotlib()
    console = Console()
    if console.is_terminal:
        with console.status("starting") as status:
            results = run(progress=lambda what: status.update(f"measuring {what}"))
    else:
        results = run()
    print_table(results, console)
    report = write_report(results, out)
    if json_path is not None:
        write_whole(json_path, json.dumps(results.to_json(), indent=1, allow_nan=False) + "\n")
    console.print(f"\n{results.seconds:.0f} s; the report is {report}", soft_wrap=True, highlight=False)
    return results


def write_whole(path: Path, text: str) -> None:
    """Write a file under its final name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
