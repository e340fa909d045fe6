"""Results as plain data: one row a contender and setting, one measurement a seed; to and from JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from weft.errors import DataError, UsageError

FORMAT = 1
How = Literal["fixed", "tuned", "reference"]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t for 95 %, by degrees of freedom from 1."""


@dataclass(frozen=True)
class Measured:
    """One model of one seed."""

    seed: int
    tasks: dict[str, float]
    """Task → accuracy or perplexity on test."""
    ece: float | None = None
    """Mean calibration error over the tasks."""
    unseen: dict[str, float] = field(default_factory=dict)
    corrupted: dict[str, float] = field(default_factory=dict)
    """Damage → mean over the tasks."""
    validation: float | None = None
    """Mean over tasks of the validation score relative to the expert's."""
    params: dict[str, Any] = field(default_factory=dict)
    parameters: float | None = None
    seconds: float | None = None
    peak: float | None = None
    """MiB beyond what was held before."""
    experts: str = ""
    """Hash of the models and data; of what `asked` for. Both are there in files that `weft.bench` wrote."""
    asked: str = ""

    def rounded(self) -> Measured:
        """Numbers to five digits, which is what files hold."""

        def each(values: dict[str, float]) -> dict[str, float]:
            return {t: five(v) for t, v in values.items()}

        def five(v: float) -> float:
            return float(f"{v:.5g}")

        def maybe(v: float | None) -> float | None:
            return None if v is None else five(v)

        return replace(
            self, tasks=each(self.tasks), unseen=each(self.unseen), corrupted=each(self.corrupted),
            ece=maybe(self.ece), validation=maybe(self.validation), parameters=maybe(self.parameters),
            seconds=maybe(self.seconds), peak=maybe(self.peak),
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    label: str
    family: str
    how: How
    seen: str
    """none, unlabelled, labelled or test-time; of references, what they are."""
    size: int
    """Number of tasks merged."""
    runs: tuple[Measured, ...]
    per_task: bool = False
    """The task must be known at inference."""

    @property
    def mean(self) -> float:
        return mean(mean(r.tasks.values()) for r in self.runs)

    @property
    def interval(self) -> float | None:
        """Half of the 95 % confidence interval of the mean over seeds; None for one seed."""
        return half_interval([mean(r.tasks.values()) for r in self.runs])

    @property
    def tasks(self) -> dict[str, float]:
        """Task → mean over the seeds."""
        return {t: mean(r.tasks[t] for r in self.runs) for t in self.runs[0].tasks}

    def average(self, name: str) -> float | None:
        """Mean over seeds of ece, seconds, peak, parameters or validation; None where it is not known."""
        found = [v for r in self.runs if (v := getattr(r, name)) is not None]
        return mean(found) if found else None

    def averages(self, name: str) -> dict[str, float]:
        """The same for unseen and corrupted, by name."""
        first: dict[str, float] = getattr(self.runs[0], name)
        return {k: mean(getattr(r, name)[k] for r in self.runs) for k in first}


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    suite: str
    about: str
    metric: str
    rows: tuple[Row, ...]
    seeds: tuple[int, ...]
    samples: int | None = None
    """Examples a task that data-driven methods saw; None in old files, and of different numbers shown as one."""
    command: str = ""
    machine: str = ""
    date: str = ""
    seconds: float = 0.0
    versions: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Contender → why it is not in the table."""
    notes: Sequence[str] = ()

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "perplexity"

    @property
    def sizes(self) -> list[int]:
        return sorted({r.size for r in self.rows})

    def partly(self, row: Row) -> str:
        """The seeds of a row that was not run with all of them, or an empty string."""
        return "" if len(row.runs) == len(self.seeds) else f"seeds {', '.join(str(r.seed) for r in row.runs)}"

    def row(self, name: str, how: How | None = None, size: int | None = None) -> Row:
        """A row by name; the tuned one, where there are two, unless `how` says otherwise. KeyError without one."""
        found = [
            r for r in self.rows
            if r.name == name and (how is None or r.how == how) and r.size == (size or self.sizes[-1])
        ]  # fmt: skip
        if not found:
            raise KeyError(name)
        return next((r for r in found if r.how == "tuned"), found[0])

    def at(self, size: int | None = None) -> list[Row]:
        """The rows of one number of tasks, the largest by default."""
        return [r for r in self.rows if r.size == (size or self.sizes[-1])]

    def relative(self, row: Row, seed: int | None = None) -> dict[str, float]:
        """Task → score relative to the expert's of the same seed: a / aₑ, or pₑ / p for perplexities."""
        experts = {r.seed: r.tasks for r in self.row("experts", size=row.size).runs}
        per = [
            {t: ratio(v, experts[r.seed][t], self.lower_is_better) for t, v in r.tasks.items()}
            for r in row.runs
            if seed is None or r.seed == seed
        ]
        return {t: mean(p[t] for p in per) for t in per[0]}

    def normalised(self, row: Row) -> float:
        return mean(self.relative(row).values())

    def worst(self, row: Row) -> tuple[str, float]:
        """The task that reaches least of its expert, and that share, over the seeds' mean."""
        return min(self.relative(row).items(), key=lambda item: item[1])

    def lowest(self, row: Row) -> float:
        """Mean over the seeds of the worst task's share of its expert."""
        return mean(min(self.relative(row, r.seed).values()) for r in row.runs)

    # -- files ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Plain data, numbers rounded to what is meant."""
        made: dict[str, Any] = asdict(self)
        made["rows"] = [_row(r) for r in self.rows]
        made["seconds"] = round(self.seconds, 1)
        return {"weft_bench": FORMAT, **made}

    def to_csv(self) -> str:
        """One line a row, with all that the table shows."""
        rows = self.at()
        names = list(self.row("experts").tasks)
        unseen = list(rows[0].averages("unseen"))
        damages = list(rows[0].averages("corrupted"))
        out = io.StringIO()
        write = csv.writer(out, lineterminator="\n").writerow
        write(["size", "name", "family", "setting", "seen", "task_known", "params", "mean", "interval",
               "normalised", "worst_task", "worst_normalised", "ece", *names, *(f"unseen {u}" for u in unseen),
               *(f"corrupted {d}" for d in damages), "parameters", "seconds", "peak_mib"])  # fmt: skip
        for r in self.rows:
            task, low = self.worst(r)
            apart, damaged = r.averages("unseen"), r.averages("corrupted")
            write([
                r.size, r.name, r.family, r.how, r.seen, int(r.per_task), settings(r),
                *map(_cell, (r.mean, r.interval, self.normalised(r))), task, _cell(low), _cell(r.average("ece")),
                *(_cell(r.tasks.get(n)) for n in names), *(_cell(apart.get(u)) for u in unseen),
                *(_cell(damaged.get(d)) for d in damages),
                *map(_cell, (r.average("parameters"), r.average("seconds"), r.average("peak"))),
            ])  # fmt: skip
        return out.getvalue()


def combined(parts: Sequence[Results]) -> Results:
    """Runs of one suite as one: of the same seeds all rows, then over different seeds what each row has of them.

    UsageError for different suites, or seeds that overlap in part.
    """
    groups: dict[tuple[int, ...], Results] = {}
    for p in parts:
        seen = groups.get(p.seeds)
        groups[p.seeds] = p if seen is None else _together(seen, p)
    first, *others = sorted(groups.values(), key=lambda p: p.seeds)
    seeds = [s for p in (first, *others) for s in p.seeds]
    if any(p.suite != first.suite for p in parts) or len(set(seeds)) < len(seeds):
        raise UsageError("results are combined that are of one suite, of the same seeds or of others")
    rows: dict[tuple[str, str, int], Row] = {}
    for row in (r for p in (first, *others) for r in p.rows):
        known = rows.setdefault((row.name, row.how, row.size), row)
        if known is not row:
            rows[row.name, row.how, row.size] = replace(known, runs=(*known.runs, *row.runs))
    return replace(
        first, rows=tuple(rows.values()), seeds=tuple(seeds), seconds=sum(p.seconds for p in parts),
        command="; ".join(dict.fromkeys(p.command for p in parts)),
        samples=first.samples if all(p.samples == first.samples for p in parts) else None,
        skipped={k: v for p in parts for k, v in p.skipped.items() if not any(k == n for n, _, _ in rows)},
    )  # fmt: skip


def _together(a: Results, b: Results) -> Results:
    """Two runs of the same seeds with different contenders."""
    more = tuple(r for r in b.rows if not any(_same(r, known) for known in a.rows))
    return replace(
        a, rows=(*a.rows, *more), skipped={**a.skipped, **b.skipped}, seconds=a.seconds + b.seconds,
        command=a.command if a.command == b.command else f"{a.command}; {b.command}",
    )  # fmt: skip


def _same(a: Row, b: Row) -> bool:
    return (a.name, a.how, a.size) == (b.name, b.how, b.size)


def ratio(value: float, expert: float, lower_is_better: bool) -> float:
    """Score relative to the expert's, higher is better."""
    above, below = (expert, value) if lower_is_better else (value, expert)
    return above / below if below else math.nan


def half_interval(values: Sequence[float]) -> float | None:
    """t · s / √n at 95 %; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    t = T95[n - 2] if n - 2 < len(T95) else 1.96
    return t * stdev(values) / math.sqrt(n)


def settings(row: Row) -> str:
    """`scale=0.3`, or the values of all seeds where they differ."""
    keys = list(dict.fromkeys(k for r in row.runs for k in r.params))
    told = []
    for k in keys:
        values = list(dict.fromkeys(_short(r.params.get(k)) for r in row.runs))
        told.append(f"{k}={'/'.join(values)}")
    return " ".join(told)


def _short(v: Any) -> str:
    return f"{v:g}" if isinstance(v, float) else str(v)


def _cell(v: float | None) -> str:
    return "" if v is None else f"{v:.6g}"


def _row(row: Row) -> dict[str, Any]:
    runs = [asdict(m.rounded()) for m in row.runs]
    return {**asdict(row), "runs": [{k: v for k, v in r.items() if v not in (None, {}, "")} for r in runs]}


def from_json(data: Any, where: str = "the file") -> Results:
    """Results from plain data. DataError for what is none."""
    if not isinstance(data, dict) or data.get("weft_bench") != FORMAT:
        raise DataError(f"{where} holds no results of weft bench (format {FORMAT})")
    try:
        rows = tuple(Row(**{**r, "runs": tuple(Measured(**run) for run in r["runs"])}) for r in data["rows"])
        rest = {k: v for k, v in data.items() if k not in ("rows", "weft_bench", "seeds")}
        return Results(rows=rows, seeds=tuple(data["seeds"]), **rest)
    except (KeyError, TypeError) as error:
        raise DataError(f"{where} holds incomplete results: {error}") from None


def read(path: str | Path) -> Results:
    """Results from a JSON file."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as results: {error}") from None
    return from_json(data, str(path))


def write(results: Results, path: str | Path) -> None:
    """One line a run: small, and readable in a diff."""
    data = results.to_json()
    rows = data.pop("rows")
    head = json.dumps(data, ensure_ascii=False, indent=1)
    body = ",\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    write_text(path, f'{head[:-2]},\n "rows": [\n{body}\n]}}\n')


def write_text(path: str | Path, text: str) -> None:
    """A file that has its name only when it is whole. DataError where it cannot be written."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error}") from None
