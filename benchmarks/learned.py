"""Learned coefficients against task arithmetic on the demo's tasks: `python benchmarks/learned.py --seeds 5`.

For every seed a base (upright digits and a few of every task) and an expert a task are trained, as the demo's are.
Accuracy is on test images; λ "by validation" is the best of 0.05, 0.10 … 1.5 on 250 labelled images a task.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import accuracy, as_network
from weft.demo.network import DigitNet, network
from weft.demo.tasks import CONTROL, TASKS, Split, examples
from weft.demo.train import EXPERT_EPOCHS, EXPERT_RATE, FEW, fit, joined
from weft.learn import (
    Blocks,
    Learned,
    adamerging,
    adarank,
    atlas,
    concrete,
    dam,
    expert_merging,
    prodistill,
    symerge,
)  # fmt: skip
from weft.systems.weighted import metagpt

FEW_INPUTS = 32
LAYERS = ("layers.0", "layers.1", "layers.2")


@dataclass(frozen=True)
class World:
    """One base and its experts."""

    base: DigitNet
    experts: Mapping[str, DigitNet]

    def inputs(self, split: Split, n: int | None = None) -> dict[str, Tensor]:
        return {t: examples(t, split)[0][:n] for t in self.experts}

    def labelled(self, n: int) -> tuple[Tensor, Tensor]:
        return joined([tuple(v[:n] for v in examples(t, "validation")) for t in self.experts])  # type: ignore[misc]

    def added(self, scale: float) -> Checkpoint:
        return weft.merge(list(self.experts.values()), "task_arithmetic", base=self.base, scale=scale)

    def chosen(self) -> Checkpoint:
        def score(m: Checkpoint) -> float:
            net = as_network(m)
            return mean(accuracy(net, t, "validation") for t in self.experts)

        return max((self.added(i / 20) for i in range(31)), key=score)


def world(seed: int, tasks: tuple[str, ...]) -> World:
    net = DigitNet(torch.Generator().manual_seed(seed))
    few = [tuple(v[:FEW] for v in examples(t, "pretrain")) for t in TASKS]
    fit(net, joined([examples(CONTROL.name, "pretrain"), *few]), epochs=30, rate=1e-3, seed=seed, head=True)  # type: ignore[list-item]
    base, experts = network(net.state_dict()), {}
    for i, task in enumerate(tasks, 1):
        experts[task] = deepcopy(base)
        fit(
            experts[task], examples(task, "train"), epochs=EXPERT_EPOCHS, rate=EXPERT_RATE, seed=100 * seed + i,
            head=False,
        )  # fmt: skip
        experts[task].requires_grad_(False)
    return World(base, experts)


def learned(
    method: Callable[..., Learned], w: World, data: Any, *, tasks: bool = True, base: bool = True, **how: Any
) -> Callable[[str], Checkpoint]:
    """Runs a method; gives a task's model."""
    given = [DigitNet(), *([w.base] if base else []), list(w.experts.values()), data]
    found = method(*given, **({"tasks": list(w.experts)} if tasks else {}), **how)
    return lambda task: found.checkpoint(task if found.merged.private else None)


def same(model: Checkpoint) -> Callable[[str], Checkpoint]:
    return lambda task: model


METHODS: dict[str, tuple[str, Callable[[World], Callable[[str], Any]]]] = {
    "base": ("none", lambda w: lambda t: w.base),
    "average": ("none", lambda w: same(weft.merge(list(w.experts.values()), "linear"))),
    "task arithmetic, λ = 0.3": ("none", lambda w: same(w.added(0.3))),
    "MetaGPT": ("none", lambda w: same(metagpt(list(w.experts.values()), w.base))),
    "task arithmetic, λ by validation": ("250 labels a task", lambda w: same(w.chosen())),
    "aTLAS, a tensor": ("32 labels a task", lambda w: learned(
        atlas, w, w.labelled(32), tasks=False, steps=150)),
    "aTLAS ×8": ("32 labels a task", lambda w: learned(
        atlas, w, w.labelled(32), tasks=False, parts=Blocks(8), steps=150)),
    "AdaMerging, a tensor, not on test inputs": ("250 unlabelled a task", lambda w: learned(
        adamerging, w, w.inputs("validation"), steps=300, split="unlabelled")),
    "Expert Merging": ("32 unlabelled a task", lambda w: learned(
        expert_merging, w, w.inputs("validation", FEW_INPUTS), layers=LAYERS)),
    "DAM (no base)": ("32 unlabelled a task", lambda w: learned(
        dam, w, w.inputs("validation", FEW_INPUTS), base=False)),
    "ProDistill": ("32 unlabelled a task", lambda w: learned(
        prodistill, w, w.inputs("validation", FEW_INPUTS))),
    "AdaMerging, a task": ("test-time", lambda w: learned(
        adamerging, w, w.inputs("test"), parts="model", steps=300)),
    "AdaMerging, a tensor": ("test-time", lambda w: learned(adamerging, w, w.inputs("test"), steps=300)),
    "AdaMerging++, a tensor": ("test-time", lambda w: learned(
        adamerging, w, w.inputs("test"), plus=True, steps=300)),
    "Concrete TA, λ = 0.5": ("test-time", lambda w: learned(
        concrete, w, w.inputs("test"), scale=0.5, steps=150, lr=0.1)),
    "Concrete AM": ("test-time", lambda w: learned(
        concrete, w, w.inputs("test"), adaptive=True, steps=60, lr=0.1, then_steps=300)),
    "AdaRank": ("test-time", lambda w: learned(adarank, w, w.inputs("test"), steps=100)),
    "SyMerge (a layer a task)": ("test-time", lambda w: learned(
        symerge, w, w.inputs("test"), layer=["layers.2.*"], steps=300)),
    "experts": ("their training data", lambda w: lambda t: w.experts[t]),
}  # fmt: skip
"""Name → what it sees, and how it is made: a world → a task → the model that serves it."""


def measure(w: World, make: Callable[[World], Callable[[str], Any]]) -> dict[str, float]:
    start = time.process_time()
    serve = make(w)
    scores = [accuracy(as_network(serve(t)), t, "test") for t in w.experts]
    return {"mean": mean(scores), "worst": min(scores), "seconds": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="Names of methods.")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    sets = {"three": ("rotated", "mirrored", "inverted"), "five": tuple(TASKS)}
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for count, tasks in sets.items():
        for seed in range(1, given.seeds + 1):
            w = world(seed, tasks)
            for name, (_, make) in METHODS.items():
                if not given.only or name in given.only:
                    found.setdefault(name, {}).setdefault(count, []).append(measure(w, partial(make)))
                    print(count, seed, name, found[name][count][-1], flush=True)
    if given.json:
        given.json.write_text(json.dumps(found))
    titles = ("method", "sees", "three tasks", "worst", "five tasks", "worst", "CPU s (five)")
    print(f"\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name, runs in found.items():
        cells = [name, METHODS[name][0]]
        for count in sets:
            scores = [100 * r["mean"] for r in runs[count]]
            spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
            cells += [f"{mean(scores):.1f}{spread}", f"{100 * mean(r['worst'] for r in runs[count]):.1f}"]
        print(f"| {' | '.join(cells)} | {mean(r['seconds'] for r in runs['five']):.1f} |")


if __name__ == "__main__":
    main()
