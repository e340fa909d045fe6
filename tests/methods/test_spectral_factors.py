"""Every route of the linear algebra gives LAPACK's triplets, or says that it cannot and another takes over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.methods import factors
from weft.methods.factors import Triplets, decompose, polar, unit_scale

D = torch.float64


def made(m: int, n: int, rank: int | None = None, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(m, n, generator=g, dtype=D)
    return torch.randn(m, rank, generator=g, dtype=D) @ torch.randn(rank, n, generator=g, dtype=D)


def agree(found: Triplets, t: Tensor, tol: float = 1e-6) -> None:
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    r = found.rank
    torch.testing.assert_close(found.s, s[:r], rtol=tol, atol=tol * float(s[0]))
    assert float((found.dense() - (u[:, :r] * s[:r]) @ vh[:r]).norm()) < tol * float(s.norm())
    for side in (found.u, found.v):
        assert float((side.T @ side - torch.eye(r, dtype=D)).abs().max()) < 1e-6


@pytest.mark.parametrize("m, n", [(5, 9), (150, 150), (120, 400), (400, 120)])
def test_whole_spectra(m: int, n: int) -> None:
    t = made(m, n)
    found = decompose(t)
    assert found.rank == min(m, n)
    agree(found, t)


@pytest.mark.parametrize("rank", [1, 16, 40])
@pytest.mark.parametrize("m, n", [(256, 300), (300, 256)])
def test_low_rank_takes_the_sketch(m: int, n: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the sketch was to find this")

    monkeypatch.setattr(factors, "_by_gram", never)
    t = made(m, n, rank)
    found = decompose(t + 1e-9 * made(m, n, seed=1))
    assert found.rank == rank
    agree(found, t)


def test_a_matrix_with_a_rank_in_a_corner_and_one_of_few_rows() -> None:
    t = torch.zeros(300, 400, dtype=D)
    t[7, 11] = 3.0
    assert decompose(t).rank == 1
    agree(decompose(t), t)
    t[:30] = made(30, 400)
    assert decompose(t).rank == 30
    agree(decompose(t), t)


@pytest.mark.parametrize("most", [1, 10, 40])
def test_leading_triplets_by_the_mended_route(most: int) -> None:
    for t in (made(200, 300), made(300, 200) * torch.logspace(0, -2, 200, dtype=D)):
        found = decompose(t, most)
        assert found.rank == most
        agree(found, t)
    gram = made(200, 300) @ made(200, 300).T
    top = factors._leading(gram, 40)
    assert top is not None
    torch.testing.assert_close(top[0], torch.linalg.eigvalsh(gram).flip(0)[:40], rtol=1e-9, atol=0)


def test_spectra_too_steep_for_a_gram_matrix_go_to_lapack() -> None:
    t = made(150, 200) * torch.logspace(0, -7, 200, dtype=D)
    s = torch.linalg.svdvals(t)
    found = decompose(t)
    assert found.rank == int((s > 1e-5 * s[0]).sum()) < 150
    torch.testing.assert_close(found.s, s[: found.rank], rtol=1e-9, atol=0)
    assert float((found.u.T @ found.u - torch.eye(found.rank, dtype=D)).abs().max()) < 1e-10


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 130), n=st.integers(1, 130), rank=st.integers(0, 130), power=st.integers(-60, 60))
def test_any_matrix(m: int, n: int, rank: int, power: int) -> None:
    t = made(m, n, rank) * 2.0**power if rank else torch.zeros(m, n, dtype=D)
    c = unit_scale(float(t.abs().max()))
    assert not rank or 0.5 <= float((c * t).abs().max()) < 1
    found = decompose(t * c)
    _, s, _ = torch.linalg.svd(t * c)
    assert found.rank == int((s > 1e-5 * s[0]).sum()) or bool(((s / s[0]).log10() + 5).abs().min() < 0.1)
    assert float((found.dense() - t * c).norm()) <= 1e-4 * float((t * c).norm())


@pytest.mark.parametrize("m, r", [(20, 6), (200, 150), (150, 150), (6, 20), (150, 200)])
def test_polar_factor(m: int, r: int) -> None:
    c = made(m, r)
    u, _, vh = torch.linalg.svd(c, full_matrices=False)
    torch.testing.assert_close(polar(c), u @ vh, rtol=0, atol=1e-9)


@pytest.mark.parametrize("m, r", [(20, 6), (300, 120)])
def test_polar_factor_of_dependent_columns_adds_nothing(m: int, r: int) -> None:
    q = torch.linalg.qr(made(m, r))[0]
    torch.testing.assert_close(polar(torch.cat([q, q], 1)), torch.cat([q, q], 1) / 2**0.5)
    torch.testing.assert_close(polar(torch.cat([q, -q], 1)), torch.cat([q, -q], 1) / 2**0.5)
    assert polar(q[:, :0]).shape == (m, 0)


@pytest.mark.parametrize("gap", [1e-3, 1e-4, 1e-5])
def test_polar_factor_of_nearly_dependent_columns(gap: float) -> None:
    """Above the tolerance the factor is orthonormal, to what its Gram matrix or its SVD can tell."""
    q = torch.linalg.qr(made(300, 120))[0]
    c = torch.cat([q[:, :119], q[:, :1] + gap * q[:, 119:]], 1)
    found = polar(c)
    assert float((found.T @ found - torch.eye(120, dtype=D)).abs().max()) < 1e-6
