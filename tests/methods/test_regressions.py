"""Defects found in other tools, each a test: M, of MergeKit 0.1.5; F, of FusionBench 0.2.33."""

from __future__ import annotations

import pytest
import torch

import weft
from weft.methods.registry import METHODS
from weft.methods.step import At, row_length

M = METHODS


def deltas(*shape, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    own, common = (torch.randn((n, *shape), generator=g, dtype=torch.float64) for n in (k, 1))
    return own + 0.5 * common


# M2: breadcrumbs lost tensors with fewer than 1/γ entries, and everything at γ = 0


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("n, gamma", [(10, 0.01), (99, 0.01), (500, 0.0), (1, 0.5), (1, 0.01)])
def test_breadcrumbs_keeps_small_tensors(name, n, gamma):
    x = deltas(n, k=1)
    y = M[name](x, density=0.9, gamma=gamma, scale=1.0)
    kept = max(1, int(0.9 * n))
    assert int((y != 0).sum()) == min(kept, n - int(gamma * n))
    assert torch.equal(y[y != 0], x[0][y != 0])


def test_breadcrumbs_drops_outliers_at_full_density():
    x = deltas(1000, k=1)
    y = M["breadcrumbs"](x, density=1.0, gamma=0.01, scale=1.0)
    assert int((y == 0).sum()) == 10
    assert bool((y[x[0].abs().topk(10).indices] == 0).all())
    assert torch.equal(M["breadcrumbs"](x, density=1.0, gamma=0.01, scale=1.0, prefer="density"), x[0])


# M5: on torch files a weight of 0, or one that only some models have, was an IndexError


def test_torch_files_with_parameters_of_some_models_only(tmp_path):
    g = torch.Generator().manual_seed(0)
    states = [{"a.w": torch.randn(4, 3, generator=g), "b": torch.randn(3, generator=g)} for _ in range(3)]
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
    models = [
        {"model": f"{tmp_path}/1.pt", "parameters": {"weight": 0}},
        {"model": f"{tmp_path}/2.pt", "parameters": {"weight": 0.5, "density": 0.5}},
    ]
    recipe = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/0.pt", "models": models}
    merged = weft.build(recipe | {"compat": "mergekit"}).state_dict()
    for name, base in states[0].items():
        torch.testing.assert_close(merged[name], base + 0.5 * (states[2][name] - base))


# M6: multislerp was the normalised mean, slerp a lerp for close models


def test_multislerp_takes_a_step():
    x = deltas(40) * torch.tensor([1.0, 2.0, 3.0]).double()[:, None]
    flat, true = M["multislerp"](x, steps=0), M["multislerp"](x)
    unit = x / x.norm(dim=1, keepdim=True)
    nlerp = unit.mean(0) / unit.mean(0).norm() * x.norm(dim=1).mean()
    torch.testing.assert_close(flat, nlerp)
    assert float((true - flat).norm() / flat.norm()) > 1e-3
    # the barycentre has a smaller sum of squared angles than the mean direction
    spread = [float(torch.arccos(unit @ (m / m.norm())).square().sum()) for m in (flat, true)]
    assert spread[1] < spread[0]


def test_slerp_of_close_models_is_no_lerp():
    a = deltas(4000, k=1)[0]
    b = a + 0.01 * torch.randn(4000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact, lerp = M["slerp"]([a, b]), M["slerp"]([a, b], linear_above=0.9995)
    torch.testing.assert_close(lerp, (a + b) / 2)
    assert 1e-6 < float((exact - lerp).norm() / a.norm()) < 1e-4
    phi = 2 * torch.asin((a / a.norm() - b / b.norm()).norm() / 2)
    torch.testing.assert_close(exact, (a + b) / 2 / torch.cos(phi / 2), rtol=1e-10, atol=0)


def test_nuslerp_rows_are_rows():
    x = deltas(6, 20, k=2)
    y = M["nuslerp"](x, row_wise=True)
    for r in range(6):
        torch.testing.assert_close(y[r], M["nuslerp"](x[:, r]))


# M7: SCE's weights and Model Stock's angle were off for small deltas


@pytest.mark.parametrize("name", ["sce", "model_stock"])
@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12])
def test_small_deltas(name, size):
    x = deltas(8, 20) * torch.tensor([1.0, 2.0, 4.0]).double()[:, None, None]
    torch.testing.assert_close(M[name](x * size) / size, M[name](x), rtol=1e-6, atol=1e-9)


# F (by reading): Model Stock's ratio could be negative or unbounded


