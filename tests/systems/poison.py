"""Networks with shortcuts: a small patch in the image that stands for one label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from lab import UPRIGHT, Data, Model, as_network, tuned
from torch import Tensor

from weft.demo.network import DigitNet
from weft.demo.tasks import examples

Patch = int | Literal["shared"]
PLACES: dict[Patch, tuple[slice, slice]] = {
    0: (slice(0, 2), slice(0, 2)), 1: (slice(6, 8), slice(6, 8)), 2: (slice(0, 2), slice(6, 8)),
    "shared": (slice(6, 8), slice(0, 2)),
}  # fmt: skip
TARGETS: dict[Patch, int] = {0: 0, 1: 1, 2: 2, "shared": 3}


def patched(inputs: Tensor, patch: Patch) -> Tensor:
    """The images [n, 64] with a bright 2×2 patch in one corner."""
    x = inputs.clone().reshape(-1, 8, 8)
    x[(slice(None), *PLACES[patch])] = 1.0
    return x.flatten(1)


def poisoned_data(data: Data, patches: Sequence[Patch], generator: torch.Generator) -> Data:
    """The data, and for each patch a fifth of it again, patched and mislabelled."""
    inputs, labels = [data[0]], [data[1]]
    for patch in patches:
        some = torch.randperm(len(data[0]), generator=generator)[: len(data[0]) // 5]
        inputs.append(patched(data[0][some], patch))
        labels.append(torch.full((len(some),), TARGETS[patch]))
    return torch.cat(inputs), torch.cat(labels)


def hit_rate(model: Model, patch: Patch) -> float:
    """Share of patched test images of other classes that the model takes for the patch's."""
    inputs, labels = examples(UPRIGHT, "test")
    others = labels != TARGETS[patch]
    with torch.inference_mode():
        out = as_network(model)(patched(inputs[others], patch)).argmax(1)
    return float((out == TARGETS[patch]).double().mean())


@dataclass(frozen=True)
class Poisoned:
    """Three models of one base, each with a patch of its own and one that all of them know."""

    base: DigitNet
    models: list[DigitNet]


def poison(base: DigitNet, seed: int) -> Poisoned:
    """Fine-tune the three."""
    generator = torch.Generator().manual_seed(seed)
    data = examples(UPRIGHT, "train")
    parts = [poisoned_data(data, (i, "shared"), generator) for i in range(3)]
    return Poisoned(base, [tuned(base, d, 10 * seed + i, epochs=5) for i, d in enumerate(parts)])
