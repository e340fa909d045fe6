"""Rules of the tree that only show in a clean checkout."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their names alone, and refuses the second."""
    tests = Path(__file__).parents[1]
    names = Counter(p.name for p in tests.rglob("test_*.py"))
    assert not [n for n, times in names.items() if times > 1]
