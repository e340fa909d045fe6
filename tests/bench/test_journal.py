"""A run that is stopped and goes on ends as one that was not; what was measured otherwise is not mixed in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.bench import run as running
from weft.bench.contenders import Contender, contenders
from weft.bench.journal import fingerprint
from weft.bench.page import page
from weft.bench.results import Results, combined, read
from weft.bench.run import bench
from weft.bench.suite import Suite, Task
from weft.errors import DataError, WeftError

METHODS = ["linear", "task_arithmetic", "regmean", "tsv"]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def small(seed: int, shift: float = 0.0, flipped: bool = False) -> Suite:
    """Two tasks, experts not trained but of the seed: what is measured differs from seed to seed."""
    generator = torch.Generator().manual_seed(seed)

    def task(name: str, column: int) -> Task:
        x = torch.randn(90, 6, generator=generator)
        y = (x[:, column] > 0).long()
        parts = {"train": (x[:30], y[:30]), "validation": (x[30:60], y[30:60])}
        return Task(name, {**parts, "test": (x[60:], 1 - y[60:] if flipped else y[60:])})

    def model(size: float) -> dict[str, Tensor]:
        made = network().state_dict()
        return {n: size * torch.randn(t.shape, generator=generator) for n, t in made.items()}

    tasks, base = [task("a", 0), task("b", 3)], model(1.0)
    experts = {t.name: {n: v + shift + d for (n, v), d in zip(base.items(), model(0.3).values(), strict=True)}
               for t in tasks}  # fmt: skip
    return Suite("small", network, tasks, experts, base)


def figures(results: Results) -> Any:
    """All but what a clock or the system's memory tells."""
    made = results.to_json()
    for row in made["rows"]:
        for run in row["runs"]:
            run.pop("seconds", None)
            run.pop("peak", None)
    return json.dumps({k: made[k] for k in ("rows", "seeds", "skipped", "about", "metric", "samples")})


def stop_at(count: int) -> Callable[[str], None]:
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if len(said) == count:
            raise KeyboardInterrupt

    return say


def test_stopped_anywhere_and_going_on_gives_the_same(tmp_path: Path) -> None:
    whole = bench(small, METHODS, seeds=2, samples=8, out=tmp_path / "whole.json")
    lines: list[str] = []
    bench(small, METHODS, seeds=2, samples=8, progress=lines.append)
    assert len(lines) == 2 * (3 + len(METHODS))
    for stop in range(1, len(lines) + 1):
        path, later = tmp_path / f"{stop}.json", list[str]()
        with pytest.raises(KeyboardInterrupt):
            bench(small, METHODS, seeds=2, samples=8, out=path, progress=stop_at(stop))
        if path.exists():  # readable, and shown
            assert "experts" in page(combined([read(path)])) and read(path).to_csv()
        found = bench(small, METHODS, seeds=2, samples=8, out=path, progress=later.append)
        assert figures(found) == figures(whole) == figures(read(path))
        measured = [line for line in later if "going on" not in line]
        # of what was done before only a seed's references are done again, where they were not yet all there
        assert len(measured) <= len(lines) - stop + 3 and set(measured) <= set(lines)
    assert "ties" not in figures(whole) and whole.to_json()["rows"][5]["runs"][0]["asked"]


def test_nothing_is_measured_twice_and_more_is_added(tmp_path: Path) -> None:
    path, said = tmp_path / "r.json", list[str]()
    first = bench(small, METHODS[:2], samples=8, out=path, command="weft bench one")
    again = bench(small, METHODS[:2], samples=8, out=path, progress=said.append, command="weft bench one")
    assert said == [f"small, seed 0: going on from 6 rows in {path}"]
    assert again.rows == first.rows and again.command == "weft bench one"
    more = bench(small, METHODS[2:], seeds=2, samples=8, out=path, tune=False, command="weft bench two")
    assert more.seeds == (0, 1) and {r.name for r in more.rows} >= set(METHODS)
    assert more.partly(more.row("linear")) == "seeds 0" and more.partly(more.row("tsv")) == ""
    assert more.command == "weft bench one; weft bench two"


