"""`weft calibrate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weft

TASK = """
import torch
from torch import nn

torch.manual_seed(0)

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

def batches():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(40, 4, generator=g)
    return [(x, (x[:, 0] > 0).long())]

def by_task():
    return {"a": [batches()[0][0]], "b": [batches()[0][0] + 1]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "calibtask.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import calibtask  # type: ignore[import-not-found]

    for i, name in enumerate(("base", "a", "b")):
        torch.manual_seed(i)
        weft.save(calibtask.net(), tmp_path / name)
    weft.save(weft.merge(["a", "b"]), tmp_path / "merged")
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    import sys

    from weft.cli.main import main

    before, sys.argv = sys.argv, ["weft", "calibrate", *words]
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    told = capsys.readouterr()
    return status, told.out, told.err


def test_every_way_writes_a_model_that_loads(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, data = ("--module", "calibtask:net"), ("--data", "calibtask:batches")
    both = ("--data", "calibtask:by_task", "--expert", "a=a", "--expert", "b=b")
    ways = {
        "repair": (*data, "--parent", "a", "--parent", "b", "--set", "schedule=joint"),
        "head": (*data, "--set", "fit=logistic"),
        "temperature": data,
        "magnitude": (*both, "--base", "base", "--set", "space=both"),
        "surgery": (*both, "--set", "rank=2", "--set", "steps=3"),
    }
    for how, words in ways.items():
        status, out, err = run(capsys, "merged", f"out-{how}", "--how", how, *net, *words, "--json")
        assert status == 0, err
        told = json.loads(out)
        assert told["how"] == how and (told["added"] > 0) == (how == "surgery")
        assert set(weft.load(f"out-{how}")) == set(weft.load("merged"))
    import calibtask

    from weft.calibrate import load_adapted

    x = torch.randn(5, 4)
    assert load_adapted("out-surgery", calibtask.net())(x, task="a").shape == (5, 3)


def test_what_is_wrong_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net, data = ("--module", "calibtask:net"), ("--data", "calibtask:batches")
    cases = {
        ("--how", "repair", *net, *data): "repair needs parents",
        ("--how", "head", *net, *data, "--set", "rigde=1"): "did you mean 'ridge'",
        ("--how", "head", *net): "give the data",
        ("--how", "head", *net, *data, "--set", "samples=3", "--samples", "4"): "by an option and by --set",
        ("--how", "heads", *net, *data): "did you mean 'head'",
        (*net, *data): "no BatchNorm",
        ("--how", "surgery", *net, *data, "--expert", "a"): "TASK=MODEL",
        ("--how", "head", *net, *data, "--set", "ridge"): "KEY=VALUE",
    }
    for words, text in cases.items():
        status, _, err = run(capsys, "merged", "out", *words)
        assert status == 2 and text in err, (words, err)
    assert not (folder / "out").exists()
