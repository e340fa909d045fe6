"""The spectral solver where published codes fail (F4 to F8), at layouts, ranks and edges, and in a save."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import weft
from weft.methods.registry import METHODS
from weft.methods.spectral import spectral
from weft.methods.step import STEPS, At

M = METHODS
D = torch.float64
MERGING = ["tsv", "iso_c", "iso_cts", "dc_merge", "star", "knots", "core_space", "svc", "subspace_boosting"]
MEANS = ["tsv", "dc_merge", "svc"]
"""Methods that give an expert back where all are that expert (at the ranks they keep)."""


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def low_rank(k: int, m: int, n: int, r: int, seed: int = 0) -> Tensor:
    g = rng(seed)
    return torch.randn(k, m, r, generator=g, dtype=D) @ torch.randn(k, r, n, generator=g, dtype=D) / r**0.5


def full(k: int, m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(k, m, n, generator=rng(seed), dtype=D)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def outside(delta: Tensor, tasks: Tensor) -> float:
    """Share of the update's norm that lies in no expert's row space."""
    rows = (
        torch.linalg.qr(torch.cat(list(tasks)).T)[0]
        if len(tasks) * tasks.shape[1] <= tasks.shape[2]
        else None
    )
    if rows is None:
        _, s, vh = torch.linalg.svd(torch.cat(list(tasks)), full_matrices=False)
        rows = vh[s > 1e-9 * s[0]].T
    return float((delta - delta @ rows @ rows.T).norm() / delta.norm())


def published_tsv(x: Tensor) -> Tensor:
    """TSV-M as published, full polar factors and no clipping."""
    r = min(x.shape[1:]) // len(x)
    parts = [torch.linalg.svd(t, full_matrices=False) for t in x]
    u = torch.cat([a[0][:, :r] for a in parts], 1)
    v = torch.cat([a[2][:r] for a in parts])
    s = torch.cat([a[1][:r] for a in parts])
    left, right = (torch.linalg.svd(t, full_matrices=False) for t in (u, v))
    return (left[0] @ left[2] * s) @ (right[0] @ right[2])


# -- F4: T above the rank dropped the update ------------------------------------------------------------------


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("shape", [(2, 30), (30, 2), (1, 9), (9, 1)], ids=str)
def test_more_tasks_than_the_matrix_has_rank(name: str, shape: tuple[int, int]) -> None:
    x = full(5, *shape)
    y = M[name](x)
    assert bool(y.isfinite().all()) and float(y.norm()) > 0.2 * float(x.norm(dim=(1, 2)).mean())


def test_one_row_lies_between_mean_and_sum() -> None:
    """Five rows at right angles: the left directions are one, the right ones five."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=D))[:, None, :]
    torch.testing.assert_close(M["tsv"](x), x.sum(0) / 5**0.5)


# -- F5: an untouched expert changed the result by 62 % --------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in MERGING if n != "star"])  # which averages over all
@pytest.mark.parametrize("made", [low_rank(3, 60, 80, 5), full(3, 60, 80)], ids=["rank 5", "full rank"])
def test_an_untouched_expert_changes_nothing(name: str, made: Tensor) -> None:
    alone = M[name](made)
    with_one = M[name](torch.cat([made[:1], torch.zeros_like(made[:1]), made[1:]]))
    assert distance(with_one, alone) < 1e-9
    weightless = M[name](torch.cat([made, full(1, 60, 80, 9)]), weight=[1.0, 1.0, 1.0, 0.0])
    if name not in ("knots", "core_space", "svc"):  # whose bases see every task vector
        assert distance(weightless, alone) < 1e-9


def test_untouched_experts_differ_by_tensor() -> None:
    """The T of a matrix is its own: an expert that left one matrix alone is no task of it."""
    x = full(4, 12, 40)
    x[3] = 0
    assert distance(M["tsv"](x), published_tsv(x[:3])) < 1e-9


# -- F6: identical experts gave τ plus an arbitrary matrix, opposite ones 1.41 ‖τ‖ ----------------------------


