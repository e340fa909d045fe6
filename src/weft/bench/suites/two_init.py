"""`two-init`: two networks from different random starts, each with most of its images from one half of the classes.

There is no base, so task vectors mean nothing; what helps is bringing the units into one order first. Images are
scikit-learn's digits, upright.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from weft.bench.cache import code, stored
from weft.bench.suite import Suite, Task
from weft.bench.training import Fit, fit
from weft.demo.network import DigitNet
from weft.demo.tasks import CONTROL, Split, examples, fingerprint

HALVES = {"low": (0, 5), "high": (5, 10)}
FIT = Fit(epochs=15, lr=1e-3, batch=50, weight_decay=0.1)
OTHERS = 5
"""One in so many images of the other half is seen, too."""


def two_init(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Digits 0–4 and 5–9, ten outputs each."""
    return Suite(
        "two-init", DigitNet, [_task(h) for h in HALVES], {h: _trained(h, seed, say) for h in HALVES}, seed=seed,
        about="Two multilayer perceptrons from different random starts, on scikit-learn's digits: one saw mostly 0 "
        "to 4, the other mostly 5 to 9.",
    )  # fmt: skip


def _half(name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    low, high = HALVES[name]
    chosen = (y >= low) & (y < high)
    return x[chosen], y[chosen]


def _task(name: str) -> Task:
    parts: tuple[Split, ...] = ("train", "validation", "test")
    return Task(name, {p: _half(name, *examples(CONTROL.name, p)) for p in parts})


def _trained(name: str, seed: int, say: Callable[[str], None]) -> dict[str, Tensor]:
    start = 2 * seed + list(HALVES).index(name)
    about = {"half": name, "start": start, "settings": asdict(FIT), "data": fingerprint(), "others": OTHERS,
             "code": code(fit, DigitNet)}  # fmt: skip

    def make() -> dict[str, Tensor]:
        say(f"training {name} of seed {seed}")
        x, y = (
            torch.cat(p)
            for p in zip(*(examples(CONTROL.name, s) for s in ("pretrain", "train")), strict=True)
        )
        own = (y >= HALVES[name][0]) & (y < HALVES[name][1])
        kept = own | (torch.arange(len(y)) % OTHERS == 0)
        return fit(DigitNet(torch.Generator().manual_seed(start)), (x[kept], y[kept]), FIT, start)

    return stored(f"digitnet-{name}", about, make)
