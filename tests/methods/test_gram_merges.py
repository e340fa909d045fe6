"""Merges of checkpoints by the Gram solver: recipes, memory, notes, what streams and what is whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import billion, grams, hollow
from torch import nn
from typer.testing import CliRunner

import weft
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.cli.main import app
from weft.engine.plan import make_plan
from weft.errors import DataProblems, UsageError

GIB = 1 << 30
ABOUT = {"weft_statistics": {"samples": 256, "transposed": [], "tied": {}}}


def run(*args: object) -> Any:
    found = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found


def world(folder: Path) -> tuple[list[nn.Module], list[Path], list[Path]]:
    """Two small experts and their statistics, on disk."""
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 3)) for _ in range(2)
    ]
    models, stats = [], []
    for i, net in enumerate(nets):
        models.append(folder / f"expert-{i}")
        stats.append(folder / f"expert-{i}-stats")
        weft.save(net, models[i])
        weft.save(weft.measure(net, [torch.randint(9, (60, 4))], "gram"), stats[i])
    return nets, models, stats  # type: ignore[return-value]


def test_recipe_names_the_statistics_of_each_model(tmp_path: Path) -> None:
    _, models, stats = world(tmp_path)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({
        "merge_method": "regmean", "parameters": {"off_diagonal": 0.8},
        "models": [{"model": str(m), "statistics": str(s)} for m, s in zip(models, stats, strict=True)],
    }))  # fmt: skip
    run("merge", recipe, tmp_path / "out", "--quiet")
    want = weft.merge(models, "regmean", statistics=stats, off_diagonal=0.8)
    found = weft.load(tmp_path / "out")
    for name in found:
        torch.testing.assert_close(found.tensor(name), want.tensor(name).float())
    told = json.loads(run("methods", "regmean", "--json").output)
    assert "2212.09849" in json.dumps(told)


def test_what_has_no_gram_matrix_is_averaged_and_told(tmp_path: Path) -> None:
    nets, models, stats = world(tmp_path)
    merged = weft.merge(models, "regmean", statistics=stats)
    assert any("no gram measured" in n and "2.bias" in n for n in merged.notes)
    for name in ("0.weight", "1.weight", "2.bias"):
        a, b = (net.state_dict()[name].double() for net in nets)
        torch.testing.assert_close(merged.tensor(name).double(), (a + b) / 2)
    assert merged.grain("0.weight") == 1 and merged.grain("2.weight") == 30  # a vocabulary streams
    with pytest.raises(UsageError, match="regmean needs statistics of every model"):
        weft.merge(models, "regmean")
    with pytest.raises(DataProblems, match="not those of the models"):
        weft.merge(models, "regmean", statistics=stats[::-1])
    base = weft.merge(models, "linear")
    mixed = weft.merge(models, "gram", base=base, statistics=stats)
    free = weft.merge(models, "gram", base=base)
    assert not torch.equal(mixed.tensor("3.weight"), free.tensor("3.weight"))
    torch.testing.assert_close(mixed.tensor("2.bias"), base.tensor("2.bias"))


def test_matrices_one_by_one_are_the_stack(tmp_path: Path) -> None:
    """Fused experts, whose Gram matrices are read a block at a time."""
    g = torch.Generator().manual_seed(0)
    stats, models, stack = [], [], []
    for i in range(3):
        x = torch.randn(4, 50, 16, generator=g)
        stack.append(x.mT @ x / 50)
        models.append({"experts": torch.randn(4, 8, 16, generator=g)})
        weft.save(Model(StateDict({"gram/experts": stack[i]}), ABOUT, (), "s"), tmp_path / f"s{i}")
        stats.append(tmp_path / f"s{i}")
    merged = weft.merge(models, "regmean", statistics=stats)
    x = torch.stack([m["experts"] for m in models]).double()
    want = weft.METHODS["regmean"](x, statistics={"gram": torch.stack(stack)})
    torch.testing.assert_close(merged.tensor("experts"), want, rtol=1e-9, atol=1e-12)


def test_a_model_of_a_billion_parameters_stays_under_four_gibibytes(tmp_path: Path) -> None:
    """Planned from names and shapes, for files of holes: only the matrix at hand, and few of its Gram matrices."""
    shapes = billion()
    assert sum(torch.Size(s).numel() for s in shapes.values()) > 1.2e9
    base = hollow(tmp_path / "base", shapes, "BF16", {})
    models = [hollow(tmp_path / f"m{i}", shapes, "BF16", {}) for i in range(4)]
    stats = [hollow(tmp_path / f"s{i}", grams(shapes), "F32", ABOUT) for i in range(4)]
    for method, more in (
        ("regmean", {"statistics": stats}), ("lot", {"statistics": stats, "base": base}),
        ("gram", {"statistics": stats, "base": base}), ("swudi", {"base": base, "outside": "mean"}),
    ):  # fmt: skip
        plan = make_plan(weft.merge(models, method, **more), threads=2, memory=4 * GIB)  # type: ignore[arg-type]
        assert GIB < plan.largest < 4 * GIB
    with pytest.raises(DataProblems, match=r"embed_tokens.*needed whole"):
        make_plan(weft.merge(models, "swudi", base=base), threads=2, memory=4 * GIB)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({
        "merge_method": "regmean",
        "models": [{"model": str(m), "statistics": str(s)} for m, s in zip(models, stats, strict=True)],
    }))  # fmt: skip
    told = json.loads(run("merge", recipe, tmp_path / "o", "--dry-run", "--memory", "4GiB", "--json").output)
    assert told["peak_memory"] <= 4 * GIB and not (tmp_path / "o").exists()


PEAK = """
import gc, json, sys, threading, time
import torch
import weft
from weft.engine.plan import make_plan

