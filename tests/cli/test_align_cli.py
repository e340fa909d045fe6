"""`weft align` as a user runs it: models put in order; symmetries printed, saved, edited; mistakes told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import weft
from weft.align import discover
from weft.cli.main import main

CODE = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))

def inputs():
    return torch.randn(2, 6)

def data():
    return [torch.randn(64, 6, generator=torch.Generator().manual_seed(0))]
"""


def run(*words: object) -> int:
    before, sys.argv = sys.argv, ["weft", *map(str, words)]
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two networks of one function in different orders, and the module that they are of."""
    (tmp_path / "align_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("align_code", None)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    spec = discover(net)
    weft.save(net, tmp_path / "a.safetensors")
    weft.save(spec.apply(net, spec.random(1)), tmp_path / "b.safetensors")
    return tmp_path


def test_a_model_is_put_in_order(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, out = (place / f"{n}.safetensors" for n in ("a", "b", "out"))
    assert (
        run("align", b, out, "--to", a, "--module", "align_code:net", "--set", "tries=2", "--memory", "1GiB")
        == 0
    )
    told = capsys.readouterr().out
    assert "of 8 units moved, cosine of the weights" in told and "→ 1.0000" in told
    assert all(torch.equal(weft.load(out).tensor(n), weft.load(a).tensor(n)) for n in weft.load(a))
    assert run("align", b, out, "--to", a, "--module", "align_code:net") != 0  # it is there
    assert run("align", b, out, "--to", a, "--module", "align_code:net", "--overwrite", "--how", "correlation",
               "--data", "align_code:data", "--json") == 0  # fmt: skip
    told = capsys.readouterr().out
    assert json.loads(told)["how"] == "correlation"
    assert all(torch.equal(weft.load(out).tensor(n), weft.load(a).tensor(n)) for n in weft.load(a))


def test_symmetries_are_printed_saved_edited_and_taken(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, out, spec = place / "a.safetensors", place / "b.safetensors", place / "out", place / "spec.json"
    words = ("--module", "align_code:net", "--inputs", "align_code:inputs")
    assert run("align", a, *words, "--print-spec", "--save-spec", spec) == 0
    assert "1 groups, 8 units that may change places" in capsys.readouterr().out
    assert run("align", a, *words, "--print-spec", "--json") == 0
    assert json.loads(capsys.readouterr().out)["groups"]["layer.0"]["size"] == 8
    data = json.loads(spec.read_text())
    data["groups"]["layer.0"]["fixed"] = True
    spec.write_text(json.dumps(data))
    assert run("align", b, out, "--to", a, "--spec", spec, "--json") == 0
    assert json.loads(capsys.readouterr().out)["moved"] == 0
    assert torch.equal(weft.load(out).tensor("0.weight"), weft.load(b).tensor("0.weight"))
    spec.write_text('{"groups": {}, "axes": {"0.weight": ["x"]}}')
    assert run("align", b, out, "--to", a, "--spec", spec) == 2
    assert "'x', which is no group" in capsys.readouterr().err


def test_mistakes_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = place / "a.safetensors", place / "b.safetensors"
    module = ("--module", "align_code:net")
    for words, told in (
        ((b, place / "out"), "no config that says which network it is"),
        ((b, "--to", a, *module), "weft align B --to A OUT"),
        ((b, place / "out", "--to", a), "no config that says which network it is: give module= or spec="),
        ((b, place / "out", "--to", a, *module, "--how", "weight"), "did you mean 'weights'"),
        ((b, place / "out", "--to", a, *module, "--how", "ste"), "goes by the loss: give module= and data="),
        ((b, place / "out", "--to", a, *module, "--how", "cca"), "compares what units do: give data="),
        ((b, place / "out", "--to", a, *module, "--data", "align_code:data"), "goes by the weights alone"),
        ((b, place / "out", "--to", a, *module, "--set", "tries"), "--set is KEY=VALUE"),
        (
            (b, place / "out", "--to", a, *module, "--set", "tris=3"),
            "has no option 'tris'; did you mean 'tries'",
        ),
    ):
        assert run("align", *words) == 2, words
        assert told in capsys.readouterr().err
    weft.save(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)), place / "wide.safetensors")
    assert run("align", place / "wide.safetensors", place / "out", "--to", a, *module) == 1
    assert "0.weight: [8, 6] in" in capsys.readouterr().err
    assert not (place / "out").exists()
