"""The table on the terminal: with rich where there is one to look at, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.demo.results import Results, Row, findings, percent
from weft.demo.tasks import CONTROL, TASKS

HEADINGS = ("model", "scale", "average", "±", "of experts", "worst task", CONTROL.name, "ms")
LEFT = {"model", "scale"}


def cells(results: Results, row: Row) -> tuple[str, ...]:
    """One row of the table as text, in the order of HEADINGS."""
    task, lowest = row.scores.worst
    return (
        row.label + (" *" if row.needs else ""),
        row.setting,
        percent(row.scores.average),
        f"{100 * row.scores.error:.1f}",
        percent(results.relative(row)),
        f"{task} {percent(lowest)}",
        percent(row.scores.accuracy.get(CONTROL.name)),
        "" if row.seconds is None else f"{1000 * row.seconds:.0f}",
    )


def notes(results: Results) -> list[str]:
    """What must be known to read the table."""
    lines = [
        f"Accuracy on {results.images['test']} held-out images in each of {len(TASKS)} tasks; ± is one "
        "standard error; 'of experts' is relative to the expert of each task.",
        f"'{CONTROL.name}' has no expert and counts in no average.",
    ]
    lines += [f"* {r.label}: {r.needs}." for r in results.rows if r.needs and not r.tuned]
    for row in results.rows:
        if row.spread is not None and (row.tuned or row.scale is None):
            deviation = f"{100 * row.spread:.1f} points"
            lines.append(f"{row.label}: mean over {len(results.seeds)} seeds, which deviate by {deviation}.")
    return lines


def print_table(results: Results, console: Console) -> None:
    """Print rows, notes and findings to the console."""
    body = [(r, cells(results, r)) for r in results.rows]
    if not console.is_terminal:
        _print_plain([c for _, c in body], console)
    else:
        _print_rich(body, console)
    for line in (*notes(results), "", *findings(results)):
        console.print(Text(line), style="dim" if line in notes(results) else None, soft_wrap=True)


def _print_plain(body: list[tuple[str, ...]], console: Console) -> None:
    lines = [HEADINGS, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    for line in lines:
        aligned = [
            c.ljust(w) if h in LEFT else c.rjust(w) for h, c, w in zip(HEADINGS, line, widths, strict=True)
        ]
        console.print(Text("  ".join(aligned).rstrip()), soft_wrap=True)


def _print_rich(body: list[tuple[Row, tuple[str, ...]]], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=True)
    top = max(r.scores.average for r, _ in body if r.kind == "merge" and not r.needs)
    previous = None
    for row, line in body:
        if previous is not None and row.kind != previous:
            table.add_section()
            table.add_row()
        previous = row.kind
        style = {"merge": "", "reference": "cyan", "control": "magenta"}[row.kind]
        if row.kind == "merge" and not row.needs and row.scores.average == top:
            style = "bold green"
        table.add_row(*(Text(c) for c in line), style=style)
    console.print(table)
