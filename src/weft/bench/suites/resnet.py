"""`resnet`: four of the image sets with a small ResNet, whose BatchNorm statistics no average of weights gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from weft.bench.networks import Residual, ResNet
from weft.bench.suite import Suite
from weft.bench.suites.data import data_folder
from weft.bench.suites.vision import family, made
from weft.bench.training import Fit

TASKS = ("mnist", "fashion_mnist", "gtsrb", "kannada_mnist")
BASE = Fit(epochs=32, lr=2e-3, smoothing=0.1)
EXPERT = Fit(epochs=2, lr=5e-4, smoothing=0.1)


def resnet(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Four tasks, a ResNet of 0.14 M weights with BatchNorm."""
    folder = data_folder(data)
    of = replace(family(folder, "resnet", ResNet, (ResNet, Residual), TASKS), base=BASE, expert=EXPERT)
    return made(
        "resnet", folder, of, seed, say,
        about="Four image sets at 16×16 (digits of two scripts, clothes, traffic signs), a ResNet with BatchNorm.",
    )  # fmt: skip
