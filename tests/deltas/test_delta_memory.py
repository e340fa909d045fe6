"""Packing and unpacking a model larger than the budget: peak anonymous memory, measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
BUDGET = 96 * MIB
SLACK = 16 * MIB
"""Hashing buffers, tables of the blocks, and what the allocator keeps between batches."""

MEASURE = """
import json, os, sys, threading, time
import torch
import weft

folder, scheme, budget = json.loads(sys.argv[1])
if not os.path.exists("/proc/self/status"):
    sys.exit(3)

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)

tiny = {"w": torch.ones(64, 64)}
weft.save(weft.pack_delta({"w": tiny["w"] * 1.01}, tiny, scheme=scheme), f"{folder}/warm")  # imports
weft.save(weft.load(f"{folder}/warm", base=tiny), f"{folder}/warmed")
g = torch.Generator().manual_seed(0)
block = (torch.randn(1024, 2048, generator=g) * 0.02).bfloat16()
weft.save(weft.load({"w": block.repeat(24, 1)}), f"{folder}/base")
block += (1e-3 * torch.randn(1024, 2048, generator=g)).bfloat16()
weft.save(weft.load({"w": block.repeat(24, 1)}), f"{folder}/model")
before = peak = anonymous()
threading.Thread(target=watch, daemon=True).start()
found = []
pack = weft.pack_delta(f"{folder}/model", f"{folder}/base", scheme=scheme)
found.append(peak - before)
peak = before
weft.save(pack, f"{folder}/pack", memory=budget, threads=2)
found.append(peak - before)
peak = before
weft.save(weft.load(f"{folder}/pack", base=f"{folder}/base"), f"{folder}/whole", memory=budget, threads=2)
found.append(peak - before)
print(json.dumps(found))
"""


@pytest.mark.parametrize("scheme", ["exact", "quantised"])
def test_packing_and_applying_stay_within_the_budget(tmp_path: Path, scheme: str) -> None:
    told = json.dumps([str(tmp_path), scheme, BUDGET])
    done = subprocess.run([sys.executable, "-c", MEASURE, told], capture_output=True, text=True, timeout=200)
    if done.returncode == 3:
        pytest.skip("this system does not tell how much memory a process has")
    assert done.returncode == 0, done.stderr
    choosing, saving, applying = json.loads(done.stdout)
    assert choosing <= BUDGET  # batch after batch, whatever the size of the model
    assert saving <= BUDGET + SLACK
    assert applying <= BUDGET + SLACK