folder, method, params = json.loads(sys.argv[1])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def node():
    models = [f"{folder}/m{i}" for i in range(2)]
    known = {"statistics": [f"{folder}/s{i}" for i in range(2)]} if weft.METHODS[method].needs else {}
    base = {"base": f"{folder}/base"} if weft.METHODS[method].base == "required" else {}
    return weft.merge(models, method, **known, **base, **params)

tiny = [{"layers.0.w": torch.randn(40, 100)} for _ in range(3)]
weft.save(weft.merge(tiny[1:], "tsv", base=tiny[0]), f"{folder}/warm.safetensors", overwrite=True)
merged = node()
plan = make_plan(merged, threads=1, memory=256 << 20)  # small: freed blocks are given back
gc.collect()
before = peak = anonymous()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
weft.save(merged, f"{folder}/out.safetensors", memory=256 << 20, threads=1, overwrite=True)
running = False
watcher.join()
print(json.dumps([plan.largest, peak - before]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_what_a_merge_holds_is_what_it_planned(tmp_path: Path) -> None:
    """A wide matrix, whose Gram matrices are four times as large, with the eigenvectors of a singular one."""
    g, name = torch.Generator().manual_seed(0), "layers.0.w"
    for folder in ("base", "m0", "m1"):
        weft.save({name: torch.randn(192, 768, generator=g)}, tmp_path / folder)
    for i in range(2):
        x = torch.randn(100, 768, generator=g)
        weft.save(Model(StateDict({f"gram/{name}": x.T @ x / 100}), ABOUT, (), "s"), tmp_path / f"s{i}")
    for method, params in (("regmean", {"off_diagonal": 1.0}), ("gram", {"filter": "flow"})):
        told = subprocess.run(
            [sys.executable, "-c", PEAK, json.dumps([str(tmp_path), method, params])],
            check=True, stdout=subprocess.PIPE,
        )  # fmt: skip
        planned, peak = json.loads(told.stdout)
        # outside of it: hashing, Python's own objects, and the buffers of BLAS, of whatever size the matrices are;
        # -5 to 5 MiB were seen, and a Gram matrix in float64 has 4.5
        assert peak < planned + (6 << 20)
