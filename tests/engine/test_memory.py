"""The memory budget holds: a model four times as large as the budget, peak anonymous memory measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import python, write_model

import weft
from weft.checkpoints.execution import TILE, ranges
from weft.engine.save import Settings
from weft.errors import DataProblems

MIB = 1 << 20
BUDGET = 16 * MIB
SLACK = 4 * MIB
"""Outside the budget: hashing buffers, Python's own objects, what the allocator rounds up to."""

MEASURE = """
import gc, json, os, sys, threading, time
import torch
import weft

folder, case, budget, threads, kernels = json.loads(sys.argv[1])
method, params = case
os.environ["WEFT_KERNELS_FROM"] = "0"
if not os.path.exists("/proc/self/status"):
    sys.exit(3)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def build(models):
    base = models[0] if weft.METHODS[method].base == "required" else None
    return weft.merge(models[1:], method, base=base, **params)

g = torch.Generator().manual_seed(0)
tiny = [{"layers.0.w": torch.randn(40, 64, generator=g).bfloat16()} for _ in range(3)]
alike = [{"layers.0.w": torch.full((40, 64), 1.0 + i).bfloat16()} for i in range(3)]
for models in (tiny, alike, tiny):  # imports and compiles what the measured merge will use
    weft.save(build(models), f"{folder}/warm.safetensors", threads=threads, kernels=kernels, overwrite=True)
merged = build([f"{folder}/m{i}" for i in range(3)])
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
weft.save(merged, f"{folder}/out.safetensors", memory=budget, threads=threads, kernels=kernels,
          overwrite=True, digests=True)
running = False
watcher.join()
print(json.dumps(peak - before))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes, four budgets large each."""
    folder = tmp_path_factory.mktemp("large")
    g = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (4000, 1536), "norm": (1536,)}
    shapes |= {f"layers.{i}.w": (1024, 1536) for i in range(18)}
    base = {n: torch.randn(s, generator=g) * 0.02 for n, s in shapes.items()}
    for i in range(3):
        step = {n: t + i * 1e-3 * torch.randn(t.shape, generator=g) for n, t in base.items()}
        write_model(folder / f"m{i}", {n: t.bfloat16() for n, t in step.items()})
    assert (folder / "m0/model.safetensors").stat().st_size > 4 * BUDGET
    return folder


CASES: dict[str, tuple[list[Any], int, bool]] = {
    "linear": (["linear", {}], 2, True),
    "linear in torch": (["linear", {}], 2, False),
    "slerp": (["slerp", {"t": 0.4}], 2, True),
    "slerp in torch": (["slerp", {"t": 0.4}], 2, False),
    "ties": (["ties", {"density": 0.3, "scope": "tensor"}], 2, True),
    "ties in torch": (["ties", {"density": 0.3, "scope": "tensor"}], 1, False),
    "ties over the model": (["ties", {"density": 0.3, "scope": "model"}], 2, True),
    "ties on more threads than fit": (["ties", {"density": 0.3, "scope": "model"}], 8, True),
    "della": (["della", {"density": 0.5, "epsilon": 0.2}], 2, True),
}


@pytest.mark.parametrize("case", CASES)
def test_peak_memory_is_within_the_budget(large: Path, case: str) -> None:
    method, threads, kernels = CASES[case]
    done = python(MEASURE, json.dumps([str(large), method, BUDGET, threads, kernels]))
    if done.returncode == 3:
        pytest.skip("this system does not tell how much memory a process has")
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout)
    assert grown <= BUDGET + SLACK, f"{grown / MIB:.1f} MiB over a budget of {BUDGET / MIB:.0f} MiB"


def test_what_is_too_large_is_refused_before_the_first_byte(large: Path, tmp_path: Path) -> None:
    """A whole-matrix method, and a tensor whose matrix is over the budget; every such tensor is named."""
    merged = weft.merge([large / "m1"], "arcee_fusion", base=large / "m0")
    with pytest.raises(DataProblems, match=r"16.0 MiB of memory is not enough.*raise --memory") as error:
        weft.save(merged, tmp_path / "out", memory=BUDGET)
    assert len(error.value.problems) == 19
    assert error.value.problems[0].startswith("embed.weight [4000, 1536] is needed whole")
    assert list(tmp_path.iterdir()) == []
    plan = Settings(memory="2GiB").plan(merged, tmp_path / "out")
    assert plan.ranges("embed.weight") == [(0, 4000 * 1536)]


def test_plan_never_promises_more_than_the_budget(large: Path) -> None:
    merged = weft.merge([large / "m1", large / "m2"], "ties", base=large / "m0")
    for threads in (1, 2, 7, 64):
        for memory in (8 * MIB, BUDGET, 1 << 30):
            plan = Settings(threads=threads, memory=memory).plan(merged, large / "x")
            assert plan.peak_memory <= memory
            assert plan.crowded == (threads * plan.largest > memory)
            longest = max(b - a for n in plan.tensors for a, b in plan.ranges(n))
            assert plan.crowded or threads * plan.cost("embed.weight", longest) <= memory
    assert Settings(memory="8GiB", threads=1).plan(merged, large / "x").chunk > TILE


@pytest.mark.parametrize("grain", [1, 2, 96, 11008, 16384, 700])
def test_ranges_are_as_short_as_tiles_and_rows_allow(grain: int) -> None:
    """A small chunk must not turn into a whole tensor where rows and tiles meet late."""
    numel = grain * 9999
    cut = ranges(numel, grain, TILE)
    assert cut[0][0] == 0
    assert cut[-1][1] == numel
    assert [b for _, b in cut[:-1]] == [a for a, _ in cut[1:]]
    assert all(a % TILE == 0 and a % grain == 0 for a, _ in cut)
    assert all(not any(x % grain == 0 for x in range(a + TILE, b, TILE)) for a, b in cut)


AFTER = """
import os, sys
import torch
import weft

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

if not os.path.exists("/proc/self/status"):
    sys.exit(3)
models = [f"{sys.argv[1]}/m{i}" for i in range(3)]
made = weft.merge(models[1:], "consensus", base=models[0])
weft.save(weft.merge([{"layers.0.w": torch.ones(4, 4)}] * 2, "consensus", base={"layers.0.w": torch.ones(4, 4)}),
          sys.argv[2] + "-warm.safetensors")
before = anonymous()
for i in range(4):
    weft.save(made, f"{sys.argv[2]}-{i}", memory="2GiB", threads=2, kernels=False)
    print(anonymous() - before)
"""


def test_a_save_gives_back_what_it_took(large: Path, tmp_path: Path) -> None:
    """Under a budget in which freed memory is kept for the ranges that follow."""
    done = python(AFTER, str(large), str(tmp_path / "out"))
    if done.returncode == 3:
        pytest.skip("no /proc here")
    assert done.returncode == 0, done.stderr
    first, *_, last = map(int, done.stdout.split())
    # what torch keeps for itself from its first large work on; each save left more behind, once
    assert first < 96 * MIB and last - first < 8 * MIB, (first / MIB, last / MIB)
