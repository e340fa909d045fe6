"""The table on the terminal: with rich where there is one to look at, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.bench.results import Results, Row, settings

HEADINGS = (
    "method", "setting", "has seen", "mean", "±", "of experts", "worst task", "unseen", "damaged", "ECE", "params",
    "seconds", "MiB",
)  # fmt: skip
LEFT = {"method", "setting", "has seen", "worst task"}


def group(row: Row) -> str:
    """Which table a row belongs to: what may be compared with what."""
    if row.how == "reference":
        return "reference"
    if row.seen == "test-time":
        return "test-time"
    if row.per_task:
        return "task known"
    return "routed" if row.family == "routed" else "static"


TITLES = {
    "reference": "references",
    "static": "one set of weights",
    "routed": "experts kept, chosen by the input",
    "task known": "experts kept, the task must be known",
    "test-time": "adapted on the inputs of the test itself, without labels: not comparable with the others",
}  # fmt: skip


def grouped(results: Results, size: int | None = None) -> dict[str, list[Row]]:
    """Group → its rows, best last (references in their order)."""
    found: dict[str, list[Row]] = {g: [] for g in TITLES}
    for row in results.at(size):
        found[group(row)].append(row)
    for g, rows in found.items():
        if g != "reference":
            rows.sort(key=results.normalised)
    return {g: rows for g, rows in found.items() if rows}


def number(results: Results, value: float | None) -> str:
    """A score as the table shows it: percent, or the perplexity."""
    if value is None:
        return ""
    return f"{value:.2f}" if results.lower_is_better else f"{100 * value:.1f}"


def cells(results: Results, row: Row) -> tuple[str, ...]:
    """One row as text, in the order of HEADINGS."""
    show: Callable[[float | None], str] = lambda v: number(results, v)  # noqa: E731
    task, low = results.worst(row)
    ece, seconds, peak = row.average("ece"), row.average("seconds"), row.average("peak")
    unseen, damaged = row.averages("unseen"), row.averages("corrupted")
    how = settings(row) or ("default" if row.how == "fixed" else "")
    return (
        row.label,
        " · ".join(filter(None, [f"{how} (tuned)" if row.how == "tuned" else how, results.partly(row)])),
        row.seen,
        show(row.mean),
        show(row.interval),
        f"{100 * results.normalised(row):.1f}",
        f"{task} {100 * low:.0f}",
        show(sum(unseen.values()) / len(unseen)) if unseen else "",
        show(sum(damaged.values()) / len(damaged)) if damaged else "",
        "" if ece is None else f"{100 * ece:.1f}",
        millions(row.average("parameters")),
        "" if seconds is None else f"{seconds:.2g}",
        "" if peak is None else f"{peak:.0f}",
    )


def millions(n: float | None) -> str:
    return "" if n is None else f"{n / 1e6:.2f} M" if n >= 1e4 else f"{n:.0f}"


def notes(results: Results) -> list[str]:
    """What must be known to read the table."""
    what = "Perplexity (lower is better)" if results.lower_is_better else "Accuracy in percent"
    n = len(results.seeds)
    spread = f"± is half of the 95 % interval of the mean over {n} seeds." if n > 1 else "One seed: no ±."
    told = [
        f"{what} on test; 'of experts' is relative to each task's expert, 'worst task' is the least of those. "
        f"{spread}",
        "Tuned: chosen on validation data; default: as published or as weft's function has it.",
    ]
    if results.samples is not None:
        told.append(f"Methods that look at data saw {results.samples} examples a task.")
    told += [str(n) for n in results.notes]
    reasons: dict[str, list[str]] = {}
    for name, why in results.skipped.items():
        reasons.setdefault(why, []).append(name)
    return told + [f"Left out ({why}): {', '.join(names)}." for why, names in reasons.items()]


def print_table(results: Results, console: Console) -> None:
    """Print the rows of every number of tasks, then the notes."""
    for size in reversed(results.sizes):
        if len(results.sizes) > 1:
            console.print(Text(f"{size} tasks", style="bold"))
        groups = {g: [cells(results, r) for r in rows] for g, rows in grouped(results, size).items()}
        if console.is_terminal:
            _print_rich(groups, console)
        else:
            _print_plain(groups, console)
    for line in notes(results):
        console.print(Text(line), style="dim", soft_wrap=True)


def _print_plain(groups: dict[str, list[tuple[str, ...]]], console: Console) -> None:
    lines = [HEADINGS, *(line for rows in groups.values() for line in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]

    def shown(line: tuple[str, ...]) -> str:
        found = [
            c.ljust(w) if h in LEFT else c.rjust(w) for h, c, w in zip(HEADINGS, line, widths, strict=True)
        ]
        return "  ".join(found).rstrip()

    console.print(Text(shown(HEADINGS)), soft_wrap=True)
    for g, rows in groups.items():
        console.print(Text(f"-- {TITLES[g]}"), soft_wrap=True)
        for line in rows:
            console.print(Text(shown(line)), soft_wrap=True)


def _print_rich(groups: dict[str, list[tuple[str, ...]]], console: Console) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in LEFT else "right", no_wrap=True)
    for g, rows in groups.items():
        table.add_row(Text(TITLES[g], style="italic"))
        for line in rows:
            style = "cyan" if g == "reference" else "bold green" if line is rows[-1] and g == "static" else ""
            table.add_row(*(Text(c) for c in line), style=style)
        table.add_section()
    console.print(table)
