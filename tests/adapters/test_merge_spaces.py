"""KnOTS, Core Space, products, LoRA-LEGO and RobustMerge against dense references written from the papers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from merging_models import random_factors, write
from torch import Tensor

import weft
from weft.adapters import products
from weft.adapters.factors import Factors
from weft.adapters.lego import lego
from weft.adapters.lowrank import difference
from weft.adapters.merge import merge_adapters
from weft.adapters.peft_ways import factorwise
from weft.adapters.robust import robustmerge
from weft.adapters.spaces import core_basis, core_space, knots, knots_basis

SHAPES = {"layers.0.q.weight": (30, 24), "layers.0.k.weight": (12, 24), "layers.1.q.weight": (30, 24)}


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters of ranks 3, 3 and 4."""
    return [write(tmp_path / f"a{i}", random_factors(SHAPES, r, i)) for i, r in enumerate((3, 3, 4))]


def factors_of(paths: list[Path], name: str) -> list[Factors]:
    from weft.adapters.factors import as_adapter

    return [as_adapter(p).factors(name) for p in paths]


def global_ties(tasks: list[dict[str, Tensor]], density: float) -> dict[str, Tensor]:
    """TIES over all coordinates of a model at once, by the formula."""
    flat = torch.stack([torch.cat([t.flatten() for t in task.values()]) for task in tasks])
    kept = torch.zeros_like(flat)
    for i, row in enumerate(flat):
        top = row.abs().topk(int(density * len(row))).indices
        kept[i, top] = row[top]
    elected = kept.sum(0).sign()
    agree = (kept.sign() == elected) & (elected != 0)
    merged = (kept * agree).sum(0) / agree.sum(0).clamp_min(1)
    sizes = [t.numel() for t in tasks[0].values()]
    return {n: part.reshape(tasks[0][n].shape) for n, part in zip(tasks[0], merged.split(sizes), strict=True)}


def test_knots_is_ties_over_the_whole_model_in_the_shared_basis(three: list[Path]) -> None:
    bases: dict[str, Tensor] = {}
    tasks: list[dict[str, Tensor]] = [{} for _ in three]
    for name, (_, into) in SHAPES.items():
        deltas = [f.delta() for f in factors_of(three, name)]
        u, s, vh = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        keep = s > 1e-5
        bases[name] = u[:, keep]
        for i, part in enumerate((s[:, None] * vh)[keep].split(into, 1)):
            tasks[i][name] = part
    merged = global_ties(tasks, 0.3)
    made = merge_adapters(three, how="knots", density=0.3)
    for name in SHAPES:
        expected = bases[name] @ merged[name]
        torch.testing.assert_close(made.factors(name).delta(), expected, atol=1e-9, rtol=1e-9)
    # one weight by itself is another thing: its masks see that weight only
    alone = knots(factors_of(three, "layers.0.k.weight"), [1 / 3] * 3, density=0.3, scope="tensor")
    assert difference(alone, made.factors("layers.0.k.weight")) > 0.01


