"""The algebra of factors against dense float64 matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.adapters.factors import Factors
from weft.adapters.lowrank import (
    angles,
    concat,
    cores,
    difference,
    finite,
    kept_rank,
    norm,
    overlaps,
    truncated,
)
from weft.errors import DataError, UsageError


def update(out: int, into: int, rank: int, seed: int) -> Factors:
    g = torch.Generator().manual_seed(seed)
    b = torch.randn(out, rank, generator=g, dtype=torch.float64)
    return Factors(b, torch.randn(rank, into, generator=g, dtype=torch.float64), (out, into))


def dense(updates: list[Factors], weights: list[float]) -> Tensor:
    total = torch.zeros(updates[0].shape, dtype=torch.float64)
    for f, w in zip(updates, weights, strict=True):
        total += w * (f.b @ f.a)
    return total


sizes = st.integers(1, 12)


@settings(max_examples=60, deadline=None)
@given(out=sizes, into=sizes, ranks=st.lists(st.integers(0, 6), min_size=1, max_size=4), data=st.data())
def test_sums_spectra_and_truncation_errors_are_those_of_the_dense_matrix(
    out: int, into: int, ranks: list[int], data: st.DataObject
) -> None:
    updates = [update(out, into, r, seed) for seed, r in enumerate(ranks)]
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=len(ranks), max_size=len(ranks)))
    whole = dense(updates, weights)
    torch.testing.assert_close(concat(updates, weights).delta(), whole)
    made = cores(updates)
    torch.testing.assert_close(made.q @ made.total(weights) @ made.p.T, whole)
    for i, f in enumerate(updates):
        torch.testing.assert_close(made.q @ made.core(i) @ made.p.T, f.delta())
    rank = data.draw(st.integers(1, 8))
    best = truncated(updates, weights, rank=rank)
    assert 1 <= best.factors.rank <= rank or sum(ranks) == 0
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    r = best.factors.rank
    torch.testing.assert_close(best.factors.delta(), u[:, :r] * s[:r] @ vh[:r], atol=1e-9, rtol=1e-7)
    lost, total = (whole - best.factors.delta()).norm(), whole.norm()
    if total > 1e-9:
        assert best.error == pytest.approx(float(lost / total), abs=2e-7)
    assert norm(concat(updates, weights)) == pytest.approx(float(total), abs=1e-6, rel=1e-7)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), energy=st.floats(0.01, 1.0))
def test_the_rank_for_an_energy_is_the_least_that_keeps_it(seed: int, energy: float) -> None:
    updates = [update(9, 7, 3, seed), update(9, 7, 2, seed + 1)]
    best = truncated(updates, energy=energy)
    assert best.energy >= energy - 1e-12
    if best.factors.rank > 1:
        assert truncated(updates, rank=best.factors.rank - 1).energy < energy


def test_all_of_the_energy_of_a_repeated_adapter_needs_its_own_rank_only() -> None:
    f = update(20, 30, 4, 0)
    best = truncated([f, f, f], [0.5, 0.25, 0.25], energy=1.0)
    assert best.factors.rank == 4 and best.error < 1e-12
    torch.testing.assert_close(best.factors.delta(), f.delta())


def test_opposite_and_zero_updates_become_one_rank_of_zeros() -> None:
    f = update(6, 5, 2, 0)
    for best in (truncated([f, f], [1.0, -1.0], energy=0.9), truncated([f], [0.0], energy=1.0)):
        assert best.factors.rank == 1 and best.factors.delta().abs().max() < 1e-12
    assert truncated([f], [0.0], rank=2).error == 0.0


def test_a_rank_beyond_the_matrix_is_clipped() -> None:
    best = truncated([update(3, 50, 2, 0), update(3, 50, 2, 1)], rank=40)
    assert best.factors.rank == 3 and best.error < 1e-12


def test_a_thousand_rows_agree_with_a_dense_svd() -> None:
    updates, weights = [update(300, 200, 16, seed) for seed in range(4)], [0.4, -0.3, 1.0, 0.2]
    best = truncated(updates, weights, rank=16)
    u, s, vh = torch.linalg.svd(dense(updates, weights), full_matrices=False)
    expected = (u[:, :16] * s[:16]) @ vh[:16]
    assert float((best.factors.delta() - expected).norm() / expected.norm()) < 1e-10
    torch.testing.assert_close(best.spectrum[:64], s[:64])
    assert best.error == pytest.approx(float(s[16:].norm() / s.norm()), rel=1e-9)


def test_overlaps_are_mean_squared_cosines_of_principal_angles() -> None:
    shared, other = update(30, 40, 4, 0), update(30, 40, 4, 1)
    turned = Factors(other.b, torch.randn(4, 4, dtype=torch.float64) @ shared.a, shared.shape)
    found = overlaps(cores([shared, turned, other]))
    assert found[0, 1] == pytest.approx(1.0) and torch.equal(found, found.T)
    qa, qb = (torch.linalg.qr(f.a.T).Q for f in (shared, other))
    cosines = torch.linalg.svdvals(qa.T @ qb)
    torch.testing.assert_close(angles([shared, turned, other], 0, 2), cosines)
    assert found[0, 2] == pytest.approx(float(cosines.square().mean()))
    sides = angles([turned, other], 0, 1, side="b")
    torch.testing.assert_close(sides, torch.ones(4, dtype=torch.float64))
    orthogonal = Factors(shared.b, torch.eye(40, dtype=torch.float64)[:4], shared.shape)
    apart = Factors(shared.b, torch.eye(40, dtype=torch.float64)[4:8], shared.shape)
    assert float(overlaps(cores([orthogonal, apart]))[0, 1]) == 0.0


def test_a_difference_is_relative_to_the_second() -> None:
    f, g = update(8, 9, 2, 0), update(8, 9, 3, 1)
    expected = float((f.delta() - g.delta()).norm() / g.delta().norm())
    assert difference(f, g) == pytest.approx(expected, rel=1e-9)
    assert difference(f, f) < 1e-12
    zero = concat([g], [0.0])
    assert difference(f, zero) == pytest.approx(float(f.delta().norm()), rel=1e-9)


def test_what_cannot_be_meant_is_refused() -> None:
    f = update(4, 5, 2, 0)
    with pytest.raises(UsageError, match="one shape"):
        cores([f, update(5, 4, 2, 0)])
    with pytest.raises(UsageError, match="no updates"):
        cores([])
    for bad in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(UsageError, match=r"rank|energy"):
            kept_rank(torch.ones(3, dtype=torch.float64), **bad)  # type: ignore[arg-type]
    f.a[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"'w'.*NaN"):
        finite(f, "w", "adapter")
