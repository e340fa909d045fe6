"""The suites of real data, cut to a few steps: that they are made, run and kept. Needs WEFT_DATA."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from weft.bench.run import bench
from weft.bench.suites import lm, resnet, text, vision
from weft.bench.training import Fit

pytestmark = pytest.mark.skipif(not os.environ.get("WEFT_DATA"), reason="WEFT_DATA names no data")
SHORT = {"few": 64, "validation": 32, "train": 64}


@pytest.fixture
def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little data, one epoch, a cache of its own."""
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    for module in (resnet, text, lm, vision):
        for name in ("BASE", "EXPERT", "JOINT", "LORA"):
            fit = getattr(module, name, None)
            if isinstance(fit, Fit):
                monkeypatch.setattr(module, name, replace(fit, epochs=1))
    monkeypatch.setattr(vision, "SIZES", SHORT)
    monkeypatch.setattr(vision, "TEST", 40)
    for module in (text, lm):
        for name, size in (("FEW", 64), ("VALIDATION", 32), ("TRAIN", 64), ("TEST", 40)):
            monkeypatch.setattr(module, name, size)
    text.examples.cache_clear()
    lm.windows.cache_clear()


@pytest.mark.parametrize("suite", ["resnet", "text", "lm", "lora"])
def test_suites_are_made_run_and_kept(suite: str, short: None, tmp_path: Path) -> None:
    trained: list[str] = []
    names = ["linear", "tsv", "linear_bn"]
    found = bench(suite, names, samples=8, tune=False, progress=trained.append)
    assert any("training" in t for t in trained)
    assert {"base", "experts", "linear", "tsv"} <= {r.name for r in found.rows}
    assert found.lower_is_better == (suite in ("lm", "lora"))
    assert ("linear_bn" in {r.name for r in found.rows}) == (suite == "resnet")
    assert all(v > 0 for r in found.rows for v in r.tasks.values()) or suite == "text"
    again: list[str] = []
    bench(suite, ["linear"], tune=False, progress=again.append)
    assert not any("training" in t for t in again), "experts come from the cache"


def test_the_curve_over_the_number_of_tasks(short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.bench.page import page

    monkeypatch.setattr(vision, "TASKS", ("mnist", "kannada_mnist", "omniglot_alphabet"))
    found = bench("visionN", ["linear", "tsv"], tune=False)
    assert found.sizes == [2, 3] and len(found.at(2)) >= 5
    assert "number of tasks" in page(found)