@pytest.mark.parametrize("name", MEANS)
@pytest.mark.parametrize("k", [2, 4])
def test_identical_low_rank_experts_give_the_expert(name: str, k: int) -> None:
    x = low_rank(1, 64, 96, 8)
    assert distance(M[name](x.expand(k, 64, 96)), x[0]) < 1e-9
    if name == "tsv":
        assert distance(published_tsv(x.expand(k, 64, 96)), x[0]) > 0.9


def test_identical_full_rank_experts_give_what_their_ranks_hold() -> None:
    x = full(1, 30, 40)
    u, s, vh = torch.linalg.svd(x[0], full_matrices=False)
    truncated = (u[:, :15] * s[:15]) @ vh[:15]
    for name in ("tsv", "dc_merge"):
        assert distance(M[name](x.expand(2, 30, 40)), truncated) < 1e-9
    assert distance(M["svc"](x.expand(2, 30, 40)), x[0]) < 1e-9
    isotropic = u @ vh * s.mean()
    assert distance(M["iso_c"](x.expand(2, 30, 40)), 2 * isotropic) < 1e-9
    assert distance(M["cart"](x.expand(2, 30, 40)), x[0]) < 1e-12


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("made", [low_rank(1, 60, 80, 5), full(1, 60, 80)], ids=["rank 5", "full rank"])
def test_opposite_experts_cancel(name: str, made: Tensor) -> None:
    assert float(M[name](torch.cat([made, -made])).norm()) < 1e-9 * float(made.norm())
    assert float(M[name](torch.cat([made, -made]).float()).norm()) < 1e-6 * float(made.norm())


def test_a_shared_direction_among_others() -> None:
    """Two experts share one singular pair and have each their own: nothing arbitrary appears."""
    g = rng(3)
    u, v = (torch.linalg.qr(torch.randn(n, 3, generator=g, dtype=D))[0] for n in (40, 50))
    first = 3 * torch.outer(u[:, 0], v[:, 0]) + torch.outer(u[:, 1], v[:, 1])
    second = 3 * torch.outer(u[:, 0], v[:, 0]) + 2 * torch.outer(u[:, 2], v[:, 2])
    expected = first + torch.outer(u[:, 2], v[:, 2]) * 2
    for name in ("tsv", "dc_merge"):
        assert distance(M[name]([first, second]), expected) < 1e-9


# -- F7, F8: adapters' updates landed where nobody trained ----------------------------------------------------


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("k", [4, 8])
def test_low_rank_updates_stay_in_the_experts_row_spaces(name: str, k: int) -> None:
    x = low_rank(k, 256, 256, 16)
    merged = M[name](x)
    if name == "knots":  # trims entries of rows: the left directions are the experts'
        assert outside(merged.T, x.mT) < 1e-8
        return
    assert outside(merged, x) < 1e-8
    if name == "tsv":
        assert outside(published_tsv(x), x) > 0.3


def test_iso_spreads_over_trained_directions_only() -> None:
    x = low_rank(4, 256, 256, 16)
    s = torch.linalg.svdvals(M["iso_c"](x))
    assert int((s > 1e-9 * s[0]).sum()) == 64
    torch.testing.assert_close(s[:64], torch.linalg.svdvals(x.sum(0))[:64].mean().expand(64))


def test_clipping_helps_every_expert() -> None:
    """Spec: error on the experts' own row spaces 0.61 as published, 0.49 clipped."""
    x = low_rank(8, 256, 256, 16)
    errors = []
    for merged in (published_tsv(x), M["tsv"](x)):
        spaces = [torch.linalg.svd(t, full_matrices=False)[2][:16].T for t in x]
        errors.append(sum(float(((merged - t) @ v).norm() / t.norm()) for t, v in zip(x, spaces)) / 8)
    assert errors[1] < errors[0] - 0.05