def test_core_space_is_the_method_on_the_cores(three: list[Path]) -> None:
    tasks: list[dict[str, Tensor]] = [{} for _ in three]
    sides = {}
    for name in SHAPES:
        found = factors_of(three, name)
        u = torch.linalg.svd(torch.cat([f.b for f in found], 1), full_matrices=False).U
        v = torch.linalg.svd(torch.cat([f.a for f in found]), full_matrices=False).Vh.T
        sides[name] = u, v
        for task, f in zip(tasks, found, strict=True):
            task[name] = u.T @ f.delta() @ v
    merged = global_ties(tasks, 0.5)
    made = merge_adapters(three, how="core_space", density=0.5)
    for name, (u, v) in sides.items():
        expected = u @ merged[name] @ v.T
        torch.testing.assert_close(made.factors(name).delta(), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("how", ["knots", "core_space"])
def test_a_linear_method_in_a_lossless_basis_is_the_exact_sum(three: list[Path], how: str) -> None:
    weights = [0.5, -1.0, 0.25]
    made = merge_adapters(three, weights, how=how, method="task_arithmetic")
    exact = merge_adapters(three, weights, how="concat")
    for name in SHAPES:
        assert difference(made.factors(name), exact.factors(name)) < 1e-12
    short = merge_adapters(three, weights, how=how, method="task_arithmetic", rank=2)
    best = merge_adapters(three, weights, how="svd", rank=2)
    for name in SHAPES:
        assert difference(short.factors(name), best.factors(name)) < 1e-9
        assert short.report[name]["error"] == pytest.approx(best.report[name]["error"], rel=1e-6)


def test_bases_hold_every_update_whole(three: list[Path]) -> None:
    found = factors_of(three, "layers.0.k.weight")
    for basis in (knots_basis, core_basis):
        made = basis(found)
        for f, c in zip(found, made.values, strict=True):
            torch.testing.assert_close(made.lift(c).delta(), f.delta(), atol=1e-10, rtol=1e-10)
    made = core_space(found, [1.0, 1.0, 1.0], method="task_arithmetic")
    torch.testing.assert_close(made.delta(), sum(f.delta() for f in found))


@pytest.mark.parametrize(
    ("how", "params"),
    [
        ("ties", {"density": 0.3}),
        ("dare_ties", {"density": 0.4}),
        ("breadcrumbs", {}),
        ("della", {"density": 0.5}),
    ],
)
def test_a_method_on_products_is_that_method_on_dense_updates(
    three: list[Path], how: str, params: dict[str, Any]
) -> None:
    """At full rank, masks included: a merge of adapted models and a merge of adapters are one thing."""
    base = {n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()}
    models = [{n: factors_of([p], n)[0].delta() for n in SHAPES} for p in three]
    dense = weft.merge(models, how, base=base, seed=4, weight=[1.0, 0.5, 1.0], **params)
    made = merge_adapters(three, [1.0, 0.5, 1.0], how=how, seed=4, rank=24, **params)
    for name in SHAPES:
        torch.testing.assert_close(
            made.factors(name).delta(), dense.tensor(name).double(), atol=1e-6, rtol=1e-6
        )
        assert made.report[name]["error"] < 1e-6
    low = merge_adapters(three, [1.0, 0.5, 1.0], how=how, seed=4, rank=5, **params)
    for name in SHAPES:
        whole = dense.tensor(name).double()
        s = torch.linalg.svdvals(whole)
        lost = (whole - low.factors(name).delta()).norm() / whole.norm()
        assert low.report[name]["error"] == pytest.approx(float(s[5:].norm() / s.norm()), rel=1e-6)
        assert low.report[name]["error"] == pytest.approx(float(lost), rel=1e-6)


def test_transposed_updates_are_merged_as_the_base_stores_them(tmp_path: Path) -> None:
    shape = {"h.c_attn.weight": (18, 10)}
    paths = [write(tmp_path / str(i), random_factors(shape, 3, i), fan_in_fan_out=True) for i in range(2)]
    base = {"h.c_attn.weight": torch.zeros(10, 18, dtype=torch.float64)}
    models = [{n: factors_of([p], n)[0].delta() for n in shape} for p in paths]
    dense = weft.merge(models, "dare", base=base, seed=1, density=0.5)
    made = merge_adapters(paths, [1.0, 1.0], how="dare", seed=1, density=0.5, rank=10)
    weft.save(made, tmp_path / "out")
    from weft.adapters.factors import as_adapter

    for found in (made.factors("h.c_attn.weight"), as_adapter(tmp_path / "out").factors("h.c_attn.weight")):
        torch.testing.assert_close(
            found.delta(), dense.tensor("h.c_attn.weight").double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_beyond_the_gram_matrix_a_sketch_does_nearly_as_well(
    three: list[Path], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = merge_adapters(three, how=how, density=0.8, rank=6)
    best = {n: exact.factors(n) for n in SHAPES}
    monkeypatch.setattr(products, "GRAM", 4)
    made = merge_adapters(three, how=how, density=0.8, rank=6)
    full = merge_adapters(three, how=how, density=0.8, rank=24)
    for name in SHAPES:
        whole, found = full.factors(name).delta(), made.factors(name).delta()
        told = made.report[name]["error"]
        assert told == pytest.approx(float((whole - found).norm() / whole.norm()), rel=1e-6), "it is measured"
        assert 0.999999 < told / exact.report[name]["error"] < 1.01
        assert difference(made.factors(name), best[name]) < 0.2
    enough = merge_adapters(three, how=how, density=0.8, energy=0.7)
    for name in SHAPES:
        assert enough.factors(name).rank < 12 and 1 - enough.report[name]["error"] ** 2 >= 0.7


# -- LoRA-LEGO ------------------------------------------------------------------------------------


def random_update(rank: int, seed: int) -> Factors:
    b, a = random_factors({"w": (10, 14)}, rank, seed)["w"]
    return Factors(b.double(), a.double(), (10, 14))


def test_lego_of_equal_adapters_is_that_adapter() -> None:
    f = random_update(4, 0)
    turned = Factors(f.b[:, [2, 0, 3, 1]], f.a[[2, 0, 3, 1]], f.shape)
    made = lego([f, turned, f], [1 / 3] * 3)
    assert made.rank == 4 and difference(made, f) < 1e-12


def test_lego_does_not_depend_on_the_order_of_ranks_or_adapters() -> None:
    # well separated clusters: the k-means optimum is plain
    centres = torch.randn(3, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    g = torch.Generator().manual_seed(1)

    def noisy(order: list[int]) -> Factors:
        units = centres[order] + 0.1 * torch.randn(len(order), 24, generator=g, dtype=torch.float64)
        return Factors(units[:, 14:].T.contiguous(), units[:, :14].contiguous(), (10, 14))

    a, b = noisy([0, 1, 2]), noisy([2, 2, 0, 1])
    made = lego([a, b], [0.5, 0.5], rank=3)
    again = lego([Factors(b.b.flip(1), b.a.flip(0), b.shape), a], [0.5, 0.5], rank=3)
    assert difference(made, again) < 1e-12
    # by hand: centroids, lengthened to their members' mean norm, and √(3.5/3) for the variance
    units = torch.cat([torch.cat([f.a, f.b.T], 1) for f in (a, b)])
    label = torch.cdist(units, centres).argmin(1)
    total = torch.zeros(10, 14, dtype=torch.float64)
    for c in range(3):
        mine = units[label == c]
        centroid = mine.mean(0) * mine.norm(dim=1).mean() / mine.mean(0).norm()
        total += torch.outer(centroid[14:], centroid[:14])
    torch.testing.assert_close(made.delta(), (3.5 / 3) ** 0.5 * total)
    plain = lego([a, b], [0.5, 0.5], rank=3, reweight=False)
    assert difference(plain, made) > 0.01


def test_lego_keeps_to_the_rank_and_is_the_same_for_the_same_seed() -> None:
    updates = [random_update(r, r) for r in (2, 4, 6)]
    made = lego(updates, [1 / 3] * 3, seed=1, name="w")
    assert made.rank == 4
    again = lego(updates, [1 / 3] * 3, seed=1, name="w")
    assert torch.equal(again.a, made.a) and torch.equal(again.b, made.b)
    assert lego(updates, [1 / 3] * 3, rank=12).rank == 12
    assert difference(lego(updates, [1 / 3] * 3, rank=12, reweight=False),
                      Factors(torch.cat([f.b for f in updates], 1), torch.cat([f.a for f in updates]),
                              (10, 14))) < 1e-12  # fmt: skip


# -- RobustMerge, LoraHub ---------------------------------------------------------------------------


def test_robustmerge_by_its_formula() -> None:
    updates = [random_update(3, seed) for seed in range(3)]
    kept_a, kept_b, s = [], [], []
    for f in updates:
        a, b = f.a.clone(), f.b.clone()
        for t in (a, b):
            cut = t.abs().flatten().sort(descending=True).values[int(0.4 * t.numel()) - 1]
            t[t.abs() < cut] = 0
        kept_a.append(a)
        kept_b.append(b)
        s.append((f.a.abs().sum(1) / a.abs().sum(1)).clamp_max(10))
    share = [v / torch.stack(s).sum(0) for v in s]
    a = 2 * torch.stack(kept_a).sum(0)
    b = 2 * torch.stack([k * v for k, v in zip(kept_b, share, strict=True)]).sum(0)
    made = robustmerge(updates, [1.0] * 3, density=0.4)
    torch.testing.assert_close(made.delta(), b @ a)
    same = robustmerge([updates[0]] * 4, [1.0] * 4, density=1.0, scale=1.0)
    torch.testing.assert_close(same.delta(), 4 * updates[0].delta())


def test_factorwise_is_quadratic_in_the_weights_and_holds_cross_terms() -> None:
    f, g = random_update(3, 0), random_update(3, 1)
    made = factorwise([f, g], [0.5, 2.0]).delta()
    expected = (0.5 * f.b + 2.0 * g.b) @ (0.5 * f.a + 2.0 * g.a)
    torch.testing.assert_close(made, expected)
