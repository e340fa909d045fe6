"""What only moves bytes, or merges by compiled kernels, imports no torch, and gives the bytes that torch gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import weft as w

SHAPES = {"model.layers.0.w": (96, 64), "model.layers.1.w": (96, 64), "model.norm.weight": (64,)}
RECIPES = {
    "linear": "method: linear\nmodels: [{model: ./A, parameters: {weight: 0.3}}, ./B]",
    "task arithmetic": "method: task_arithmetic\nbase: ./BASE\nmodels: [./A, ./B]\nparameters: {scale: 0.4}",
    "slerp": "method: slerp\nmodels: [./A, ./B]\nparameters: {t: 0.3}",
    "karcher": "method: karcher\nmodels: [./A, ./B, ./BASE]",
    "model_stock": "method: model_stock\nbase: ./BASE\nmodels: [./A, ./B]",
    "ties": "method: ties\nbase: ./BASE\nmodels: [./A, ./B]",
    "ties of tensors": "method: ties\nbase: ./BASE\nmodels: [./A, ./B]\nparameters: {scope: tensor, density: 0.5}",
    "dare": "method: dare\nbase: ./BASE\nmodels: [./A, ./B]",
    "dare, MergeKit's": "method: dare_ties\ncompat: mergekit\nbase: ./BASE\nmodels: [./A, ./B]\n"
    "parameters: {density: 0.5}",
    "della": "method: della\nbase: ./BASE\nmodels: [./A, ./B]",
    "breadcrumbs": "method: breadcrumbs\nbase: ./BASE\nmodels: [./A, ./B]",
    "slices": "merge_method: passthrough\nslices:\n"
    "- sources: [{model: ./A, layer_range: [0, 1]}]\n- sources: [{model: ./B, layer_range: [0, 2]}]",
    "other dtype": "method: linear\nmodels: [./A, ./B]\ndtype: float32",
    "float16": "method: ties\nbase: ./BASE16\nmodels: [./A16, ./B16]",
    "bfloat16 to float16": "method: linear\nmodels: [./A, ./B]\ndtype: float16",
}
RUN = """
import json, sys
from weft.cli.main import main
there, *words = json.loads(sys.argv[1])
sys.argv = ["weft", *words]
main()
assert ("torch" in sys.modules) == there, "torch"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models")
    g = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=g) * 0.02 for n, s in SHAPES.items()}
    of = {"BASE": 0.0, "A": 0.01, "B": 0.01, "BASE16": 0.0, "A16": 0.01, "B16": 0.01}
    for name, amount in of.items():
        where = made / name
        where.mkdir()
        dtype = torch.float16 if name.endswith("16") else torch.bfloat16
        values = {n: (t + amount * torch.randn(t.shape, generator=g)).to(dtype) for n, t in base.items()}
        save_file(values | {"steps": torch.tensor([7])}, where / "model.safetensors")
        (where / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    return made


def weft(folder: Path, *words: object, torch: bool = False) -> str:
    """A process of its own, which fails unless it has torch at the end just where it should."""
    env = dict(os.environ) | {"WEFT_KERNELS_FROM": str((1 << 40) if torch else 0)}
    asked = json.dumps([torch, *map(str, words)])
    done = subprocess.run(
        [sys.executable, "-c", RUN, asked], capture_output=True, text=True, env=env, cwd=folder, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "text"), RECIPES.items(), ids=RECIPES)
def test_a_merge_of_files(name: str, text: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yml").write_text(text + "\n")
    weft(folder, "merge", tmp_path / "recipe.yml", tmp_path / "lean", "-q")
    weft(folder, "merge", tmp_path / "recipe.yml", tmp_path / "torch", "-q", torch=name != "slices")
    lean, plain = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("lean", "torch"))
    assert lean == plain


@pytest.mark.parametrize(
    "words", [["inspect", "./A"], ["check", "recipe.yml"], ["methods"], ["methods", "ties"]], ids=" ".join
)
def test_looking_at_files(words: list[str], folder: Path) -> None:
    (folder / "recipe.yml").write_text("method: linear\nmodels: [./A, ./B]\n")
    assert weft(folder, *words)


API = """
import sys
import weft
merged = weft.merge(["./A", "./B"], "ties", base="./BASE", dtype="float32")
weft.save(merged, sys.argv[1])
assert "torch" not in sys.modules
"""


def test_in_python(folder: Path, tmp_path: Path) -> None:
    env = dict(os.environ) | {"WEFT_KERNELS_FROM": "0"}
    subprocess.run([sys.executable, "-c", API, str(tmp_path / "out")], env=env, cwd=folder, check=True)
    made = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert made.dtype == torch.float32 and made.shape == SHAPES["model.norm.weight"]


def test_threads_that_torch_had_come_back(folder: Path, tmp_path: Path) -> None:
    """torch comes in the midst of a save, on one thread, and has its own number of them again afterwards."""
    code = """
import sys
import weft
from weft import late
made = weft.load("./A") * 0.5  # which torch computes
seen = []
def look(event):
    if event["event"] == "tensor":
        seen.append(late.torch.get_num_threads())
weft.save(made, sys.argv[1], on_event=look)
import torch
assert set(seen) == {1} and torch.get_num_threads() == int(sys.argv[2]), (seen, torch.get_num_threads())
"""
    env = dict(os.environ) | {"OMP_NUM_THREADS": "2"}
    words = [str(tmp_path / "out"), str(min(2, os.cpu_count() or 1))]
    subprocess.run([sys.executable, "-c", code, *words], env=env, cwd=folder, check=True)


@pytest.mark.parametrize("dtype", ["int8", "float23", torch.int64])
def test_what_weights_cannot_be_stored_as(dtype: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(w.UsageError, match="dtype"):
        w.merge([folder / "A"], dtype=dtype)
    with pytest.raises(w.UsageError, match="dtype"):
        w.save(w.load(folder / "A"), tmp_path / "x", dtype=dtype)
