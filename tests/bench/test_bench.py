"""The benchmark's machinery on the demo's shipped experts: nothing is trained but a few steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.bench.cache import code, stored
from weft.bench.contenders import Contender, Outcome, contenders
from weft.bench.page import page
from weft.bench.results import Results, from_json, read, write
from weft.bench.run import bench
from weft.bench.score import calibration_error, score
from weft.bench.setting import Setting, State
from weft.bench.suite import Suite, Task
from weft.bench.table import cells, grouped
from weft.errors import DataError, UsageError, WeftError

pytest.importorskip("sklearn")

METHODS = ["linear", "task_arithmetic", "ties", "tsv", "tall_masks"]


@pytest.fixture(scope="module")
def results() -> Results:
    return bench("digits", METHODS)


def test_the_order_of_theory_holds_on_real_tasks(results: Results) -> None:
    """Average < task arithmetic < spectral < experts kept ≤ experts, on the demo's digits."""
    at = {n: results.normalised(results.row(n)) for n in (*METHODS, "base", "experts", "joint")}
    assert (
        at["base"] < at["linear"] < at["task_arithmetic"] < at["tsv"] < at["tall_masks"] <= at["experts"] == 1
    )
    assert at["joint"] > at["tsv"]


def test_rows_say_what_was_seen_tuned_and_kept(results: Results) -> None:
    fixed, tuned = (results.row("task_arithmetic", how) for how in ("fixed", "tuned"))
    assert fixed.runs[0].params == {"scale": 0.3} and fixed.seen == "none"
    assert (tuned.runs[0].validation or 0) >= (fixed.runs[0].validation or 0)
    masks, one = results.row("tall_masks"), results.row("linear")
    assert masks.per_task and not one.per_task
    n = one.average("parameters")
    assert n and masks.average("parameters") == pytest.approx(2 * n + 5 * n / 32)
    assert set(one.averages("unseen")) == {"upright"} and set(one.averages("corrupted")) == {
        "noise",
        "blur",
        "contrast",
    }
    assert not masks.averages("unseen")  # no mask is of a task nobody trained for
    task, share = results.worst(one)
    assert share == min(results.relative(one).values()) and share == pytest.approx(results.lowest(one))
    assert task in one.tasks


def test_scales_are_tried_on_a_line_where_merges_lie_on_one() -> None:
    """What is chosen so is what merging anew for every value would choose; what does not lie on a line is made."""
    from dataclasses import replace

    from weft.bench.run import along
    from weft.bench.suites.digits import digits

    setting = Setting(digits(0), 8)
    calls: list[object] = []
    made_by = contenders()["tsv"]

    def counted(setting: Setting, params: Mapping[str, Any]) -> Outcome:
        calls.append(params)
        return made_by.make(setting, params)

    def bent(setting: Setting, params: Mapping[str, Any]) -> Outcome:
        return counted(setting, {"scale": params["scale"] ** 2})

    values = (0.5, 1.0, 1.5, 2.0)
    start = made_by.make(setting, {})
    for make, count in ((counted, 2), (bent, 4)):
        calls.clear()
        tried = list(along(replace(made_by, make=make), setting, "scale", values, start))
        assert len(calls) == count and [v for v, _ in tried] == list(values)
        for value, outcome in tried:
            real = make(setting, {"scale": value}).state
            assert outcome.state is not None and real is not None
            assert all(torch.allclose(t, real[n], atol=2e-3) for n, t in outcome.state.items())


def test_results_survive_files(results: Results, tmp_path: Path) -> None:
    write(results, tmp_path / "r.json")
    again = read(tmp_path / "r.json")
    for a, b in zip(results.rows, again.rows, strict=True):
        assert (a.name, a.how, a.family) == (b.name, b.how, b.family)
        assert a.mean == pytest.approx(b.mean, abs=1e-4)
    assert again.to_json() == read(tmp_path / "r.json").to_json()
    lines = results.to_csv().splitlines()
    assert len(lines) == 1 + len(results.rows) and all(n in lines[0] for n in ("rotated", "unseen upright"))
    with pytest.raises(DataError, match="no results"):
        from_json({"weft_bench": 99})
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken\.json"):
        read(tmp_path / "broken.json")


def test_the_page_is_whole_and_escapes_names(results: Results) -> None:
    from dataclasses import replace

    html = page(replace(results, about="<script>alert(1)</script>"))
    assert "<script>alert" not in html and "http" not in html.replace("http-equiv", "")
    for row in results.rows:
        assert row.label in html
    assert html.count("<svg") == 2 and "class='heat'" in html