@pytest.mark.parametrize("name", ["tsv", "tsv_c", "iso_c", "iso_cts", "dc_merge", "cart"])
def test_rank_is_told_from_rounding(name: str) -> None:
    """Adapters folded into 16-bit weights: full rank by their rounding, their own by the noise floor."""
    g = rng(1)
    base = (0.02 * torch.randn(256, 256, generator=g)).bfloat16().double()
    true = low_rank(4, 256, 256, 8, seed=2) * 0.002
    stored = (base + true).bfloat16().double() - base
    params: dict[str, object] = {"task": 1} if name == "tsv_c" else {}
    params |= {"share": 0.25} if name == "cart" else {}
    exact = M[name](true, **params)
    plain, clipped = M[name](stored, **params), M[name](stored, clip="noise", **params)
    if name != "cart":  # around the mean each has the ranks of all
        assert distance(clipped, exact) < (0.35 if name == "iso_cts" else 0.15)
    assert distance(clipped, exact) < 0.8 * distance(plain, exact)
    exactly_stored = (base + true).float().double() - base
    assert distance(M[name](exactly_stored, **params), exact) < 1e-3


# -- layouts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MERGING, "cart"])
def test_kernels_are_flattened_and_fused_experts_are_matrices(name: str) -> None:
    x = full(3, 6, 3 * 2 * 4).reshape(3, 6, 3, 2, 4)
    torch.testing.assert_close(M[name](x), M[name](x.reshape(3, 6, 24)).reshape(6, 3, 2, 4))
    one_d = full(3, 6, 9).reshape(3, 6, 3, 3)
    torch.testing.assert_close(M[name](one_d), M[name](one_d.reshape(3, 6, 9)).reshape(6, 3, 3))
    fused = full(3, 4 * 5, 16).reshape(3, 4, 5, 16)
    torch.testing.assert_close(M[name](fused), torch.stack([M[name](fused[:, e]) for e in range(4)]))


@pytest.mark.parametrize("name", MERGING)
def test_vectors_get_the_mean(name: str) -> None:
    x = full(1, 4, 7)[0].reshape(4, 7)
    if name in ("knots", "core_space"):
        return
    expected = x.sum(0) if name == "svc" else x.mean(0)
    torch.testing.assert_close(M[name](x), expected)
    torch.testing.assert_close(M[name](x, weight=[2.0, 0.0, -1.0, 1.0], scale=0.5),
                               0.5 * (2 * x[0] - x[2] + x[3]) / (1 if name == "svc" else 4))  # fmt: skip


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "star"])
def test_outside_the_blocks(name: str) -> None:
    x = full(3, 6, 20)
    head, block = At(name="head.weight"), At(name="layers.1.w", layer=1, layers=3)
    torch.testing.assert_close(M[name](x, at=head, outside="mean"), x.mean(0))
    for at, params in ((head, {}), (block, {"outside": "mean"})):
        assert torch.equal(M[name](x, at=at, **params), M[name](x))


@pytest.mark.parametrize("name", [*MERGING, "tsv_c"])
def test_transposing_is_no_change_where_the_formula_has_no_side(name: str) -> None:
    x = full(3, 12, 20)
    params = {"task": 0} if name == "tsv_c" else {}
    if name in ("iso_cts", "svc", "knots"):
        return
    torch.testing.assert_close(M[name](x.mT, **params), M[name](x, **params).T)


# -- the settings are the solver's ------------------------------------------------------------------------------


def test_a_pipeline_of_ones_own() -> None:
    """TSV's directions with Iso's spectrum, and a sum by its spectrum."""
    x = full(3, 12, 40)
    s = torch.linalg.svdvals(spectral(x, basis="polar", spectrum="mean"))
    torch.testing.assert_close(s, s[0].expand(12))
    torch.testing.assert_close(spectral(x, factor="sum"), x.sum(0))
    torch.testing.assert_close(spectral(x, share=1.0), x.sum(0))
    torch.testing.assert_close(spectral(x, share=1.0, average=True), x.mean(0))
    assert "spectral" in STEPS


