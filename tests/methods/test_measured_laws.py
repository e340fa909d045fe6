"""What the methods that take statistics must give where the answer is known."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.errors import UsageError
from weft.methods.aim import relax_salient
from weft.methods.fisher import fisher, fisher_nodes, node_mean
from weft.methods.mats import conjugate_gradients, mats
from weft.methods.step import At
from weft.methods.ubgm import match_gradients, ubgm


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spd(k: int, d: int, seed: int = 0, rank: int | None = None) -> Tensor:
    x = randn(k, rank or 3 * d, d, seed=seed)
    return x.transpose(1, 2) @ x / x.shape[1]


def close(a: Tensor, b: Tensor, tol: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_equal_or_no_information_is_the_mean():
    x = randn(3, 4, 5)
    for f in (torch.ones(3, 4, 5).double(), torch.zeros(3, 4, 5).double()):
        close(fisher(x, statistics={"fisher": f, "base_fisher": None}), x.mean(0))
        close(fisher_nodes(x, statistics={"node": f[:, :, 0]}), x.mean(0))
    close(fisher(x, statistics={"fisher": None, "base_fisher": None}, weight=[1.0, 1.0, 2.0]),
          (x[0] + x[1] + 2 * x[2]) / 4)  # fmt: skip


def test_entries_that_matter_to_one_model_are_its_own():
    x, owner = randn(3, 4, 5), torch.arange(20).reshape(4, 5) % 3
    f = torch.stack([(owner == i).double() for i in range(3)])
    got = fisher(x, statistics={"fisher": f, "base_fisher": None}, floor=0.0)
    close(got, x.gather(0, owner[None])[0])
    half = fisher(x, statistics={"fisher": f, "base_fisher": None}, floor=0.0, base=x[0], prior=1.0)
    close(half, got)  # no information of the base and no floor: it does not pull


def test_scale_of_a_models_information_does_not_matter():
    x, f = randn(2, 4, 5), randn(2, 4, 5, seed=1).square()
    louder = f * torch.tensor([1.0, 1e6]).double()[:, None, None]
    a, b = (fisher(x, statistics={"fisher": v, "base_fisher": None}) for v in (f, louder))
    close(a, b)
    raw = fisher(x, statistics={"fisher": louder, "base_fisher": None}, normalize="none")
    assert float((raw - x[1]).abs().max()) < 0.1 * float((a - x[1]).abs().max())


def test_units_are_columns_of_what_is_stored_the_other_way():
    x, node = randn(2, 6, 4), randn(2, 3, seed=1).square()
    straight = node_mean(x, statistics={"node": node})
    turned = node_mean(x.transpose(1, 2), statistics={"node": node}, at=At(transposed=True))
    close(turned, straight.T)


@settings(max_examples=30, deadline=None)
@given(out=st.integers(1, 6), d=st.integers(1, 8), seed=st.integers(0, 999))
def test_conjugate_gradients_solve(out, d, seed):
    a, b, rhs = spd(1, d, seed)[0], spd(1, out, seed + 1)[0], randn(out, d, seed=seed + 2)
    a, b = a + 0.1 * torch.eye(d).double(), b + 0.1 * torch.eye(out).double()
    found = conjugate_gradients(lambda x: b @ x @ a, rhs, torch.zeros_like(rhs), 40 * out * d, 1e-14)
    want = torch.linalg.solve(torch.kron(b, a), rhs.reshape(-1)).reshape(out, d)
    close(found, want, 1e-6)


def kfac(k: int, out: int, d: int, **how: int) -> dict[str, Tensor | None]:
    return {"kfac_a": spd(k, d, 1, **how), "kfac_g": spd(k, out, 2), "gram": spd(k, d, 1, **how)}


def test_matching_one_model_or_equal_curvature():
    x, known = randn(3, 4, 6), kfac(1, 4, 6)
    close(mats(x[:1], statistics=known, scale=1.0), x[0])
    close(mats(x[:1], statistics=known), x[0], 1e-6)
    same = {n: v.expand(3, *v.shape[1:]) for n, v in known.items()}
    for curvature in ("kfac", "gram"):
        close(mats(x, statistics=same, curvature=curvature), x.mean(0), 1e-6)


def test_matching_inputs_is_regression_on_them():
    """argmin Σ ‖X_i (W − W_i)ᵀ‖², by least squares over the stacked inputs."""
    w, inputs = randn(3, 4, 6), [randn(30, 6, seed=i) for i in range(3)]
    grams = torch.stack([x.T @ x / 30 for x in inputs])
    y = torch.cat([x @ wi.T for x, wi in zip(inputs, w, strict=True)])
    want = torch.linalg.lstsq(torch.cat(inputs), y).solution.T
    close(mats(w, statistics={"gram": grams, "kfac_a": None, "kfac_g": None}, curvature="gram"), want, 1e-7)


def test_orthogonal_inputs_recover_every_model():
    q = torch.linalg.qr(randn(6, 6))[0]
    parts = [q[:, :2], q[:, 2:4], q[:, 4:]]
    grams = torch.stack([p @ p.T for p in parts])
    w = randn(3, 4, 6)
    got = mats(w, statistics={"gram": grams, "kfac_a": None, "kfac_g": None}, curvature="gram")
    for wi, p in zip(w, parts, strict=True):
        close(got @ p, wi @ p, 1e-7)


def test_directions_nobody_uses_keep_what_they_began_with():
    """Dead inputs make the system singular: finite, and task arithmetic there."""
    w, known = randn(2, 4, 6), kfac(2, 4, 6)
    for name in ("kfac_a", "gram"):
        known[name][:, :, 3] = known[name][:, 3, :] = 0
    for curvature in ("kfac", "gram"):
        got = mats(w, statistics=known, curvature=curvature, scale=0.3, iterations=300)
        assert bool(got.isfinite().all())
        close(got[:, 3], 0.3 * w.sum(0)[:, 3])
    nothing = {n: torch.zeros_like(v) for n, v in known.items()}
    close(mats(w, statistics=nothing), w.mean(0))


def test_early_stopping_stays_nearer_to_the_start():
    w, known = randn(3, 6, 8), kfac(3, 6, 8)
    start = 0.3 * w.sum(0)
    far = [float((mats(w, statistics=known, iterations=n) - start).norm()) for n in (0, 1, 3, 10)]
    assert far[0] == 0 and far == sorted(far)


def test_blocks_are_solved_each_by_itself():
    x, known = randn(2, 6, 5), kfac(2, 3, 5)
    other = kfac(2, 3, 5)
    both = {n: torch.stack([known[n], 2 * other[n] + torch.eye(other[n].shape[-1]).double()], 1)
            for n in ("kfac_a", "kfac_g")} | {"gram": None}  # fmt: skip
    got = mats(x, statistics=both)
    for i in range(2):
        alone = {n: v[:, i] for n, v in both.items() if v is not None} | {"gram": None}
        close(got[3 * i : 3 * i + 3], mats(x[:, 3 * i : 3 * i + 3], statistics=alone), 1e-6)


def test_gradient_matching_has_its_limits():
    """Equal curvature without a prior: the mean. A prior that outweighs it, or none measured: the sum."""
    x = randn(3, 4, 5)
    one = {"fisher_samples": torch.full((3,), 100.0), "base_fisher": None, "base_fisher_samples": None}
    flat = {**one, "fisher": torch.full((3, 4, 5), 7.0).double()}
    close(ubgm(x, statistics=flat), x.mean(0))
    close(ubgm(x, statistics=flat, delta=1e12), x.sum(0), 1e-6)
    close(ubgm(x, statistics={**one, "fisher": None}), x.sum(0))
    nothing = {**one, "fisher": torch.zeros(3, 4, 5).double()}
    close(ubgm(x, statistics=nothing), x.sum(0))
    strong = {**flat, "base_fisher": torch.full((4, 5), 1e9).double(),
              "base_fisher_samples": torch.tensor([1.0])}  # fmt: skip
    close(ubgm(x, statistics=strong), x.sum(0), 1e-4)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 999), scale=st.floats(1e-6, 1e6))
def test_gains_are_bounded(seed, scale):
    """No entry grows beyond 1 + |α| of its change, whatever is removed."""
    x, f = torch.ones(1, 40).double(), randn(1, 40, seed=seed).square() * scale
    known = {"fisher": f, "fisher_samples": torch.ones(1), "base_fisher": randn(40, seed=seed + 1).square(),
             "base_fisher_samples": torch.ones(1)}  # fmt: skip
    for alpha in (-1.0, -0.3, 0.5, 2.0):
        got = ubgm(x, statistics=known, weight=alpha)
        assert bool((got.abs() <= 1 + abs(alpha)).all()) and bool((got * alpha >= 0).all())


def test_gradient_matching_must_know_sizes():
    x = randn(2, 3, 4)
    known = {"fisher": x.square(), "fisher_samples": None, "base_fisher": None, "base_fisher_samples": None}
    with pytest.raises(UsageError, match="the statistics do not tell, so give size"):
        match_gradients(x, statistics=known)
    close(match_gradients(x, statistics=known, size=[2.0, 3.0]),
          match_gradients(x, statistics={**known, "fisher_samples": torch.tensor([2.0, 3.0])}))  # fmt: skip


def test_relaxation_of_every_layout():
    x, s = randn(6, 4), torch.tensor([0.0, 1.0, 2.0, 4.0]).double()
    want = x * (1 - s / 4 * 0.6)
    close(relax_salient(x[None], statistics={"base_abs_mean": s})[0], want)
    close(relax_salient(x.T[None], statistics={"base_abs_mean": s}, at=At(transposed=True))[0], want.T)
    groups = torch.stack([s, s.flip(0)])
    got = relax_salient(x[None], statistics={"base_abs_mean": groups}, omega=0.0)[0]
    close(got, torch.cat([x[:3] * (1 - s / 4), x[3:] * (1 - s.flip(0) / 4)]))
    assert not got[:3, 3].any() and not got[3:, 0].any()  # the largest channel keeps the base
    close(relax_salient(x[None], statistics={"base_abs_mean": s}, omega=1.0)[0], x)
    close(relax_salient(x[None], statistics={"base_abs_mean": None})[0], x)
    close(relax_salient(x[None], statistics={"base_abs_mean": 0 * s})[0], x)
