"""What is wrong with a recipe, and what is worth knowing: collected, each with its line and path."""

from __future__ import annotations

from dataclasses import dataclass, field

from weft.errors import Problems
from weft.recipes.yaml import Document, Path

OVERRIDDEN = 0
"""The line of a value that `--set` gave."""


def show_path(path: Path) -> str:
    """`("models", 1, "parameters")` → `"models[1].parameters"`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" if text else _shown(part)
    return text


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) <= 60 else repr(key)[:60]


@dataclass
class Findings:
    """Problems and notes of one document."""

    document: Document
    label: str = ""
    """How messages call the document, where a file has several."""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def problem(self, path: Path, message: str) -> None:
        text = self._told(path, message)
        if text not in self.problems:
            self.problems.append(text)

    def note(self, path: Path, message: str) -> None:
        text = self._told(path, message)
        if text not in self.notes:
            self.notes.append(text)

    def _told(self, path: Path, message: str) -> str:
        line = self.document.line(path)
        place = "--set" if line == OVERRIDDEN else f"line {line}" if line else ""
        where = ", ".join(p for p in (self.label, place, show_path(path)) if p)
        return f"{where}: {message}" if where else message


def raise_problems(origin: str, problems: list[str]) -> None:
    """`Problems` unless there are none."""
    if problems:
        count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise Problems(f"{origin} has {count}", problems)
