"""`weft search`: run a search file, show the best so far, write the winner's recipe."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from weft.search.result import Result, Trial

LISTED = 10
"""How many of the best candidates the table shows."""


def run_search(
    search: str, out: Path | None, plot: Path | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Carry out `weft search`."""
    from weft.errors import UsageError
    from weft.search.file import read_task
    from weft.search.run import run

    if out is not None and out.exists():
        raise UsageError(f"{out} exists already; name another file for the winner's recipe")
    if out is not None and not out.parent.is_dir():
        raise UsageError(f"{out.parent} is no folder; make it first")
    if plot is not None:
        from weft.analysis.picture import checked

        checked(plot)
    task = read_task(search, given)
    last: list[Result] = []

    def on_trial(trial: Trial, so_far: Result) -> None:
        last[:] = [so_far]
        if not quiet:
            _progress(trial, so_far)

    try:
        found = run(task, on_trial)
    except KeyboardInterrupt:
        if last and last[0].complete and not as_json:
            print(f"best of {len(last[0].complete)} candidates before the interruption:")
            _show(last[0])
        if task.storage is None:
            # main() tells of going on, which a search without a file cannot
            print(
                "nothing is kept: give storage (--storage search.db) to go on another time", file=sys.stderr
            )
        raise typer.Exit(130) from None
    if out is not None:
        _write(out, found.recipe or "")
    if plot is not None:
        found.plot(plot)
    if as_json:
        from weft.cli.output import print_json

        print_json(found.to_json())
    else:
        _show(found)
        if out is not None and not quiet:
            print(f"\n{out}: the winner's recipe; weft merge {out} OUT makes the model")


def _write(out: Path, text: str) -> None:
    """The recipe under its name when it is whole."""
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _progress(trial: Trial, so_far: Result) -> None:
    """One line on stderr a candidate."""
    from weft.cli.output import one_line

    if trial.state == "complete":
        said = ", ".join(f"{name} {value:.5g}" for name, value in trial.scores.items())
        best = so_far.best
        said += " (best so far)" if best.number == trial.number else f"; best {best.number}"
        said += f", as trial {trial.repeats}" if trial.repeats is not None else f", {trial.seconds:.1f} s"
    else:
        said = f"refused: {one_line(trial.reason)[:200]}"
    print(f"{trial.number + 1}/{so_far.wanted}: {said}", file=sys.stderr)


def _show(found: Result) -> None:
    """The winner, its rivals, and on what they were measured."""
    from weft.cli.output import console, one_line, table

    best = found.best
    names = [o.name for o in found.objectives]
    several = len(names) > 1
    rivals = found.front if several else _ranked(found)[:LISTED]
    listed = table("trial", *(f">{one_line(n)}" for n in names), "settings",
                   title="Pareto front" if several else None)  # fmt: skip
    for t in rivals:
        mark = " *" if t.number == best.number else ""
        settings = ", ".join(f"{k}={_value(v)}" for k, v in t.settings.items())
        listed.add_row(f"{t.number}{mark}", *(f"{t.scores[n]:.6g}" for n in names), one_line(settings))
    console().print(listed)
    refused = sum(t.state == "pruned" for t in found.trials)
    print(f"\n{len(found.complete)} candidates measured" + (f", {refused} refused" if refused else ""))
    for o in found.objectives:
        print(
            f"{one_line(o.name)}: {best.scores[o.name]:.6g} on {one_line(o.validation)}, which chose it",
            end="",
        )
        if found.test is not None and o.name in found.test:
            print(f"; {found.test[o.name]:.6g} on {one_line(str(o.test))}")
        else:
            print("; not measured on other data (give test)")
    if found.tested > 1:
        print(f"the test data have been used for {found.tested} winners of this search")


def _ranked(found: Result) -> list[Trial]:
    o = found.objectives[0]
    sign = -1.0 if o.direction == "maximize" else 1.0
    return sorted((t for t in found.complete if t.repeats is None), key=lambda t: sign * t.scores[o.name])


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"[{', '.join(map(_value, value))}]" if isinstance(value, list) else str(value)
