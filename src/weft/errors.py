"""What weft raises: one sentence that names the file, the tensor and the remedy.

Exit statuses of the command line follow from the class: 2 for a request that cannot be meant (usage),
1 for data that cannot be used. Nothing else is meant to escape from weft.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class WeftError(Exception):
    """Base of every error weft raises on purpose."""

    exit_status = 1


class DataError(WeftError):
    """A file, tensor or disk that cannot be used as it is."""

    exit_status = 1


class UnsafeFile(DataError):
    """A file that breaks one of the reader's rules. `code` names the rule (see checkpoints/limits.py)."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{message} [{code}]")
        self.code = code


class UsageError(WeftError, ValueError):
    """A request that cannot be meant: an unknown key, a value out of range, a missing base."""

    exit_status = 2


class MissingExtra(UsageError, ImportError):
    """An optional dependency is needed; the message says which extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}: install weft[{extra}]")


class Problems(UsageError):
    """Several problems found at once, one a line."""

    def __init__(self, heading: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{heading}:", *(f"  - {p}" for p in self.problems)]))


class DataProblems(DataError):
    """Several problems of the data found at once, one a line."""

    def __init__(self, heading: str, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join([f"{heading}:", *(f"  - {p}" for p in self.problems)]))


class WeftWarning(UserWarning):
    """Something the user should know that is not an error."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'density'?"`, or an empty string when nothing is near."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
