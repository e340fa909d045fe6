"""`weft search` as it is typed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import weft
from weft.cli.main import main

SEARCH = """
recipe: recipe.yml
space: {"models[*].parameters.weight": {low: 0, high: 1}}
objectives: [{function: "scoring:size", direction: minimize}]
validation: dev
trials: 5
"""
SCORING = """
import os, time
def size(candidate):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return sum(float(candidate.tensor(n).double().square().sum()) for n in candidate)
"""


@pytest.fixture
def here(models: Path) -> Path:
    (models / "search.yml").write_text(SEARCH)
    (models / "scoring.py").write_text(SCORING)
    return models


def typed(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["weft", "search", *words])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_it_shows_the_winner_and_writes_its_recipe(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, "search.yml", "--out", "best.yml", "--plot", "p.png", "--trials", "4") == 0
    said = capsys.readouterr()
    assert "4 candidates measured" in said.out and "not measured on other data" in said.out
    assert "1/4: size" in said.err and (here / "p.png").is_file()
    best = json.loads(_json(monkeypatch, capsys))["best"]
    made = weft.build(here / "best.yml").state_dict()
    total = sum(float(v.double().square().sum()) for v in made.values())
    assert total == pytest.approx(best["scores"]["size"], rel=1e-12)
    assert typed(monkeypatch, "search.yml", "--out", "best.yml") == 2
    assert "exists already" in capsys.readouterr().err


def _json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    assert typed(monkeypatch, "search.yml", "--json", "-q", "--trials", "4") == 0
    return capsys.readouterr().out


def test_errors_are_one_message_and_a_status(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "bad.yml").write_text(SEARCH.replace("trials: 5", "trails: 5"))
    for words, said in (
        (("bad.yml",), "did you mean 'trials'"), (("serch.yml",), "did you mean 'search.yml'"),
        (("search.yml", "--plot", "p.txt"), "a picture's name"), (("search.yml", "--out", "x/y.yml"), "no folder"),
        (("search.yml", "--storage", "x/y.db"), "no folder"),
    ):  # fmt: skip
        assert typed(monkeypatch, *words) == 2
        assert said in capsys.readouterr().err


def test_an_interrupted_command_shows_the_best_and_goes_on(here: Path) -> None:
    command = [sys.executable, "-m", "weft.cli.main", "search", "search.yml", "--storage", "s.db"]
    env = {**os.environ, "SLOW": "0.4"}
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if line.startswith("2/5"):
            break
    time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 130, err
    assert "before the interruption" in out and "goes on where this one stopped" in err
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=120, check=True)
    trials = json.loads(done.stdout)["trials"]
    assert len(trials) == 5 and all(t["state"] == "complete" for t in trials)
    assert [t["seconds"] > 0.3 for t in trials].count(True) >= 2
