"""`vision8` and `visionN`: eight image sets at 16×16, a small vision transformer, one expert each.

Base and experts see different training images. Coefficients are chosen on validation images, which no model has
seen; unseen tasks are other people's digits, read with the columns of mnist and kannada_mnist.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.bench.networks import Block, ViT
from weft.bench.suite import Suite, Task
from weft.bench.suites.damage import DAMAGES, damaged
from weft.bench.suites.data import data_folder, digest, images
from weft.bench.training import Family, Fit, joined

TASKS = (
    "mnist", "fashion_mnist", "cifar10_jpeg", "gtsrb", "eurosat", "kannada_mnist", "omniglot_alphabet", "mnist_m",
)  # fmt: skip
CLASSES = {"gtsrb": 43, "omniglot_alphabet": 8}
UNSEEN = {"usps": "mnist", "kannada_dig_ood": "kannada_mnist"}
"""Task without an expert → the task whose classes it shares."""
SIZES = {"few": 150, "validation": 300, "train": 6000}
TEST, DAMAGED = 400, 64
BASE = Fit(epochs=30, lr=1e-3, smoothing=0.1)
EXPERT = Fit(epochs=5, lr=5e-4, smoothing=0.1)
"""Epochs of a task that has SIZES["train"] images; one that has fewer sees them more often."""
JOINT = Fit(epochs=1, lr=5e-4, smoothing=0.1)


@dataclass(frozen=True)
class Images:
    """The parts of one task's images, and its columns of the head."""

    few: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    columns: tuple[int, int]

    def targets(self, part: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Labels as columns of the joint head."""
        return part[0], part[1] + self.columns[0]

    def task(self, name: str) -> Task:
        x, y = self.test[0][:DAMAGED], self.test[1][:DAMAGED]
        return Task(
            name, {"train": self.train, "validation": self.validation, "test": self.test}, self.columns,
            corrupted={d: (damaged(x, d), y) for d in DAMAGES},
        )  # fmt: skip


def columns(tasks: tuple[str, ...] = TASKS) -> dict[str, tuple[int, int]]:
    """Task → its columns of the head, one after the other."""
    found, start = {}, 0
    for t in tasks:
        found[t] = start, start + CLASSES.get(t, 10)
        start = found[t][1]
    return found


def parts(folder: Path, name: str, place: tuple[int, int]) -> Images:
    """Training images cut into few (for the base), validation, and train (for the expert)."""
    found = images(folder, name)
    x, y = found["train"]
    few, val = SIZES["few"], SIZES["validation"]
    cuts = {"few": (0, few), "validation": (few, few + val), "train": (few + val, few + val + SIZES["train"])}
    cut = {k: (x[a:b], y[a:b]) for k, (a, b) in cuts.items()}
    test = found["test"]
    return Images(**cut, test=(test[0][:TEST], test[1][:TEST]), columns=place)


def family(
    folder: Path, kind: str, make: Callable[[int], nn.Module], code: tuple[Any, ...],
    tasks: tuple[str, ...] = TASKS,
) -> Family:  # fmt: skip
    """Base and experts of a network on these tasks."""
    about = {"files": digest(folder, tasks), "sizes": SIZES, "split": 1}
    return Family(kind, make, columns(tasks), BASE, EXPERT, about, code)


def vision8(seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None) -> Suite:
    """Eight tasks, a transformer of 0.42 M weights."""
    folder = data_folder(data)
    return made(
        "vision8", folder, family(folder, "vit", ViT, (ViT, Block), TASKS), seed, say,
        about="Eight image sets at 16×16 (digits of two scripts, clothes, objects, traffic signs, land use, "
        "alphabets, digits on photographs), a vision transformer of 0.42 M weights with a convolutional stem.",
    )  # fmt: skip


def vision_n(
    seed: int, data: str | Path | None = None, say: Callable[[str], None] = lambda _: None
) -> list[Suite]:
    """The first 2, 3 … 8 tasks of `vision8`: the same base, the same experts."""
    whole = vision8(seed, data, say)
    return [whole.first(n) for n in range(2, len(whole.tasks))] + [whole]


def made(name: str, folder: Path, of: Family, seed: int, say: Callable[[str], None], about: str) -> Suite:
    """The suite of one network family, its models from the cache or trained now."""
    found: Mapping[str, Images] = {t: parts(folder, t, place) for t, place in of.classes.items()}
    base = of.pretrained(lambda: {t: p.targets(p.few) for t, p in found.items()}, seed, say)

    def expert(task: str) -> dict[str, Tensor]:
        epochs = round(of.expert.epochs * SIZES["train"] / len(found[task].train[1]))
        how = replace(of.expert, epochs=epochs)
        return of.tuned(base, task, lambda: found[task].targets(found[task].train), seed, say, how)

    def together() -> tuple[Tensor, Tensor]:
        x, y = joined([p.targets(p.train) for p in found.values()])
        return x, y

    experts = {t: expert(t) for t in of.classes}
    unseen = []
    for task, like in UNSEEN.items():
        test = images(folder, task)["test"]
        unseen.append(Task(task, {"test": (test[0][:TEST], test[1][:TEST])}, of.classes[like]))
    return Suite(
        name, lambda: of.make(of.width), [p.task(t) for t, p in found.items()], experts, base, unseen,
        joint=of.tuned(base, "joint", together, seed, say, JOINT), about=about, seed=seed,
    )  # fmt: skip
