"""Streamed in ranges of any size == the whole tensor, bit for bit, for every statistic and method."""

from __future__ import annotations

import pytest
import torch
from hand_engine import run_model
from test_laws import NEEDS, stack_for

from weft.methods import stats
from weft.methods.registry import METHODS
from weft.methods.stats import Chain, Gram, Select, Sums, fold, gram_of, tile_sums
from weft.methods.step import At

TILE = 128


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(stats, "TILE", TILE)


SHAPES = {"a.0.w": (33, 20), "a.1.w": (3, 5, 17), "a.2.bias": (45,), "n": (), "one": (1,), "none": (0, 4)}


def model(k, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(k, *s, generator=g).double() for n, s in SHAPES.items()}


def stream(stat, x, params, at, tiles):
    memo, flat = None, x.reshape(x.shape[0], -1)
    for _ in range(stat.rounds()):
        parts = [
            stat.partial(flat[:, a : a + TILE * tiles].clone(), memo, params, At(at.name, at.shape, a))
            for a in range(0, max(flat.shape[1], 1), TILE * tiles)
        ]
        memo = stat.combine(stat.join(parts), memo, params, flat.shape[1])
    return {n: torch.as_tensor(v) for n, v in stat.result(memo, params).items()}


STATS = {
    "gram": Gram(),
    "sums": Sums("s", lambda x, p, at: torch.cat([x.abs(), x**2])),
    "positions": Sums("s", lambda x, p, at: x * (torch.arange(x.shape[1]) + at.start)),
    "select": Select("t", lambda p, k, n: [[0, 1, n // 3, n, n + 1]] * k),
    "select of": Select("t", lambda p, k, n: [[1, n]], value=lambda x, p, at: x.sum(0, keepdim=True)),
    "chain": Chain(
        Select("t", lambda p, k, n: [[n // 2]] * k),
        Sums("above", lambda x, p, at: (x.abs() >= p["t"]).double()),
        Select("u", lambda p, k, n: [[int(p["above"][0])]] * k),
    ),
}


@pytest.mark.parametrize("n", [0, 1, 127, 128, 129, 1000])
@pytest.mark.parametrize("stat", STATS.values(), ids=STATS)
def test_statistics_do_not_depend_on_cuts(stat, n):
    x = torch.randn(3, n, dtype=torch.float64).float().double()
    at = At("a", (n,))
    whole = stat.of(x, {}, at)
    for tiles in (1, 3, 100):
        streamed = stream(stat, x, {}, at, tiles)
        assert streamed.keys() == whole.keys() == set(stat.provides)
        for name, value in whole.items():
            assert torch.equal(streamed[name].double(), value.double()), name


def test_sums_are_sums():
    x = torch.randn(3, 1000, dtype=torch.float64)
    torch.testing.assert_close(fold(x), x.sum(-1))
    torch.testing.assert_close(tile_sums(x).sum(0), x.sum(-1))
    torch.testing.assert_close(gram_of(x), x @ x.T)
    torch.testing.assert_close(Gram().of(x, {}, At())["gram"], x @ x.T)
    assert fold(torch.zeros(2, 0)).tolist() == [0, 0]


def test_select_finds_the_entries_of_a_sort():
    x = torch.randn(2, 777)
    ranks = [1, 2, 400, 777]
    got = stream(Select("t", lambda p, k, n: [ranks] * k), x, {}, At("a", (777,)), 3)["t"]
    ordered = x.abs().sort(-1, descending=True).values.double()
    assert torch.equal(got, ordered[:, [r - 1 for r in ranks]])


@pytest.mark.parametrize("name", METHODS)
def test_methods_do_not_depend_on_cuts(name):
    m = METHODS[name]
    k = len(stack_for(m))
    stacks = model(k)
    variants = [{}] + [{p: True} for p in ("row_wise",) if p in m.params]
    variants += [{"rescale": "l1"}] if "rescale" in m.params else []
    variants += [{"of": "ties"}] if "of" in m.params else []
    variants += [{"task": 0}] if name == "emr" else []
    for params in variants:
        pipeline = m.pipeline(**NEEDS.get(name, {}), **params)
        whole = run_model(pipeline, stacks, 1000, seed=3)
        for tiles in (1, 2):
            for n, y in run_model(pipeline, stacks, tiles, seed=3).items():
                assert torch.equal(y, whole[n]), (n, params, tiles)
        if all(b.scope == "tensor" for b in pipeline.steps):
            for n, x in stacks.items():
                none = {need.source: None for need in pipeline.needs}
                torch.testing.assert_close(pipeline(x, at=At(name=n, seed=3), statistics=none), whole[n])


SCOPED: dict[str, dict[str, object]] = {
    "ties": {}, "magnitude": {}, "breadcrumbs": {}, "breadcrumbs_ties": {}, "model_stock": {}, "pcb": {},
    "consensus": {"of": "ties"}, "emr": {"task": 1}, "ram_plus": {"epsilon": 0.5, "alpha": 100.0},
}  # fmt: skip


def test_scope_is_tested_everywhere():
    assert {n for n in METHODS if "scope" in METHODS[n].params} == set(SCOPED)


@pytest.mark.parametrize("name", SCOPED)
def test_scope(name):
    """With one scope the tensors share a statistic; with the other each has its own."""
    stacks = {n: x * (1 + i) + i for i, (n, x) in enumerate(model(3).items())}
    results = {}
    for scope in ("tensor", "model"):
        pipeline = METHODS[name].pipeline(scope=scope, **SCOPED[name])
        results[scope] = run_model(pipeline, stacks, 2)
    assert any(not torch.equal(results["tensor"][n], results["model"][n]) for n in stacks)
    if name == "model_stock":  # the whole model's angle, by its definition
        x = torch.cat([s.reshape(3, -1) for s in stacks.values()], 1)
        whole = METHODS[name](x)
        flat = torch.cat([y.reshape(-1) for y in results["model"].values()])
        torch.testing.assert_close(flat, whole)


def test_trim_over_the_model_keeps_the_models_largest():
    stacks = model(2)
    from weft.methods.ties import trim

    got = run_model(trim(density=0.1, scope="model"), stacks, 2)
    every = torch.cat([x.reshape(2, -1) for x in stacks.values()], 1)
    kept = torch.cat([x.reshape(2, -1) for x in got.values()], 1)
    n = every.shape[1]
    for row, out in zip(every, kept, strict=True):
        cut = row.abs().sort(descending=True).values[int(0.1 * n) - 1]
        assert torch.equal(out, torch.where(row.abs() >= cut, row, 0.0))


def test_emr_rescaler_is_a_ratio_of_sums_of_means():
    from weft.methods.masks import emr_masks, emr_rescalers, unify

    stacks = {n: x for n, x in model(3).items() if x.numel()}
    own = kept = 0.0
    for x in stacks.values():
        u = unify(x)
        own += x[1].abs().mean()
        kept += (u * emr_masks(x, u)[1]).abs().mean()
    torch.testing.assert_close(emr_rescalers(stacks.values())[1], own / kept)
    got = run_model(METHODS["emr"].pipeline(task=1), stacks, 2)
    for n, x in stacks.items():
        u = unify(x)
        torch.testing.assert_close(got[n], own / kept * u * emr_masks(x, u)[1])
