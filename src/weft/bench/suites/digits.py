"""`digits`: the demo's five views of scikit-learn's digits and its shipped experts. Nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weft.bench.suite import Suite, Task
from weft.bench.suites.damage import DAMAGES, damaged
from weft.demo.experts import expert_paths
from weft.demo.network import DigitNet
from weft.demo.tasks import CONTROL, SIDE, TASKS, Split, examples


def digits(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """One set of experts ships, so every seed is the same."""
    if seed:
        say("digits: the shipped experts are of one seed")
    paths = expert_paths()
    return Suite(
        "digits", DigitNet, [_task(t) for t in TASKS], {t: paths[t] for t in TASKS}, paths["base"],
        unseen=[_task(CONTROL.name)], joint=paths["joint"], seed=seed,
        about="Five views of scikit-learn's digits (8×8), a multilayer perceptron of 0.15 M weights.",
        notes=("Unseen is the upright view, which the base was trained on.",),
    )  # fmt: skip


def _task(name: str) -> Task:
    splits: tuple[Split, ...] = ("train", "validation", "test")
    x, y = examples(name, "test")
    return Task(
        name, {s: examples(name, s) for s in splits},
        corrupted={d: (_flat(damaged(_square(x), d)), y) for d in DAMAGES},
    )  # fmt: skip


def _square(x: Tensor) -> Tensor:
    return x.reshape(-1, 1, SIDE, SIDE)


def _flat(x: Tensor) -> Tensor:
    return torch.flatten(x, 1)
