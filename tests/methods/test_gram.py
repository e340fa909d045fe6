"""The Gram solver where the answer is known: laws, singular systems, layouts. Formulas: gram_cases.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from weft.errors import UsageError
from weft.methods.inverse import Inverse, applied
from weft.methods.least_squares import row_space
from weft.methods.measured import matrices
from weft.methods.registry import METHODS
from weft.methods.step import At

D = torch.float64
FREE = ("wudi", "swudi", "swudi_a", "actmat", "gram", "ace")
"""Methods that need no data."""
EXACT = {"swudi_a": {"keep": "sum"}, "actmat": {}, "gram": {"filter": "exact"}}
"""Settings that solve exactly on all directions there are, where these are few and alike in size."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def inputs(k: int, d: int, n: int | None = None, seed: int = 7) -> Tensor:
    """k Gram matrices of n rows."""
    x = randn(k, n or 3 * d, d, seed=seed)
    return x.mT @ x / x.shape[1]


def low(k: int, m: int, n: int, r: int) -> Tensor:
    return randn(k, m, r) @ randn(k, r, n, seed=1)


def free(name: str, x: Tensor, **params: object) -> Tensor:
    known = {"statistics": {}} if name == "gram" else {}
    return METHODS[name](x, **known, **params)  # type: ignore[arg-type]


def fitted(name: str, x: Tensor, gram: Tensor | None, at: At | None = None, **params: object) -> Tensor:
    return METHODS[name](x, statistics={"gram": gram}, at=at, **params)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# -- least squares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regmean", "lot"])
def test_the_result_is_the_least_of_the_squares(name: str) -> None:
    x, g = randn(3, 6, 10), inputs(3, 10)
    w = [0.5, 1.0, 2.0]
    plain = {"off_diagonal": 1.0} if name == "regmean" else {}
    found = fitted(name, x, g, weight=w, **plain)

    def loss(m: Tensor) -> float:
        return sum(wi * float(((m - t) @ gi * (m - t)).sum()) for wi, t, gi in zip(w, x, g, strict=True))

    for seed in range(20):
        assert loss(found) < loss(found + 1e-3 * randn(6, 10, seed=seed))


