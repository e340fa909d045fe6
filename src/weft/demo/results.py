"""What the demo found out, as data: rows of a table, and what must be known to judge them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.demo.evaluate import Scores
from weft.demo.tasks import CONTROL, TASKS

Kind = Literal["reference", "merge", "control"]


@dataclass(frozen=True)
class Point:
    """One value of the scale, with the average accuracy on both splits; only the first was used to choose."""

    scale: float
    validation: float
    test: float


@dataclass(frozen=True)
class Row:
    """One model or merge, measured on the test split."""

    name: str
    label: str
    kind: Kind
    scores: Scores
    validation: float
    """Average accuracy on the validation split."""
    params: Mapping[str, Any] = field(default_factory=dict)
    scale: float | None = None
    tuned: bool = False
    """Whether the scale was chosen (on the validation split) or is the method's default."""
    needs: str = ""
    """What it takes beyond one set of weights at inference, or beyond the experts when it is made."""
    seconds: float | None = None
    """To read the files, merge and hand over the tensors; None for what is not merged."""
    spread: float | None = None
    """Standard deviation of the average over seeds, for random methods."""
    curve: tuple[Point, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.label} (tuned)" if self.tuned else self.label

    @property
    def setting(self) -> str:
        """How the scale came about, for the table."""
        if self.kind != "merge":
            return ""
        if self.scale is None:
            return "none to set"
        return f"{self.scale:g} on validation" if self.tuned else f"{self.scale:g} by default"


@dataclass(frozen=True)
class Results:
    """All rows and the circumstances."""

    rows: tuple[Row, ...]
    experts: Mapping[str, float]
    """Task → test accuracy of its expert, what `relative` is relative to."""
    images: Mapping[str, int]
    """Split → number of original images."""
    seeds: tuple[int, ...]
    versions: Mapping[str, str]
    date: str
    seconds: float

    def row(self, name: str, *, tuned: bool | None = None) -> Row:
        """The row of a method: the tuned one if there are two and it is not said which."""
        found = [r for r in self.rows if r.name == name and tuned in (None, r.tuned)]
        if not found:
            raise KeyError(name)
        return found[-1]

    @property
    def merges(self) -> list[Row]:
        return [r for r in self.rows if r.kind == "merge"]

    def relative(self, row: Row) -> float:
        return row.scores.relative(self.experts)

    def to_json(self) -> dict[str, Any]:
        """Plain data with stable keys. Accuracies are fractions of one."""
        return {
            "tasks": list(TASKS),
            "control": CONTROL.name,
            "experts": dict(self.experts),
            "images": dict(self.images),
            "seeds": list(self.seeds),
            "versions": dict(self.versions),
            "date": self.date,
            "seconds": self.seconds,
            "rows": [self._row_json(r) for r in self.rows],
        }

    def _row_json(self, row: Row) -> dict[str, Any]:
        task, lowest = row.scores.worst
        return {
            "name": row.name,
            "label": row.label,
            "kind": row.kind,
            "params": dict(row.params),
            "scale": row.scale,
            "tuned": row.tuned,
            "needs": row.needs,
            "accuracy": row.scores.accuracy,
            "average": row.scores.average,
            "standard_error": row.scores.error,
            "validation_average": row.validation,
            "relative": self.relative(row),
            "worst_task": task,
            "worst": lowest,
            "seconds": row.seconds,
            "spread_over_seeds": row.spread,
            "curve": [vars(p) for p in row.curve],
        }


def findings(results: Results) -> list[str]:
    """What the numbers say, in sentences made from them, pleasant or not."""
    said = []
    row = results.row
    base, mean = row("base"), row("linear")
    single = [r for r in results.merges if not r.needs]
    # picked by validation: the best of many test scores would be a score chosen on the test split
    best = max(single, key=lambda r: r.validation)
    told = (
        f"The single merged model that validation prefers is {best.title}: {percent(best.scores.average)} "
        f"on average, {percent(results.relative(best))} of the experts; the base has "
        f"{percent(base.scores.average)}."
    )
    said.append(told)
    said.append(_compare(best, row("ensemble"), "averaging the outputs of all five experts"))
    for name in ("ties", "ties_untrimmed", "dare_ties", "breadcrumbs"):
        if any(r.name == name for r in results.rows):
            said.append(_compare(row(name), row("task_arithmetic"), "tuned task arithmetic"))
    said.append(
        _compare(row("random"), base, "the base, from which it is as far away as tuned task arithmetic")
    )
    for knows in (r for r in results.merges if r.needs):
        said.append(
            f"{knows.label} is told which task an image belongs to, and then reaches "
            f"{percent(knows.scores.average)}: it is no rival of the single models, but of keeping five."
        )
    if any(r.name == "joint" for r in results.rows):
        gap = row("joint").scores.average - best.scores.average
        said.append(
            f"Training one model on the data of all tasks reaches {percent(row('joint').scores.average)}: "
            f"{100 * gap:.1f} points are what not having the data together costs here."
        )
    kept = [r.scores.accuracy[CONTROL.name] for r in (base, mean, best)]
    told = (
        f"On upright digits, which no expert was trained on, the base has {percent(kept[0])}, the mean of "
        f"the experts {percent(kept[1])} and {best.title} {percent(kept[2])}"
    )
    said.append(told + (": merging costs some of what the base knew." if kept[2] < kept[0] else "."))
    return said


def _compare(row: Row, other: Row, what: str) -> str:
    difference, error = row.scores.versus(other.scores)
    if abs(difference) <= 2 * error:
        verdict = "cannot be told apart from"
    else:
        verdict = "is better than" if difference > 0 else "is worse than"
    change = f"{100 * difference:+.1f}".replace("-", "\N{MINUS SIGN}")
    change = f"{change} ± {100 * error:.1f}".replace(" ", "\N{NO-BREAK SPACE}")
    return f"{row.title} {verdict} {what} ({change} points)."


def percent(fraction: float | None) -> str:
    """0.8374 → `"83.7 %"` with a thin, unbreakable space; nothing for None."""
    return "" if fraction is None else f"{100 * fraction:.1f}\u202f%"
