"""`weft learn`: from files to files, as a checkpoint and as a recipe, and its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from small_nets import Small, family, inputs, labels

import weft
from weft.cli import main as entry

MINE = """
import sys
sys.path.insert(0, {here!r})
from small_nets import Small, inputs, labels

def net():
    return Small()

def labelled():
    return inputs(), labels()

def by_task():
    return {{"a": inputs(), "b": inputs(seed=3)}}

def nothing():
    return inputs()[:0]

def squared(shot):
    return shot.outputs.square().mean()
"""


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base, models = family(2)
    for name, m in zip(("base", "a", "b"), [base, *models], strict=True):
        weft.save(m, tmp_path / name)
    name = f"mine_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(MINE.format(here=str(Path(__file__).parent)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], files: Path, *words: object, status: int = 0) -> tuple[str, str]:
    mine = next(files.glob("mine_*.py")).stem
    sys.argv = ["weft", "learn", "a", "b", *(str(w).replace("mine:", f"{mine}:") for w in words)]
    try:
        entry.main()
        found = 0
    except SystemExit as stop:
        found = int(stop.code or 0)
    told = capsys.readouterr()
    assert found == status, told.err
    return told.out, told.err


PLAIN = ("--module", "mine:net", "--data", "mine:labelled")


def test_a_loss_is_lowered_and_the_recipe_is_the_checkpoint(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, _ = run(
        capsys, files, *PLAIN, "--base", "base", "--loss", "cross_entropy", "--steps", 20, "--lr", 0.05,
        "-o", "out", "--recipe", "out.yml", "--split", "train", "--set", "batch=12",
    )  # fmt: skip
    assert "20 steps on train data" in out and "all: " in out
    assert Path("out.yml").read_text().startswith("# learned on train data\n")
    built, saved = weft.build("out.yml"), weft.load("out")
    for n in saved:
        torch.testing.assert_close(built.tensor(n), saved.tensor(n), rtol=1e-12, atol=1e-13)
    net = weft.materialize(saved, Small())
    before = weft.materialize(weft.merge(["a", "b"], "task_arithmetic", base="base", scale=0.3), Small())
    loss = torch.nn.functional.cross_entropy
    assert loss(net(inputs()), labels()) < loss(before(inputs()), labels())


def test_a_published_method_says_what_it_saw(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = run(
        capsys, files, "--module", "mine:net", "--data", "mine:by_task", "--base", "base", "--how", "adamerging",
        "--task", "a", "--task", "b", "--private", "head.*", "--parts", "layer", "--steps", 3, "-o", "out",
        "--json",
    )  # fmt: skip
    told = json.loads(out)
    assert told["test_time"] and told["steps"] == 3 and "do not rank" in err
    assert set(told["coefficients"]) == {"conv", "layers.0", "layers.1"}
    for task in ("a", "b"):
        assert torch.equal(weft.load(f"out/{task}").tensor("head.bias"), weft.load(task).tensor("head.bias"))


@pytest.mark.parametrize("how", ["atlas", "learned_soup", "mehl_soup", "twa"])
def test_other_methods_run_from_files(how: str, files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--base", "base", "--parts", "blocks:2") if how == "atlas" else ()
    run(capsys, files, *PLAIN, "--how", how, "--steps", 2, *words, "-o", "out", "--quiet")
    assert weft.load("out").info("head.weight").shape == (3, 16)


def test_a_method_s_parameters_and_a_loss_of_one_s_own(
    files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(
        capsys, files, *PLAIN, "--base", "base", "--loss", "mine:squared", "--steps", 3, "--recipe", "r.yml",
        "--set", "method=ties", "--set", "learned={density: 0.5}",
    )  # fmt: skip
    assert (
        "merge_method: ties" in Path("r.yml").read_text()
        and weft.build("r.yml").tensor("head.bias").numel() == 3
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*PLAIN, "--loss", "entropy", "--steps", 1), "say where the result goes"),
        ((*PLAIN, "-o", "out"), "which loss to lower"),
        ((*PLAIN, "-o", "out", "--how", "adamergin"), "did you mean 'adamerging'"),
        ((*PLAIN, "-o", "out", "--how", "atlas"), "needs a base"),
        ((*PLAIN, "-o", "out", "--how", "twa", "--base", "base"), "takes no base"),
        ((*PLAIN, "-o", "out", "--how", "adamerging", "--base", "base"), "needs tasks"),
        ((*PLAIN, "-o", "out", "--how", "twa", "--set", "modle_batch=2"), "no such settings"),
        ((*PLAIN, "-o", "out", "--how", "twa", "--set", "lr"), "KEY=VALUE"),
        ((*PLAIN, "-o", "out", "--lr", 1, "--set", "lr=2"), "by an option and by --set"),
        ((*PLAIN, "-o", "out", "--loss", "entropy", "--steps", 1, "--parts", "blocks:x"), "blocks:8"),
        (("--module", "mine:net", "--data", "mine:nothing", "-o", "out", "--loss", "entropy", "--steps", 1),
         "no examples"),
        (("--module", "mine:labelled", "--data", "mine:labelled", "-o", "out"), "must give a torch module"),
        ((*PLAIN, "--recipe", "r.yml", "--loss", "entropy", "--steps", 1, "--parts", "row"), "do not fit a recipe"),
        ((*PLAIN, "--recipe", "base", "--loss", "entropy", "--steps", 1), "exists already"),
        (("--module", "mine:nett", "--data", "mine:labelled", "-o", "out"), "did you mean 'net'"),
    ],
)  # fmt: skip
def test_requests_that_cannot_be_meant(
    words: tuple[object, ...], message: str, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, err = run(capsys, files, *words, status=1 if message == "no examples" else 2)
    assert (
        message in err and "Traceback" not in err and not Path("out").exists() and not Path("r.yml").exists()
    )