def test_same_inputs_give_the_mean_and_disjoint_inputs_every_model_its_own() -> None:
    x = randn(3, 6, 12)
    same = inputs(1, 12).expand(3, 12, 12)
    assert distance(fitted("regmean", x, same), x.mean(0)) < 1e-9
    g = torch.zeros(3, 12, 12, dtype=D)
    for i in range(3):
        g[i, 4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = inputs(1, 4, seed=i)[0]
    own = torch.cat([x[i, :, 4 * i : 4 * i + 4] for i in range(3)], 1)
    for name in ("regmean", "lot"):
        assert distance(fitted(name, x, g), own) < 1e-9


@pytest.mark.parametrize("name", [*FREE, "regmean", "lot"])
def test_a_single_model_is_itself_where_it_has_inputs(name: str) -> None:
    x = randn(1, 30, 12)
    params = {"keep": "mean"} if name in ("wudi", "gram") else {"prior": False} if name == "ace" else {}
    y = free(name, x, **params) if name in FREE else fitted(name, x, inputs(1, 12))
    assert distance(y, x[0]) < 1e-6


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("m, n", [(40, 64), (64, 40), (130, 300)])
def test_identical_experts_give_the_expert(name: str, m: int, n: int) -> None:
    for x in (randn(1, m, 8) @ randn(1, 8, n, seed=3), torch.linalg.qr(randn(1, max(m, n), min(m, n)))[0]):
        one = x if x.shape[1:] == (m, n) else x.mT.contiguous()
        many = one.expand(4, m, n)
        assert distance(free(name, many, **EXACT[name]), one[0]) < 1e-6


@pytest.mark.parametrize("name", [n for n in FREE if n not in ("wudi", "ace")])
def test_opposite_experts_cancel(name: str) -> None:
    x = randn(1, 40, 64)
    assert float(free(name, torch.cat([x, -x])).norm()) < 1e-9 * float(x.norm())


@pytest.mark.parametrize("name", EXACT)
def test_experts_of_independent_rows_are_all_reproduced(name: str) -> None:
    """8 adapters of rank 16 in 256 inputs: each expert's own change on its own rows, exactly."""
    x = low(8, 192, 256, 16)
    params = EXACT[name] if name != "swudi_a" else {"keep": "sum"}
    y = free(name, x, **params)
    errors = [distance(y @ t.mT, t @ t.mT) for t in x]
    # SWUDI-A cuts small directions off, the others solve for all
    assert max(errors) < (0.3 if name == "swudi_a" else 1e-6)
    rows = torch.linalg.qr(torch.cat(list(x)).mT @ randn(8 * 192, 128))[0]
    assert float((y - y @ rows @ rows.T).norm()) < 1e-6 * float(y.norm())


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("rank", [3, None])
def test_untouched_and_weightless_experts_change_nothing(name: str, rank: int | None) -> None:
    x = randn(3, 20, 130) if rank is None else low(3, 20, 130, rank)
    alone = free(name, x)
    for where in (0, 3):
        more = torch.cat([x[:where], torch.zeros_like(x[:1]), x[where:]])
        assert distance(free(name, more), alone) < 1e-9
        other = torch.cat([x[:where], randn(1, 20, 130, seed=9), x[where:]])
        w = [1.0] * 4
        w[where] = 0.0
        assert distance(free(name, other, weight=w), alone) < 1e-9


@pytest.mark.parametrize("name", FREE)
def test_a_matrix_that_no_expert_changed_is_left_alone(name: str) -> None:
    """WUDI's own code gives NaN: 0/0 for every matrix an adapter leaves alone."""
    y = free(name, torch.zeros(3, 5, 7))
    assert torch.equal(y, torch.zeros(5, 7))
    base = randn(5, 7)
    same = METHODS[name](base.expand(2, 5, 7), base=base, **({"statistics": {}} if name == "gram" else {}))
    assert torch.equal(same, base)


@pytest.mark.parametrize("name", [*FREE, "regmean", "lot"])
def test_permuting_outputs_or_turning_inputs_turns_the_result(name: str) -> None:
    if name in ("wudi", "regmean", "lot", "ace"):
        turn = torch.eye(20, dtype=D)[torch.randperm(20, generator=torch.Generator().manual_seed(2))]
    else:
        turn = torch.linalg.qr(randn(20, 20, seed=5))[0]
    x, g, p = randn(3, 12, 20), inputs(3, 20), torch.randperm(12)
    if name in FREE:
        a, b = free(name, x), free(name, (x @ turn)[:, p])
    else:
        a, b = fitted(name, x, g), fitted(name, (x @ turn)[:, p], turn.T @ g @ turn)
    assert distance(b, (a @ turn)[p]) < 1e-8


def test_flow_goes_from_the_start_to_the_exact_solution() -> None:
    x = randn(3, 30, 16)
    exact = free("gram", x, filter="exact", prior=1.0)
    ways = [free("swudi", x, time=t, share=1.0) for t in (1e-6, 1.0, 1e3, 1e9)]
    gaps = [distance(y, exact) for y in ways]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-9
    assert distance(ways[0], x.sum(0)) < 1e-5


def test_early_stopping_is_a_ridge_of_one_over_time_to_first_order() -> None:
    """Both filters agree with λt for small ones and with 1 for large ones."""
    r, c = randn(4, 6), inputs(1, 6)[0]
    flow = applied(r, c.clone(), Inverse("flow", time=1e-7), 6, 6)
    assert distance(flow, 1e-7 * r) < 1e-5
    ridge = applied(r, c.clone(), Inverse("ridge", ridge=1e9), 6, 6)
    assert distance(ridge, r / (1e9 * c.diagonal().mean())) < 1e-5


# -- singular systems -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.9])
def test_a_dead_feature_keeps_the_mean_and_disturbs_nothing(alpha: float) -> None:
    """The published code fails on a singular matrix."""
    x, g = randn(3, 6, 10), inputs(3, 10)
    g[:, 4], g[:, :, 4] = 0.0, 0.0
    y = fitted("regmean", x, g, off_diagonal=alpha)
    live = [i for i in range(10) if i != 4]
    assert distance(y[:, 4], x.mean(0)[:, 4]) < 1e-12
    assert (
        distance(y[:, live], fitted("regmean", x[:, :, live], g[:, live][:, :, live], off_diagonal=alpha))
        < 1e-9
    )
    assert float(fitted("lot", x, g)[:, 4].norm()) == 0


def test_an_empty_gram_matrix_is_no_vote() -> None:
    x, g = randn(3, 6, 10), inputs(3, 10)
    g[1] = 0
    assert distance(fitted("regmean", x, g), fitted("regmean", x[[0, 2]], g[[0, 2]])) < 1e-9
    for name, none in (("regmean", x.mean(0)), ("lot", torch.zeros(6, 10, dtype=D))):
        torch.testing.assert_close(fitted(name, x, torch.zeros_like(g)), none, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(fitted(name, x, None), x.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stored", [torch.float32, D])
def test_fewer_samples_than_inputs_fit_what_was_seen_and_keep_the_rest(stored: torch.dtype) -> None:
    """Rounding to float32 fills the null space with noise, which an inverse would blow up."""
    rows = randn(3, 4, 40, seed=7)
    x, g = randn(3, 6, 40), (rows.mT @ rows / 4).to(stored)
    for name, kept in (("regmean", x.mean(0)), ("lot", torch.zeros(6, 40, dtype=D))):
        plain = {"off_diagonal": 1.0} if name == "regmean" else {}
        y = fitted(name, x, g, **plain)
        for t, seen in zip(x, rows, strict=True):  # 12 rows in 40 inputs: all can be fitted
            assert distance(seen @ y.T, seen @ t.T) < 1e-3
        # what moved lies where inputs were, each in its own unit
        scale = g.double().sum(0).diagonal()
        basis = torch.linalg.qr(torch.cat(list(rows)).mT)[0]
        moved = (y - kept) * scale
        assert float((moved - moved @ basis @ basis.T).norm()) < 1e-2 * float(moved.norm())
        assert float(y.norm()) < 3 * float(x.norm())


def test_features_of_very_different_size_are_all_fitted() -> None:
    """A feature a thousand times larger than the others, as language models have, does not drown them."""
    x, g = randn(3, 6, 20), inputs(3, 20)
    size = torch.ones(20, dtype=D)
    size[3] = 3e3
    scaled = size[:, None] * g * size
    plain = fitted("lot", x * size, g)
    assert distance(fitted("lot", x, scaled.float().double()) * size, plain) < 1e-4


@pytest.mark.parametrize("name", FREE)
def test_more_experts_than_directions(name: str) -> None:
    for shape in ((2, 30), (30, 2), (1, 9), (9, 1)):
        y = free(name, randn(12, *shape))
        assert bool(y.isfinite().all())


def test_negative_weights_and_none_at_all() -> None:
    x = randn(2, 3, 4)
    with pytest.raises(UsageError, match=">= 0"):
        fitted("regmean", x, inputs(2, 4), weight=[1.0, -1.0])
    for name in FREE:
        with pytest.raises(UsageError, match="sum to zero"):
            free(name, x, weight=0.0)


# -- layouts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["regmean", "lot", "gram"])
def test_measured_layouts(name: str) -> None:
    x, g = randn(3, 6, 10), inputs(3, 10)
    plain = fitted(name, x, g)
    turned = fitted(name, x.mT.contiguous(), g, At(transposed=True))
    assert distance(turned.T, plain) < 1e-12
    conv = fitted(name, x.reshape(3, 6, 5, 2, 1), g)
    assert distance(conv.reshape(6, 10), plain) < 1e-12
    blocks = torch.stack([inputs(3, 20, seed=s) for s in (1, 2)], 1)
    experts = randn(3, 2, 8, 20)
    fused = fitted(name, experts, blocks)
    for e in range(2):
        assert distance(fused[e], fitted(name, experts[:, e], blocks[:, e])) < 1e-12
    back = fitted(name, experts.mT.contiguous(), blocks, At(transposed=True))
    assert distance(back.mT, fused) < 1e-12
    rows = fitted(name, experts.reshape(3, 16, 20), blocks)  # groups of outputs, each with inputs of its own
    assert distance(rows.reshape(2, 8, 20), fused) < 1e-12


@pytest.mark.parametrize("name", FREE)
def test_layouts_of_changes(name: str) -> None:
    x = randn(3, 6, 20)
    plain = free(name, x)
    assert distance(free(name, x.reshape(3, 6, 5, 2, 2)).reshape(6, 20), plain) < 1e-12
    experts = randn(3, 2, 8, 20)
    fused = free(name, experts)
    for e in range(2):
        assert distance(fused[e], free(name, experts[:, e])) < 1e-12
    turned = free(name, x.mT.contiguous(), at=At(transposed=True))
    assert distance(turned.T, plain) < 1e-12


def test_vectors_and_what_is_outside_are_averaged() -> None:
    x, w = randn(3, 8), [1.0, 2.0, 1.0]
    mean = (x[0] + 2 * x[1] + x[2]) / 4
    for name in FREE:
        torch.testing.assert_close(free(name, x, weight=w), mean)
        table = randn(3, 8, 5)
        outside = free(name, table, at=At("embed"), outside="mean")
        torch.testing.assert_close(outside, table.mean(0))
        inside = free(name, table, at=At("layers.0.w", layer=0), outside="mean")
        assert torch.equal(inside, free(name, table))


def test_tables_and_scales_by_their_diagonal() -> None:
    table, seen = randn(2, 5, 3), torch.tensor([[0.5, 0.5, 0, 0, 0], [0.25, 0, 0.75, 0, 0]], dtype=D)
    y = fitted("lot", table, seen)
    torch.testing.assert_close(y[0], (2 * table[0, 0] + table[1, 0]) / 3)
    torch.testing.assert_close(y[1], table[0, 1])
    torch.testing.assert_close(y[2], table[1, 2])
    torch.testing.assert_close(y[3:], table.mean(0)[3:])  # never looked up: the mean
    assert torch.equal(fitted("gram", table, seen, diagonal=True), y)
    torch.testing.assert_close(fitted("regmean", table, seen), table.mean(0))
    scale, squares = randn(2, 4), torch.tensor([[1.0, 0, 2, 0], [3.0, 1, 0, 0]], dtype=D)
    want = torch.stack([(scale[0, 0] + 3 * scale[1, 0]) / 4, scale[1, 1], scale[0, 2], scale.mean(0)[3]])
    torch.testing.assert_close(fitted("lot", scale, squares), want)


# -- how it is computed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("k, m, n, r", [(3, 200, 260, 8), (2, 30, 200, 30), (2, 260, 200, 5)])
def test_the_span_of_the_rows_is_enough(
    k: int, m: int, n: int, r: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = low(k, m, n, r)
    basis = row_space(list(x))
    assert basis is not None and basis.shape[1] <= n // 2
    short = {name: free(name, x) for name in FREE}
    monkeypatch.setattr("weft.methods.least_squares.row_space", lambda t: None)
    for name in FREE:
        assert distance(short[name], free(name, x)) < 1e-6
    assert row_space(list(randn(3, 150, 160))) is None


def test_no_eigenvectors_where_all_directions_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    x, g = randn(3, 12, 50), inputs(3, 50)
    by_factor = fitted("regmean", x, g), free("gram", randn(5, 30, 50), ridge=0.5, prior=1.0)
    monkeypatch.setattr("weft.methods.inverse._by_cholesky", lambda *a: None)
    by_vectors = fitted("regmean", x, g), free("gram", randn(5, 30, 50), ridge=0.5, prior=1.0)
    for a, b in zip(by_factor, by_vectors, strict=True):
        assert distance(a, b) < 1e-10


@pytest.mark.parametrize("name", ["swudi", "swudi_a", "actmat", "gram"])
def test_changes_of_any_size(name: str) -> None:
    for size in (1e-25, 1e-9, 1e12):
        x = randn(3, 10, 12) * size
        assert distance(free(name, x) / size, free(name, x / size)) < 1e-9


def test_what_is_kept() -> None:
    """Where inputs were never seen: nothing, the mean, the sum, or TSV-M's merge, times a factor."""
    x, none = randn(3, 6, 10), torch.zeros(3, 10, 10, dtype=D)
    for keep, want in (
        ("zero", 0 * x[0]),
        ("mean", x.mean(0)),
        ("sum", x.sum(0)),
        ("tsv", METHODS["tsv"](x)),
    ):
        y = fitted("gram", x, none, keep=keep, prior=0.0, keep_scale=0.5)
        torch.testing.assert_close(y, 0.5 * want, rtol=1e-9, atol=1e-12)


def test_prior_alone_needs_no_inputs_and_one_view_of_a_matrix_is_shared() -> None:
    x, g = randn(3, 6, 10), inputs(3, 10)
    torch.testing.assert_close(
        fitted("gram", x, g, prior=1.0), free("gram", x, prior=0.3), rtol=1e-9, atol=1e-12
    )
    assert torch.equal(matrices(x), x[:, None])
