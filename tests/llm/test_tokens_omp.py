"""Orthogonal matching pursuit and the other ways, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.llm.tokens import omp as omp_module
from weft.llm.tokens.approximate import WAYS, Terms, Unknown
from weft.llm.tokens.omp import omp


def problem(n: int = 9, m: int = 40, d: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    atoms = torch.randn((m, d), generator=g, dtype=torch.float64)
    return torch.randn((n, d), generator=g, dtype=torch.float64), atoms


def reference(b: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """Greedy choice, then least squares from scratch at every step."""
    support: list[int] = []
    residual = b
    for _ in range(k):
        match = np.abs(atoms @ residual)
        match[support] = -1
        support.append(int(match.argmax()))
        c, *_ = np.linalg.lstsq(atoms[support].T, b, rcond=None)
        residual = b - atoms[support].T @ c
    full = np.zeros(len(atoms))
    full[support] = c
    return full


def dense(found: omp_module.Sparse, m: int) -> np.ndarray:
    out = np.zeros((len(found.index), m))
    for i, (row, c) in enumerate(zip(found.index.tolist(), found.coefficient.tolist(), strict=True)):
        for j, value in zip(row, c, strict=True):
            if j >= 0:
                out[i, j] += value
    return out


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_equals_least_squares_on_the_greedy_support(k: int) -> None:
    b, atoms = problem()
    found = omp(b, atoms, k, tolerance=0)
    want = np.stack([reference(t.numpy(), atoms.numpy(), k) for t in b])
    assert np.allclose(dense(found, len(atoms)), want, atol=1e-9)
    error = np.linalg.norm(b.numpy() - want @ atoms.numpy(), axis=1) / b.norm(dim=1).numpy()
    assert np.allclose(found.error.numpy(), error, atol=1e-9)


@pytest.mark.filterwarnings("ignore")
def test_equals_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    b, atoms = problem(6, 50, 20, 1)
    atoms = atoms / atoms.norm(dim=1, keepdim=True)  # scikit-learn expects unit atoms
    want = linear.orthogonal_mp(atoms.T.numpy(), b.T.numpy(), n_nonzero_coefs=5)
    assert np.allclose(dense(omp(b, atoms, 5, 0), 50).T, want, atol=1e-8)


def test_float32_is_near_float64() -> None:
    b, atoms = problem(20, 60, 32, 2)
    one, two = omp(b, atoms, 12), omp(b, atoms.float(), 12)
    assert np.abs(dense(one, 60) - dense(two, 60)).max() < 1e-4


def test_a_target_that_is_an_atom_or_a_sum_of_two_is_exact() -> None:
    g = torch.Generator().manual_seed(3)
    atoms = torch.linalg.qr(torch.randn((32, 20), generator=g, dtype=torch.float64)).Q.T  # orthonormal
    b = torch.stack([atoms[7], 2 * atoms[3] - 0.5 * atoms[11], torch.zeros(32, dtype=torch.float64)])
    found = omp(b, atoms, 8)
    assert [(r >= 0).sum().item() for r in found.index] == [1, 2, 0]
    assert found.index[0, 0] == 7 and found.coefficient[0, 0] == pytest.approx(1)
    assert dense(found, 20)[1, [3, 11]] == pytest.approx([2, -0.5]) and found.error.max() < 1e-9


def test_more_atoms_than_dimensions_and_equal_atoms() -> None:
    b, atoms = problem(4, 6, 3, 4)
    atoms = torch.cat([atoms[:2], atoms[:2], atoms[:2]])  # of rank two in three dimensions
    found = omp(b, atoms, 64, 0)
    best = np.linalg.lstsq(atoms.T.numpy(), b.T.numpy(), rcond=None)[0].T
    assert np.allclose(dense(found, 6) @ atoms.numpy(), best @ atoms.numpy(), atol=1e-9)
    assert torch.isfinite(found.coefficient).all() and found.index.max() < 2


def test_batches_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    b, atoms = problem(30, 40, 16, 5)
    whole = omp(b, atoms, 6)
    monkeypatch.setattr(omp_module, "WORKING", 1 << 13)
    parts = omp(b, atoms, 6)
    assert torch.equal(whole.index, parts.index) and torch.allclose(
        whole.coefficient, parts.coefficient, atol=1e-12
    )
    assert omp(b[:0], atoms, 6).index.shape == (0, 6)


def unknown(seed: int = 0, k: int = 4, width: int = 12) -> Unknown:
    """The model's space is the donor's turned, scaled and shifted; so a map of landmarks can be exact."""
    g = torch.Generator().manual_seed(seed)
    theirs = torch.randn((50, 12), generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn((12, 12), generator=g, dtype=torch.float64)).Q[:, :width]
    ours = 1.7 * theirs @ turn + torch.randn(width, generator=g, dtype=torch.float64)
    shared = np.stack([np.arange(30), np.arange(30)])
    return Unknown("embed", theirs, ours, np.arange(40, 50), shared, k=k)


def values(made: Terms | torch.Tensor, u: Unknown) -> np.ndarray:
    if isinstance(made, torch.Tensor):
        return made.numpy()
    out = np.zeros((len(u.wanted), u.ours.shape[1]))
    np.add.at(out, made.out, made.coefficient[:, None] * u.ours.numpy()[made.row])
    return out


def test_procrustes_finds_the_turn_the_scale_and_the_shift() -> None:
    u = unknown()
    assert np.allclose(values(WAYS["procrustes"](u), u), u.ours[40:].numpy(), atol=1e-9)


def test_procrustes_between_widths_is_the_best_of_its_kind() -> None:
    u = unknown(width=7)
    made = values(WAYS["procrustes"](u), u)
    assert made.shape == (10, 7) and np.abs(made - u.ours[40:].numpy()).mean() < 1.0


def test_neighbours_by_hand() -> None:
    u = unknown(k=3)
    made = values(WAYS["neighbours"](u), u)
    for i, target in enumerate(u.targets.numpy()):
        distance = np.linalg.norm(u.theirs[:30].numpy() - target, axis=1)
        near = np.argsort(distance)[:3]
        weight = 1 / distance[near]
        assert np.allclose(made[i], weight @ u.ours.numpy()[near] / weight.sum(), atol=1e-9)


def test_a_neighbour_at_no_distance_is_taken_whole() -> None:
    u = unknown(k=4)
    u.theirs[40] = u.theirs[5]
    assert np.allclose(values(WAYS["neighbours"](u), u)[0], u.ours[5].numpy(), atol=1e-8)


def test_omp_recovers_a_combination_of_known_tokens() -> None:
    u = unknown(k=12)
    u.theirs[40] = 2 * u.theirs[3] - u.theirs[8]
    made = WAYS["omp"](u)
    assert isinstance(made, Terms) and made.error is not None and made.error < 1e-6
    assert np.allclose(values(made, u)[0], (2 * u.ours[3] - u.ours[8]).numpy(), atol=1e-6)


def test_draws_have_the_models_moments_and_a_seed() -> None:
    g = torch.Generator().manual_seed(0)
    mix = torch.randn((4, 4), generator=g, dtype=torch.float64)
    ours = torch.randn((500, 4), generator=g, dtype=torch.float64) @ mix + 3
    u = Unknown("embed", torch.zeros(0, 0), ours, np.arange(40_000), np.zeros((2, 0), np.int64))
    for way in ("random", "gaussian"):
        made = torch.from_numpy(values(WAYS[way](u), u))
        assert torch.allclose(made.mean(0), ours.mean(0), atol=0.08)
        want = ours.T.cov() if way == "gaussian" else torch.diag(ours.var(0))
        assert torch.allclose(made.T.cov(), want, atol=0.04 * float(want.abs().max()))
        assert np.array_equal(values(WAYS[way](u), u), made.numpy())
    other = Unknown("embed", u.theirs, ours, u.wanted, u.shared, seed=1)
    assert not np.array_equal(values(WAYS["random"](other), u), values(WAYS["random"](u), u))


def test_pieces_and_zero() -> None:
    u = unknown()
    u = Unknown("embed", u.theirs, u.ours, np.arange(3), u.shared, pieces=[[4], [], [1, 2, 2]])
    made = values(WAYS["pieces"](u), u)
    assert np.allclose(made[0], u.ours[4].numpy()) and np.allclose(made[1], 0)
    assert np.allclose(made[2], ((u.ours[1] + 2 * u.ours[2]) / 3).numpy())
    assert np.allclose(values(WAYS["zero"](u), u), 0)
