"""`check`: everything that can be said about a recipe before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoints.refs import Kind, Ref, parse_ref
from weft.errors import DataError, DataProblems, Problems, UsageError, WeftError, did_you_mean
from weft.recipes import mergekit
from weft.recipes.build import Loader, build, documents
from weft.recipes.read import Readable, understand
from weft.recipes.recipe import Named, Recipe, target


@dataclass(frozen=True)
class Report:
    """What `check` found. `ok` is True when the recipe can be run as far as is known."""

    origin: str
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    """What weft does otherwise than MergeKit for this recipe; empty where it is not MergeKit's."""
    summary: tuple[dict[str, Any], ...] = field(default=())
    """Each document as resolved."""
    exit_status: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        parts = [f"{self.origin}: {'no problem found' if self.ok else 'cannot be run'}"]
        for heading, lines in (
            ("problems", self.problems), ("notes", self.notes),
            ("otherwise than MergeKit", self.differences),
        ):  # fmt: skip
            if lines:
                parts += ["", f"{heading}:", *(f"  - {line}" for line in lines)]
        for told in self.summary:
            parts += ["", f"{told.get('name') or 'recipe'}:"]
            for key, value in told.items():
                if isinstance(value, dict):
                    parts += [f"  {key}:", *(f"    {k}: {v}" for k, v in value.items())]
                elif key == "slices":
                    parts += [f"  slices[{i}]: {_brief(one)}" for i, one in enumerate(value)]
                elif key != "name":
                    parts.append(f"  {key}: {', '.join(value) if isinstance(value, list) else value}")
        return "\n".join(parts)

    def to_json(self) -> dict[str, Any]:
        """The report as plain data, for `weft check --json`."""
        return {
            "origin": self.origin, "ok": self.ok, "problems": list(self.problems), "notes": list(self.notes),
            "differences": list(self.differences), "documents": list(self.summary),
        }  # fmt: skip


def check(
    source: Readable, set: Sequence[str] = (), *, headers: bool = False, loader: Loader | None = None
) -> Report:
    """Read a recipe and report on it; raises nothing but what is no WeftError.

    Every local path must exist. With `headers` the models' headers are read as well, so that missing
    tensors and shapes that differ are reported; no tensor's values ever are.
    """
    try:
        reading = understand(source, set)
    except WeftError as error:
        return Report(str(source)[:200], _lines(error), exit_status=error.exit_status)
    origin, problems, notes = reading.origin, list(reading.problems), list(reading.notes)
    status = 2 if problems else 0
    differences: list[str] = []
    for recipe in reading.recipes:
        for text in mergekit.differences(recipe):
            label = f"{recipe.name}: " if recipe.name and len(reading.recipes) > 1 else ""
            differences.append(label + text)
    if reading.recipes:
        notes += _unused(reading.recipes) if not problems else []
        missing = _missing_paths(reading.recipes, notes)
        status = status or (1 if missing else 0)
        problems += missing
    if headers and not problems:
        try:
            build(target(reading.recipes), loader=loader)
        except WeftError as error:
            problems += _lines(error)
            status = error.exit_status
    summary = tuple(r.describe() for r in reading.recipes)
    return Report(origin, tuple(problems), tuple(notes), tuple(differences), summary, status)


def _brief(one: dict[str, Any]) -> str:
    """A slice in one line: `a [0, 4], b [2, 6]; weight: 0.5`."""
    told = [f"{k}: {v}" for k, v in (one.get("parameters") or {}).items()]
    return "; ".join([", ".join(one["models"]), *told])


def _lines(error: WeftError) -> tuple[str, ...]:
    return tuple(error.problems) if isinstance(error, Problems | DataProblems) else (str(error),)


def _missing_paths(recipes: Sequence[Recipe], notes: list[str]) -> list[str]:
    """A line for every local path that does not exist, each once."""
    problems: list[str] = []
    for ref in _references(recipes):
        for part in (ref, ref.lora):
            if part is None or part.kind is Kind.URL:
                continue
            path = Path(part.path)
            try:
                there = path.exists()
            except (OSError, ValueError) as error:
                there, path = False, Path(str(error)[:80])
            if there:
                continue
            if part.kind is Kind.HUB:
                text = f"{part.path} is no local path, so it is taken for a model of the Hugging Face Hub"
                notes.extend([text] if text not in notes else [])
                continue
            text = f"{part.path} does not exist{_near(path)}"
            problems.extend([text] if text not in problems else [])
    return problems


def _near(path: Path) -> str:
    try:
        return did_you_mean(path.name, (p.name for p in path.parent.iterdir()))
    except OSError:
        return ""


def _references(recipes: Sequence[Recipe]) -> list[Ref]:
    found: list[Ref] = []
    for recipe in recipes:
        for inner in documents(recipe):
            for source in (*inner.references, *inner.measured):
                if isinstance(source, Recipe | Named):
                    continue
                try:
                    ref = parse_ref(source) if isinstance(source, str) else source
                except (UsageError, DataError):
                    continue
                if ref not in found:
                    found.append(ref)
    return found


def _unused(recipes: Sequence[Recipe]) -> list[str]:
    used = documents(target(list(recipes)))
    return [
        f"document {r.name!r} is not used by the result; build it by its name"
        for r in recipes
        if not any(r is u for u in used)
    ]
