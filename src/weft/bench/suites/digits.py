"""`digits`: the demo's five views of scikit-learn's digits. Seed 0 are its shipped experts; others are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weft.api import Model
from weft.bench.cache import code, stored
from weft.bench.suite import Suite, Task
from weft.bench.suites.damage import DAMAGES, damaged
from weft.demo import train
from weft.demo.experts import expert_paths
from weft.demo.network import DigitNet
from weft.demo.tasks import CONTROL, SIDE, TASKS, Split, examples, fingerprint

SETTINGS = ("FEW", "BATCH", "BASE_EPOCHS", "BASE_RATE", "EXPERT_EPOCHS", "EXPERT_RATE")


def digits(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Experts that ship with weft, or others of another seed."""
    models: Mapping[str, Model] = _trained(seed, say) if seed else expert_paths()
    return Suite(
        "digits", DigitNet, [_task(t) for t in TASKS], {t: models[t] for t in TASKS}, models["base"],
        unseen=[_task(CONTROL.name)], joint=models["joint"], seed=seed,
        about="Five views of scikit-learn's digits (8×8), a multilayer perceptron of 0.15 M weights.",
        notes=("Unseen is the upright view, which the base was trained on.",),
    )  # fmt: skip


def _trained(seed: int, say: Callable[[str], None]) -> dict[str, dict[str, Tensor]]:
    """What the demo's script trains, under its names, from another start and in another order of the images."""
    about = {"seed": seed, "data": fingerprint(), "settings": [getattr(train, n) for n in SETTINGS],
             "code": code(train.trained, train.fit, DigitNet)}  # fmt: skip

    def make() -> dict[str, Tensor]:
        say(f"training the experts of seed {seed}")
        # a hundred apart: the script adds a number to the seed for each model
        nets = {name: net for name, _, net in train.trained(100 * seed)}
        return {f"{n}/{k}": v for n, net in nets.items() for k, v in net.state_dict().items()}

    kept = stored("digits-experts", about, make)
    names = dict.fromkeys(k.partition("/")[0] for k in kept)
    return {n: {k.partition("/")[2]: v for k, v in kept.items() if k.partition("/")[0] == n} for n in names}


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