def test_knots_agrees_with_the_adapters_room() -> None:
    from weft.adapters.factors import Factors
    from weft.adapters.spaces import core_space, knots

    g = rng(5)
    factors = [Factors(torch.randn(40, 4, generator=g, dtype=D), torch.randn(4, 60, generator=g, dtype=D), (40, 60))
               for _ in range(3)]  # fmt: skip
    dense = torch.stack([f.delta() for f in factors])
    # trimming depends on the basis' size only through the count of entries: keep all
    ours = M["knots"](dense, density=1.0)
    torch.testing.assert_close(ours, knots(factors, [1.0, 1.0, 1.0], method="ties", density=1.0).delta())
    for name in ("tsv", "iso_c"):  # Core Space loses nothing, and neither do they
        params = {"share": 4 / 40} if name == "tsv" else {}
        in_core = {"share": 4 / 12} if name == "tsv" else {}
        core = core_space(factors, [1.0, 1.0, 1.0], method=name, **in_core).delta()
        assert distance(core, M[name](dense, **params)) < 1e-9


def test_svc_divides_what_is_counted_twice_and_leaves_the_rest() -> None:
    u = torch.eye(6, dtype=D)
    shared, own = torch.outer(u[0], u[0]), torch.outer(u[1], u[1])
    merged = M["svc"]([shared, shared + own], after="task_arithmetic")
    torch.testing.assert_close(merged, shared + own)


def test_boosting_raises_the_tail_only() -> None:
    x = full(3, 12, 40)
    s, boosted = torch.linalg.svdvals(x.sum(0)), torch.linalg.svdvals(M["subspace_boosting"](x, beta=0.5))
    at = int((s.cumsum(0) / s.sum() < 0.5).sum())
    torch.testing.assert_close(boosted, s.clamp_min(float(s[at])))
    torch.testing.assert_close(torch.linalg.svdvals(M["subspace_boosting"](x, beta=0.0)), s[0].expand(12))


def test_tsv_c_gives_adapters_back_whole() -> None:
    x = low_rank(6, 120, 150, 8)
    for t in range(6):
        assert distance(M["tsv_c"](x, task=t), x[t]) < 1e-9


def test_gradients_are_those_of_the_values_at_fixed_directions() -> None:
    """d⟨A, Δ⟩/dτᵢ of TSV-C is the projection of A onto the kept pairs."""
    x = full(2, 8, 10).requires_grad_()
    a = full(1, 8, 10, 4)[0]
    (M["tsv_c"](x, task=0) * a).sum().backward()
    u, _, vh = torch.linalg.svd(x.detach()[0], full_matrices=False)
    pairs = sum(torch.outer(u[:, j], vh[j]) * (u[:, j] @ a @ vh[j]) for j in range(4))
    assert x.grad is not None
    torch.testing.assert_close(x.grad[0], pairs)
    assert not x.grad[1].any()


# -- saved by the engine ------------------------------------------------------------------------------------------


def test_saved_bytes_do_not_depend_on_threads(tmp_path: object) -> None:
    from pathlib import Path

    folder = Path(str(tmp_path))
    base = {
        "layers.0.w": full(1, 200, 260)[0].float(),
        "layers.0.b": torch.zeros(200),
        "head.w": full(1, 9, 200)[0],
    }
    tuned = [{n: (t + 0.1 * torch.randn(t.shape, generator=rng(i), dtype=t.dtype)) for n, t in base.items()}
             for i in range(3)]  # fmt: skip
    for name in ("tsv", "iso_c", "dc_merge"):
        files = []
        for threads in (1, 3):
            merged = weft.merge(tuned, name, base=base)
            weft.save(merged, folder / f"{name}{threads}", threads=threads)
            files.append((folder / f"{name}{threads}" / "model.safetensors").read_bytes())
        assert files[0] == files[1]
        x = torch.stack([t["layers.0.w"].double() - base["layers.0.w"].double() for t in tuned])
        written = weft.load(folder / f"{name}1").tensor("layers.0.w", dtype=D)
        torch.testing.assert_close(written, base["layers.0.w"].double() + M[name](x), rtol=1e-6, atol=1e-6)
