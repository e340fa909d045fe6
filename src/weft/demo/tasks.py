"""Five tasks made of scikit-learn's bundled digits: the same ten classes, seen in five different ways.

Every task is a fixed rearrangement of the 8x8 pixels (or their negation), so the tasks share their labels
and their architecture but hardly any features. The 1797 original images are divided **once**, before any
transformation, into pre-training, training, validation and test images; each task shows its own view of
the same four parts. An image in a test split has therefore been seen by no model in any view.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from weft.errors import DataError, MissingExtra, UsageError, did_you_mean

Split = Literal["pretrain", "train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SIZES: Mapping[Split, int] = {"pretrain": 500, "train": 550, "validation": 250, "test": 497}
"""How many of the originals go to each split; together all 1797."""

SPLIT_SEED = 7
SIDE = 8
CLASSES = 10


@dataclass(frozen=True)
class Task:
    """One way of showing the digits. `view` maps images [n, 8, 8] to images [n, 8, 8]."""

    name: str
    about: str
    view: Callable[[Tensor], Tensor]


def _rotated(x: Tensor) -> Tensor:
    return x.rot90(1, (1, 2))


def _mirrored(x: Tensor) -> Tensor:
    return x.flip(2)


def _inverted(x: Tensor) -> Tensor:
    return -x  # grey values lie in [-1, 1]


def _swapped(x: Tensor) -> Tensor:
    return x.roll((SIDE // 2, SIDE // 2), (1, 2))


def _interleaved(x: Tensor) -> Tensor:
    rows = torch.arange(SIDE).reshape(2, SIDE // 2).T.flatten()  # 0 4 1 5 2 6 3 7
    return x[:, rows]


TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Task("rotated", "turned left by 90 degrees", _rotated),
        Task("mirrored", "left and right exchanged", _mirrored),
        Task("inverted", "dark and light exchanged", _inverted),
        Task("swapped", "each quadrant exchanged with the opposite one", _swapped),
        Task("interleaved", "rows of the upper and lower half alternate", _interleaved),
    )
}
"""The tasks with an expert each, over which averages are taken."""

CONTROL = Task("upright", "as they are: what the base was trained on, and no expert", lambda x: x)
"""No expert is trained on it and no average counts it: it shows what merging costs the base's own skill."""


def task_named(name: str) -> Task:
    """A task or the control, by name."""
    known = TASKS | {CONTROL.name: CONTROL}
    if name not in known:
        raise UsageError(f"the demo has no task {name!r}{did_you_mean(name, known)}")
    return known[name]


@cache
def originals() -> tuple[Tensor, Tensor]:
    """All digits as scikit-learn ships them: images [1797, 8, 8] in [-1, 1] and labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise MissingExtra("scikit-learn", "demo", "weft demo") from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images.astype(np.float32) / 8 - 1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    if images.shape != (sum(SIZES.values()), SIDE, SIDE):
        raise DataError(
            f"scikit-learn's digits have shape {tuple(images.shape)} where the demo expects "
            f"({sum(SIZES.values())}, {SIDE}, {SIDE}): install a scikit-learn that bundles the usual digits"
        )
    return images, labels


@cache
def split_indices() -> Mapping[Split, Tensor]:
    """Split → indices of its originals, each [SIZES[split]]; disjoint, and together all originals.

    RandomState's stream is frozen by numpy's policy, so an installation from the future cuts the data as
    the shipped experts' training did. Anything else could move their training images into the test split.
    """
    images, _ = originals()
    order = torch.from_numpy(np.random.RandomState(SPLIT_SEED).permutation(len(images)))
    parts = torch.split(order, list(SIZES.values()))
    return dict(zip(SIZES, parts, strict=True))


@cache
def examples(task: str, split: Split) -> tuple[Tensor, Tensor]:
    """One split as one task shows it: inputs [n, 64] and labels [n]. The i-th example of a split is the same
    original in every task, which is what makes errors of different tasks comparable image by image."""
    images, labels = originals()
    index = split_indices()[split]
    return task_named(task).view(images[index]).flatten(1).contiguous(), labels[index]


@cache
def fingerprint() -> str:
    """sha256 over the images, labels and splits: experts are only evaluated on the data they left out."""
    images, labels = originals()
    digest = hashlib.sha256()
    for tensor in (images, labels, *split_indices().values()):
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
