"""`weft delta` as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packs import base_model, tuned

import weft


def run(*args: object, fails: int = 0) -> str:
    command = [sys.executable, "-m", "weft.cli.main", "delta", *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == fails, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if not fails else done.stderr


@pytest.fixture
def places(tmp_path: Path) -> Path:
    weft.save(weft.load(base_model()), tmp_path / "base")
    for i in (1, 2):
        weft.save(weft.load(tuned(base_model(), i)), tmp_path / f"ft{i}")
    return tmp_path


def test_pack_inspect_apply(places: Path) -> None:
    out = run("pack", places / "ft1", places / "base", places / "pack", "--scheme", "quantised", "--bits", 3)
    assert "quantised bits=3" in out and "relative error" in out
    told = json.loads(run("inspect", places / "pack", "--json"))
    assert told["base"] == "../base" and told["ratio"] < 0.35
    run("apply", places / "pack", places / "whole")
    whole, tuned1 = weft.load(places / "whole"), weft.load(places / "ft1")
    tau = tuned1.tensor("layers.0.weight") - weft.load(places / "base").tensor("layers.0.weight")
    error = (whole.tensor("layers.0.weight") - tuned1.tensor("layers.0.weight")).norm() / tau.norm()
    assert 0 < float(error) < 0.3
    assert torch.equal(whole.tensor("norm.weight"), tuned1.tensor("norm.weight"))


def test_family(places: Path) -> None:
    told = json.loads(
        run(
            "family",
            places / "ft1",
            places / "ft2",
            "--base",
            places / "base",
            "--out",
            places / "f",
            "--json",
        )
    )
    assert [Path(p["path"]).name for p in told["packs"]] == ["shared", "ft1", "ft2"]
    assert weft.load(places / "f" / "ft2").origin.endswith("ft2")


def test_a_recipe_names_packs_like_models(places: Path) -> None:
    for i in (1, 2):
        run(
            "pack", places / f"ft{i}", places / "base", places / f"pack{i}", "--scheme", "exact", "--no-check"
        )
    for what in ("ft", "pack"):
        recipe = places / f"{what}.yaml"
        recipe.write_text(
            f"method: ties\nbase: {places}/base\nparameters: {{density: 0.5}}\n"
            f"models: [{places}/{what}1, {places}/{what}2]\n"
        )
        merged = [sys.executable, "-m", "weft.cli.main", "merge", str(recipe), str(places / f"m-{what}")]
        assert subprocess.run(merged, timeout=120).returncode == 0
    plain, packed = (weft.load(places / f"m-{what}") for what in ("ft", "pack"))
    assert plain.tensors == packed.tensors
    assert all(torch.equal(plain.tensor(n), packed.tensor(n)) for n in plain)


def test_mistakes_are_one_line_each(places: Path) -> None:
    assert "is no delta" in run("apply", places / "ft1", places / "x", fails=2)
    assert "a delta is a folder" in run("pack", places / "ft1", places / "base", "x.safetensors", fails=2)
    assert "did you mean 'sign'" in run(
        "pack", places / "ft1", places / "base", places / "p", "--scheme", "sing", fails=2
    )
    run("pack", places / "ft1", places / "base", places / "p")
    assert "exists" in run("pack", places / "ft1", places / "base", places / "p", fails=2)
    assert "nothing to pack" in run("pack", places / "base", places / "base", places / "q", fails=2)
    assert "made for another base" in run("inspect", places / "p", "--base", places / "ft2", fails=1)
