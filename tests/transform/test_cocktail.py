"""What GAN Cocktail does besides what its test on digits shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.errors import DataError, UsageError
from weft.transform.cocktail import Gan, cocktail, imitated


def gan(seed: int) -> Gan:
    torch.manual_seed(seed)
    return Gan(
        nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)),
        nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)), 2,
    )  # fmt: skip


def test_classes_change_nothing_before_training_and_sources_stay() -> None:
    root, other = gan(0), gan(1)
    before = [p.clone() for p in (*root.generator.parameters(), *other.generator.parameters())]
    found = cocktail(root, {"b": other}, rooting=3, steps=0)
    z = torch.randn(5, 2)
    torch.testing.assert_close(found.generator(z, torch.tensor([0, 1, 0, 1, 0])), found.mixed.generator(z))
    for p, q in zip(before, (*root.generator.parameters(), *other.generator.parameters()), strict=True):
        assert torch.equal(p, q)
    mean = [
        (a + b) / 2 for a, b in zip(*(g.generator.parameters() for g in found.rooted.values()), strict=True)
    ]
    for p, q in zip(mean, found.mixed.generator.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert found.names == ("root", "b") and found.sample(6).shape == (6, 3)


def test_the_same_seed_gives_the_same_and_leaves_random_numbers_alone() -> None:
    root, other = gan(0), gan(1)
    state = torch.get_rng_state()
    one, two = (cocktail(root, {"b": other}, rooting=2, steps=2, seed=4) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for p, q in zip(one.generator.parameters(), two.generator.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_cannot_be_mixed_is_said() -> None:
    root = gan(0)

    def wide(n: int) -> Tensor:
        return torch.zeros(n, 4)

    def endless(n: int) -> Tensor:
        return torch.full((n, 3), torch.inf)

    cases: list[tuple[str, type[Exception], Callable[[], Any]]] = [
        ("by name", UsageError, lambda: cocktail(root, {})),
        ("none called 'root'", UsageError, lambda: cocktail(root, {"root": gan(1)})),
        ("2 positive numbers", UsageError, lambda: cocktail(root, {"b": gan(1)}, shares=[1.0])),
        ("fewer than 0", UsageError, lambda: cocktail(root, {"b": gan(1)}, steps=-1)),
        (r"samples \[2, 4\]", DataError, lambda: cocktail(root, {"b": wide})),
        ("finite ones", DataError, lambda: cocktail(root, {"b": endless})),
        ("is nan at step", DataError, lambda: imitated(root, lambda n: torch.full((n, 3), torch.nan), 1)),
        (
            "no source 'c'",
            UsageError,
            lambda: cocktail(root, {"b": gan(1)}, rooting=0, steps=0).sample(2, "c"),
        ),
    ]
    for text, kind, call in cases:
        with pytest.raises(kind, match=text):
            call()