def test_model_stock_negative_cosine():
    x = torch.tensor([[1.0, 0.0, 0.1], [-0.6, 0.8, 0.1], [-0.6, -0.8, 0.1]], dtype=torch.float64)
    assert not M["model_stock"](x).any()
    u = x / x.norm(dim=1, keepdim=True)
    cos = (u @ u.T)[[0, 0, 1], [1, 2, 2]].mean()
    t = 3 * cos / (1 + 2 * cos)
    assert t < 0
    torch.testing.assert_close(M["model_stock"](x, clamp=False), t * x.mean(0))
    pole = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    assert bool(M["model_stock"](pole, clamp=False).isfinite().all())


# M10: small tensors crashed TIES and DELLA; DELLA's ε was invalid near the ends; fused experts ranked wrongly


@pytest.mark.parametrize("name", ["ties", "della", "della_linear", "dare_ties", "magnitude"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.1, 0.85, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(), (1,), (5, 1), (3,)], ids=str)
def test_small_tensors_any_density(name, density, shape):
    params = {"epsilon": 0.15} if "della" in name else {}
    y = M[name](deltas(*shape), at=At(name="a"), density=density, **params)
    assert y.shape == shape and bool(y.isfinite().all())
    if density == 0:
        assert not y.any()
    elif name in ("ties", "magnitude"):
        assert bool(y.any())  # one entry at least is kept


def test_della_ranks_fused_experts_within_rows():
    from weft.methods.della import keep_probability

    x = deltas(2, 5, 32, k=1)
    assert row_length((2, 5, 32)) == 32
    fused = M["della_linear"](x, at=At(name="a"), rescale="none", density=0.5, epsilon=0.5)
    flat = M["della_linear"](x.reshape(1, 10, 32), at=At(name="a"), rescale="none", density=0.5, epsilon=0.5)
    assert torch.equal(fused.reshape(10, 32), flat)
    chance = keep_probability(x.reshape(10, 32), 0.5, 0.5)
    assert bool((chance.sort(1).values[0] == chance.sort(1).values).all())


def test_della_has_as_many_ranks_as_entries():
    from weft.methods.della import keep_probability

    x = torch.randperm(4096, generator=torch.Generator().manual_seed(0)).reshape(1, -1) / 4096
    assert keep_probability(x, 0.5, 0.2).unique().numel() == 4096


# M11: weights rounded to bf16


def test_weights_are_not_rounded_to_the_tensors_dtype():
    x = deltas(1000).bfloat16()
    w = [0.5, 0.3, 0.2]
    exact = sum(wi * xi.double() for wi, xi in zip(w, x, strict=True))
    assert torch.equal(M["linear"](x.double(), weight=w).bfloat16(), exact.bfloat16())
    torch.testing.assert_close(M["linear"](x, weight=w), exact.float(), rtol=1e-6, atol=1e-6)


# M20: random masks depended on device, threads, model order


def test_masks_do_not_depend_on_the_global_generator():
    x = deltas(100)
    torch.manual_seed(1)
    a = M["dare"](x, at=At(name="a"))
    torch.manual_seed(2)
    assert torch.equal(a, M["dare"](x, at=At(name="a")))


# F2: TALL masks compared with θ0


def test_tall_mask_compares_with_the_task_vector():
    from weft.methods.masks import tall_mask

    x = torch.tensor([[1.0, 0.1, 0.0], [0.0, 1.0, 1.0]])
    assert tall_mask(x, x.sum(0), 0.4).tolist() == [[True, False, False], [False, True, True]]


# F9: TIES at 100 % crashed


def test_ties_of_everything_is_the_mean_where_signs_agree():
    x = deltas(50).abs()
    torch.testing.assert_close(M["ties"](x, density=1.0), x.mean(0))


# F14: EMR drifted with task switches


def test_emr_does_not_drift():
    x, base = deltas(50), torch.randn(50, dtype=torch.float64)
    first = M["emr"](x + base, base=base, task=1)
    for t in (0, 2, 1, 0):
        M["emr"](x + base, base=base, task=t)
    assert torch.equal(first, M["emr"](x + base, base=base, task=1))


# a constant tensor was lost between thresholds; zeros must not count as kept


def test_one_magnitude_is_kept_whole():
    x = torch.tensor([[0.1, -0.1, 0.1, 0.1]], dtype=torch.float64)
    for name in ("breadcrumbs", "magnitude"):
        assert torch.equal(M[name](x, density=0.5, scale=1.0), x[0])
    assert bool((M["pcb"](x, scale=1.0) == x[0]).all())


def test_sparse_deltas_trim_to_their_support():
    x = torch.zeros(1, 100, dtype=torch.float64)
    x[0, :5] = 1.0
    assert torch.equal(M["ties"](x, density=0.5), x[0])


def test_densities_that_are_whole_but_for_rounding():
    from weft.methods.ties import kept_count

    for percent in range(1, 101):
        assert kept_count(percent / 100, 100) == percent
    assert kept_count(0.0, 10) == 0 and kept_count(0.001, 10) == 1
