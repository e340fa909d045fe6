"""Section 2.4.2.1: mergers compared as multi-task learners."""

from __future__ import annotations

import pytest

from weft.bench.suites.digits import digits
from weft.systems.multitask import RECIPES, multitask

pytest.importorskip("sklearn")


def test_merging_makes_multi_task_learners_in_the_known_order() -> None:
    """S59: average < task arithmetic < layer-wise AdaMerging < experts, at the published settings; a task's adapter
    mends nearly all.

    TIES, which the survey has above task arithmetic, is below the average here, and a factor that validation labels
    choose takes task arithmetic above AdaMerging, which sees none.
    """
    found = multitask(digits(0).first(4))
    assert not found.skipped
    rows = {name: found.row(name) for name in RECIPES}
    at = {name: found.normalised(row) for name, row in rows.items()}
    assert at["linear"] + 0.02 < at["task_arithmetic"]
    assert at["task_arithmetic"] + 0.02 < at["adamerging"] < 1
    assert at["adamerging"] < at["concrete"] < 1
    assert at["surgery"] > 0.95
    assert rows["adamerging"].seen == rows["concrete"].seen == "test-time" and rows["ties"].seen == "none"
    assert all(len(row.tasks) == 4 for row in rows.values())
