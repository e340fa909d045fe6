"""Models that several families of systems are tested on, trained once a session; seconds in all."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("sklearn")

from lab import World, pretrained, tuned
from language import Language, family
from poison import Poisoned, poison

from weft.demo.experts import expert_paths
from weft.demo.network import DigitNet
from weft.demo.tasks import TASKS, examples

SEEDS = (1, 2, 3)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and no threads that wait for one another over tensors this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shipped() -> World:
    """The demo's base and its five experts, as files."""
    paths = expert_paths()
    return World(paths["base"], {t: paths[t] for t in TASKS})


@pytest.fixture(scope="session")
def bases() -> dict[int, DigitNet]:
    """Seed → a base trained on upright digits and a few of every task."""
    return {seed: pretrained(seed, epochs=15) for seed in SEEDS}


@pytest.fixture(scope="session")
def worlds(shipped: World, bases: dict[int, DigitNet]) -> list[World]:
    """The shipped models, and two more bases with three experts each."""
    made = [shipped]
    for seed in SEEDS[:2]:
        base = bases[seed]
        tasks = ("rotated", "mirrored", "inverted")
        made.append(World(base, {
            t: tuned(base, examples(t, "train"), 10 * seed + i, epochs=12) for i, t in enumerate(tasks)
        }))  # fmt: skip
    return made


@pytest.fixture(scope="session")
def languages() -> list[Language]:
    """Two families of tiny language models."""
    return [family(seed) for seed in SEEDS[:2]]


@pytest.fixture(scope="session")
def poisoned(bases: dict[int, DigitNet]) -> list[Poisoned]:
    """Models with shortcuts, for every base."""
    return [poison(base, seed) for seed, base in bases.items()]
