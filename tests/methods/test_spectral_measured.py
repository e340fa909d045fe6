"""ESM where the answer is known, at layouts and edges; its formula is checked in test_reference.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.methods.esm import shift
from weft.methods.registry import METHODS
from weft.methods.step import At

esm, D = METHODS["esm"], torch.float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def grams(k: int, d: int, rank: int | None = None, seed: int = 7) -> Tensor:
    x = randn(k, rank or 3 * d, d, seed=seed)
    return x.mT @ x / x.shape[1]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("m, n", [(30, 50), (50, 30), (120, 150), (150, 120)])
def test_both_ways_to_the_directions_of_the_outputs_change(m: int, n: int) -> None:
    t, g = randn(m, n), grams(1, n)[0]
    energy, p = torch.linalg.eigh(t @ g @ t.T)
    found = shift(t, g, 10)
    assert found.rank == 10
    torch.testing.assert_close(found.s.square(), energy.flip(0)[:10])
    overlap = (found.u.T @ p.flip(1)[:, :10]).abs()
    torch.testing.assert_close(overlap, torch.eye(10, dtype=D), rtol=0, atol=1e-7)


def test_experts_that_left_a_matrix_alone_are_no_tasks_of_it() -> None:
    x, g = randn(3, 12, 20), grams(4, 20)
    with_one = torch.cat([x, torch.zeros_like(x[:1])])
    alone = esm(x, statistics={"gram": g[:3]})
    assert distance(esm(with_one, statistics={"gram": g}), alone) < 1e-9
    weightless = esm(torch.cat([x, x[:1] + 1]), weight=[1.0, 1.0, 1.0, 0.0], statistics={"gram": g})
    assert distance(weightless, alone) < 1e-9


def test_opposite_experts_cancel_and_identical_ones_add_up() -> None:
    x, g = randn(1, 40, 60), grams(1, 60)
    both = {"gram": g.expand(2, 60, 60)}
    assert float(esm(torch.cat([x, -x]), statistics=both).norm()) < 1e-9 * float(x.norm())
    twice, once = esm(x.expand(2, 40, 60), statistics=both), esm(x, share=0.5, statistics={"gram": g})
    assert distance(twice, 2 * once) < 1e-9


def test_more_tasks_than_the_matrix_has_rank() -> None:
    for shape in ((2, 30), (30, 2), (1, 9), (9, 1)):
        y = esm(randn(5, *shape), statistics={"gram": grams(5, shape[1])})
        assert bool(y.isfinite().all()) and float(y.norm()) > 0.1


def test_low_rank_experts_and_few_inputs_move_trained_directions_only() -> None:
    x = randn(4, 100, 6) @ randn(4, 6, 120, seed=1)
    y = esm(x, statistics={"gram": grams(4, 120, rank=32)})
    left = torch.linalg.qr(torch.cat(list(x), 1) @ randn(480, 24, seed=2))[0]
    assert float((y - left @ (left.T @ y)).norm()) < 1e-8 * float(y.norm())
    assert torch.linalg.matrix_rank(y) <= 24


def test_inputs_that_were_never_seen() -> None:
    x, g = randn(3, 12, 20), grams(3, 20)
    none = METHODS["tsv"](x)
    for known in (None, torch.zeros_like(g)):
        assert torch.equal(esm(x, statistics={"gram": known}), none)
    dead = g.clone()
    dead[1] = 0  # one task's inputs only: it takes no part, and its share stays its own
    without = esm(x[[0, 2]], share=1 / 3, statistics={"gram": g[[0, 2]]})
    assert distance(esm(x, statistics={"gram": dead}), without) < 1e-9


def test_scales_of_inputs_and_updates() -> None:
    """Who had more or louder images has no more to say; updates of any size go with their size."""
    x, g = randn(3, 12, 20), grams(3, 20)
    y = esm(x, statistics={"gram": g})
    louder = g * torch.tensor([1e-9, 1.0, 1e9], dtype=D)[:, None, None]
    assert distance(esm(x, statistics={"gram": louder}), y) < 1e-9
    for size in (1e-12, 1e12):
        assert distance(esm(x * size, statistics={"gram": g}), y * size) < 1e-9


def test_layouts() -> None:
    x, g = randn(3, 12, 20), grams(3, 20)
    y = esm(x, statistics={"gram": g})
    turned = esm(x.mT, at=At(transposed=True), statistics={"gram": g})
    assert distance(turned.T, y) < 1e-9
    kernel = esm(x.reshape(3, 12, 5, 2, 2), statistics={"gram": g})
    assert distance(kernel.reshape(12, 20), y) < 1e-9
    fused, each = randn(3, 4, 6, 16), grams(12, 16).reshape(3, 4, 16, 16)
    found = esm(fused, statistics={"gram": each})
    for e in range(4):
        assert distance(found[e], esm(fused[:, e], statistics={"gram": each[:, e]})) < 1e-9