def test_digits_of_other_seeds_are_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.bench.suites.digits import digits
    from weft.demo import train

    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(train, "BASE_EPOCHS", 1)
    monkeypatch.setattr(train, "EXPERT_EPOCHS", 1)
    said: list[str] = []
    first, again, other = (digits(s, None, said.append) for s in (1, 1, 2))
    assert len(said) == 2, "a seed is trained once"
    a, b, c = (s.models[0].state_dict()["layers.0.weight"] for s in (first, again, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert first.base is not None and first.joint is not None


def test_groups_keep_apart_what_may_not_be_compared(results: Results) -> None:
    groups = grouped(results)
    assert {r.name for r in groups["task known"]} == {"tall_masks"}
    assert {r.name for r in groups["reference"]} == {"base", "experts", "ensemble", "joint"}
    assert all(len(cells(results, r)) == 13 for r in results.rows)


def test_a_suite_of_ones_own_takes_twenty_lines() -> None:
    """Own experts and loaders: two binary tasks, heads that are the tasks' own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator)

    def task(name: str, column: int) -> Task:
        y = (x[:, column] > 0).long()
        batches = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 200, 50)]
        return Task(name, {"test": batches, "validation": batches}, private={"1.bias": torch.zeros(2)})

    def expert(column: int) -> dict[str, Tensor]:
        w = torch.zeros(6, 6)
        w[0, column] = 1.0
        head = torch.tensor([[-4.0, 0, 0, 0, 0, 0], [4.0, 0, 0, 0, 0, 0]])
        return {"0.weight": w, "1.weight": head, "1.bias": torch.zeros(2)}

    def network() -> nn.Module:
        first = nn.Linear(6, 6, bias=False)
        return nn.Sequential(first, nn.Linear(6, 2))

    base = {**expert(0), "0.weight": torch.zeros(6, 6), "1.bias": torch.full((2,), 99.0)}
    suite = Suite("mine", network, [task("a", 0), task("b", 3)], {"a": expert(0), "b": expert(3)}, base)
    found = weft.bench(suite, ["linear", "regmean" if "regmean" in contenders() else "tsv"])  # type: ignore[operator]
    assert found.row("experts").mean == 1.0
    assert 0.6 < found.row("linear").mean < 1.0
    assert found.row("base").mean < 0.6


def test_own_contenders_run_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.bench import run as module

    def make(setting: Setting, params: object) -> Outcome:
        assert setting.base is not None
        state: State = setting.base.state_dict()
        return Outcome({n: t * torch.nan for n, t in state.items()})

    broken = Contender("broken", "broken", make, "average")
    monkeypatch.setattr(module, "chosen", lambda names, setting: ([broken], {}))
    found = bench("digits")
    assert "not finite" in found.skipped["broken"]  # told, not silently NaN


def test_perplexity_is_better_when_lower() -> None:
    def network() -> nn.Module:
        return nn.Embedding(4, 4)

    def expert(sure: float) -> dict[str, Tensor]:
        return {"weight": sure * torch.eye(4).roll(1, 1)}

    tokens = torch.arange(8)[None] % 4
    data = (tokens[:, :-1], tokens[:, 1:])
    tasks = [Task(n, {"test": data}, metric="perplexity") for n in ("a", "b")]
    suite = Suite("cycle", network, tasks, {"a": expert(5.0), "b": expert(5.0)}, expert(0.0))
    found = bench(suite, ["linear"])
    assert found.lower_is_better and found.row("base").mean == pytest.approx(4.0)
    assert found.normalised(found.row("base")) < found.normalised(found.row("linear")) == pytest.approx(1.0)


def test_calibration_error_of_known_confidence() -> None:
    right = torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert calibration_error(right, torch.full((4,), 0.5)) == pytest.approx(0.0)
    assert calibration_error(right, torch.full((4,), 0.99)) == pytest.approx(0.49)


def test_what_was_made_is_read_again_and_named_by_what_it_is_made_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    made = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.ones(2) * len(made)}

    first = stored("thing", {"seed": 0}, make)
    assert torch.equal(stored("thing", {"seed": 0}, make)["x"], first["x"]) and len(made) == 1
    stored("thing", {"seed": 1}, make)
    assert len(made) == 2
    for file in (tmp_path / "bench").iterdir():
        file.write_bytes(b"cut short")
    assert float(stored("thing", {"seed": 0}, make)["x"][0]) == 3.0  # a broken file is made anew


def test_code_changes_the_name_but_comments_do_not() -> None:
    def f() -> int:
        """Documented."""
        return 1  # a comment

    one = code(f)

    def f() -> int:  # type: ignore[no-redef]
        return 1

    same = code(f)

    def f() -> int:  # type: ignore[no-redef]
        return 2

    assert one == same != code(f)


def test_bad_input_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(4, 2), torch.zeros(4, dtype=torch.int64)
    good = {"test": (x, y)}
    with pytest.raises(UsageError, match="no suite 'vison8'; did you mean 'vision8'"):
        bench("vison8")
    with pytest.raises(UsageError, match="no contender is called 'tie'"):
        bench("digits", ["tie"])
    with pytest.raises(UsageError, match="seeds"):
        bench("digits", seeds=0)
    with pytest.raises(UsageError) as caught:
        Suite("s", nn.Identity, [Task("a", good), Task("a", {})], {"b": {}})
    assert all(w in str(caught.value) for w in ("two tasks 'a'", "no expert", "no task", "no test split"))
    with pytest.raises(UsageError, match="no split"):
        list(Task("a", good).batches("train"))
    monkeypatch.delenv("WEFT_DATA", raising=False)
    with pytest.raises(UsageError, match="WEFT_DATA"):
        bench("vision8")
    with pytest.raises(DataError, match="index"):
        bench("vision8", data=tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"datasets": []}))
    with pytest.raises(DataError, match="mnist"):
        bench("vision8", data=tmp_path)
    with pytest.raises(DataError, match="not finite"):
        score(nn.Linear(2, 2).requires_grad_(False), Task("a", {"test": (x * torch.nan, y)}))
    assert issubclass(DataError, WeftError)


def test_the_command_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from weft.cli.main import app

    run = CliRunner().invoke
    files = {s: tmp_path / f"r.{s}" for s in ("json", "csv", "html")}
    made = run(app, ["bench", "digits", "--methods", "linear,ties", "--no-tune", "-q", "--out", str(files["json"]),
                     "--csv", str(files["csv"]), "--html", str(files["html"])])  # fmt: skip
    assert made.exit_code == 0, made.output
    assert all(f.is_file() for f in files.values()) and "ties" in made.output
    again = run(app, ["bench", str(files["json"]), "--json"])
    assert json.loads(again.output)["suite"] == "digits"
    listed = run(app, ["bench", "--list", "--json"])
    assert {"vision8", "digits"} <= set(json.loads(listed.output)["suites"])
    for wrong in (["bench"], ["bench", "digits", "--html", "page.txt"], ["bench", str(tmp_path / "no.json")]):
        assert isinstance(run(app, wrong).exception, WeftError)


def test_learned_routed_and_mended_merges_stand_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps only: asserted are groups and sizes, and that routing beats the static merge it rests on."""
    from weft.bench import adapters

    quick = [
        Contender(**{**vars(c), "params": {**c.params, "steps": 3}}) if "steps" in c.params else c
        for c in adapters.ADAPTED
    ]
    monkeypatch.setattr(adapters, "ADAPTED", tuple(quick))
    names = ["adamerging", "distilled", "atlas", "surgery_train", "twin", "smile", "task_arithmetic"]
    found = bench("digits", names, samples=16, tune=False)
    groups = {g: {r.name for r in rows} for g, rows in grouped(found).items()}
    assert groups["test-time"] == {"adamerging"} and groups["routed"] == {"twin", "smile"}
    assert groups["static"] == {"distilled", "atlas", "task_arithmetic"}
    assert groups["task known"] == {"surgery_train"}
    at = {n: found.normalised(found.row(n)) for n in names}
    assert at["twin"] > at["task_arithmetic"] and at["smile"] > at["task_arithmetic"]
    size = found.row("task_arithmetic").average("parameters")
    assert size and size < (found.row("twin").average("parameters") or 0) < 5 * size


def test_seeds_run_apart_are_combined(results: Results) -> None:
    from dataclasses import replace

    from weft.bench.results import combined

    rows = tuple(replace(r, runs=tuple(replace(m, seed=1) for m in r.runs)) for r in results.rows[:-1])
    both = combined([results, replace(results, rows=rows, seeds=(1,))])
    assert both.seeds == (0, 1) and len(both.rows) == len(results.rows)
    assert both.rows[0].interval == pytest.approx(0) and len(both.rows[0].runs) == 2
    alone = both.rows[-1]
    assert both.partly(alone) == "seeds 0" and not both.partly(both.rows[0])
    assert "seeds 0" in cells(both, alone)[1] and "· seeds 0" in page(both)
    some, rest = (replace(results, rows=results.rows[s]) for s in (slice(0, 6), slice(4, None)))
    assert [r.name for r in combined([some, rest]).rows] == [r.name for r in results.rows]
    with pytest.raises(UsageError, match="one suite"):
        combined([results, replace(results, seeds=(0, 1))])


def test_networks_from_different_starts_merge_better_aligned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from weft.bench.suites import two_init

    monkeypatch.setenv("WEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(two_init, "FIT", replace(two_init.FIT, epochs=6))
    found = bench("two-init", ["linear", "aligned", "regmean"])
    assert found.row("linear").mean < found.row("aligned").mean < found.row("experts").mean
    assert found.row("linear").mean < found.row("regmean").mean
    assert len(list((tmp_path / "bench").iterdir())) == 2
