"""The platform: pools of methods over pools of models and tasks, on any module."""

from __future__ import annotations

import pytest
from torch import nn

from weft.bench.run import bench
from weft.bench.suite import Suite
from weft.bench.suites.digits import digits

pytest.importorskip("sklearn")


def test_methods_rank_on_any_module_and_suite() -> None:
    """M03: averages, task vectors, statistics and spectra on a suite made of a plain torch module, ranked as the
    survey of them ranks them where that carries over: base < average < task arithmetic < TSV ≤ experts."""
    given = digits(0)

    def network() -> nn.Module:
        return nn.Sequential(given.module())  # another module around the same network: all names differ

    def renamed(model: object) -> dict[str, object]:
        import weft

        return {f"0.{n}": t for n, t in weft.load(model).state_dict().items()}  # type: ignore[arg-type]

    experts = {t: renamed(m) for t, m in given.experts.items()}
    suite = Suite("wrapped", network, given.tasks, experts, renamed(given.base))  # type: ignore[arg-type]
    found = bench(suite, ["linear", "task_arithmetic", "ties", "esm", "tsv", "emr"], samples=32)
    at = {r.name: found.normalised(r) for r in found.rows if r.how != "fixed" or r.name in ("linear", "emr")}
    assert at["base"] < at["linear"] < at["task_arithmetic"] < at["tsv"] < at["experts"] == 1
    assert at["task_arithmetic"] < at["esm"]  # 32 unlabelled images a task
    assert at["emr"] > at["tsv"]  # told the task
    assert found.row("esm").seen == "unlabelled" and found.row("emr").per_task
    assert not found.skipped