def test_what_was_measured_on_other_models_or_data_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    bench(small, METHODS, seeds=2, samples=8, out=path)
    for name, changed in (("experts", {"shift": 0.1}), ("data", {"flipped": True})):

        def suite(seed: int, changed: Any = changed) -> Suite:
            return replace(small(seed, **changed) if seed else small(seed), name="small")

        suite.__name__ = "small"
        said: list[str] = []
        found = bench(suite, METHODS, seeds=2, samples=8, out=path, progress=said.append)
        assert [s for s in said if "seed 0" in s] == [f"small, seed 0: going on from 9 rows in {path}"]
        assert "are of other experts or data" in next(s for s in said if "seed 1" in s)
        fresh = bench(suite, METHODS, seeds=2, samples=8, out=tmp_path / f"{name}.json")
        assert figures(found) == figures(fresh)
    assert len({fingerprint(s) for s in (small(0), small(1), small(0, 0.1), small(0, flipped=True))}) == 4
    assert fingerprint(small(0)) == fingerprint(small(0))


@pytest.mark.parametrize("change", [{"params": {"scale": 0.25}}, {"tuned": {"scale": (0.2, 0.9)}}])
def test_a_contender_with_other_settings_is_measured_anew(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, said = tmp_path / "r.json", list[str]()
    bench(small, METHODS, samples=8, out=path)
    known = contenders()
    other = Contender(**{**vars(known["task_arithmetic"]), **change})
    monkeypatch.setattr("weft.bench.contenders.contenders", lambda: {**known, "task_arithmetic": other})
    found = bench(small, METHODS, samples=8, out=path, progress=said.append)
    assert said[1:] == ["small, seed 0: task_arithmetic"]
    rows = [r for r in found.rows if r.name == "task_arithmetic"]
    assert [r.how for r in rows] == ["fixed", "tuned"]
    assert rows[0].runs[0].params == change.get("params", {"scale": 0.3})
    assert rows[1].runs[0].params["scale"] in change.get("tuned", other.tuned)["scale"]


def test_files_that_a_run_cannot_go_on_from_are_refused_and_left_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    bench(small, ["linear"], samples=8, out=path)
    before = path.read_bytes()

    def never(seed: int) -> Suite:
        raise AssertionError("a suite was made")

    never.__name__ = "small"
    with pytest.raises(DataError, match=r"samples 8, not 16.*name another file, or remove it"):
        bench(never, ["linear"], samples=16, out=path)
    with pytest.raises(DataError, match="suite small, not digits"):
        bench("digits", ["linear"], samples=8, out=path)
    with monkeypatch.context() as patch:
        patch.setattr(running, "versions", lambda: {"weft": "99"})
        with pytest.raises(DataError, match=r"weft .*, not 99"):
            bench(never, ["linear"], samples=8, out=path)
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="no results"):
        bench(never, ["linear"], samples=8, out=tmp_path / "other.json")
    with pytest.raises(DataError, match="no folder"):
        bench(never, ["linear"], samples=8, out=tmp_path / "none" / "r.json")
    assert path.read_bytes() == before and (tmp_path / "other.json").read_text() == '{"a": 1}'
    assert issubclass(DataError, WeftError)


def test_what_failed_is_told_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, known = tmp_path / "r.json", contenders()

    def broken(*_: Any) -> Any:
        raise DataError("no luck")

    with monkeypatch.context() as patch:
        failing = replace(known["linear"], make=broken)
        patch.setattr("weft.bench.contenders.contenders", lambda: {**known, "linear": failing})
        assert bench(small, ["linear", "tsv"], samples=8, out=path).skipped == {"linear": "no luck"}
    assert read(path).skipped == {"linear": "no luck"}
    found = bench(small, ["linear", "tsv"], samples=8, out=path)
    assert found.skipped == {} and found.row("linear").runs


def test_the_command_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    import sys

    from weft.cli.main import main

    path = tmp_path / "r.json"
    real = running.trials

    def stopped(c: Contender, *rest: Any) -> Any:
        if c.name == "tsv":
            raise KeyboardInterrupt
        return real(c, *rest)

    def command(*more: str) -> int:
        asked = ["weft", "bench", "digits", "--methods", "linear,tsv", "--no-tune", *more]
        monkeypatch.setattr(sys, "argv", asked)
        try:
            main()
        except SystemExit as done:
            return int(done.code or 0)
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(running, "trials", stopped)
        assert command("--out", str(path)) == 130
        told = capsys.readouterr().err
        assert f"{path} holds what was measured" in told and "the same command goes on" in told
        assert {r.name for r in read(path).rows} == {"base", "experts", "ensemble", "joint", "linear"}
        assert command() == 130 and "--out FILE.json keeps" in capsys.readouterr().err
    assert command("--out", str(path)) == 0
    told, shown = (lambda c: (c.err, c.out))(capsys.readouterr())
    assert "going on from 5 rows" in told and "seed 0: tsv" in told and "seed 0: linear" not in told
    assert "tsv" in shown and {r.name for r in read(path).rows} >= {"linear", "tsv"}
