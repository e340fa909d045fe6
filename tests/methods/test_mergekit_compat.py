"""compat["mergekit"] reproduces MergeKit 0.1.5's documented choices: own re-implementations of them.

The same comparison was run once against mergekit-pytorch 0.1.5 itself: all of these agree to float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_reference import elected_by_sum

from weft.methods.registry import METHODS
from weft.methods.step import At

rng = np.random.default_rng(3)
BASE = rng.normal(size=(24, 40))
D = rng.normal(size=(3, 24, 40)) + 0.5 * rng.normal(size=(24, 40))
D = D.astype(np.float32).astype(np.float64)
SPARSE = np.where(rng.random(D.shape) < 0.5, D, 0)
W = np.array([1.0, 0.5, 0.25])


def weft(name, x=D, **params):
    m = METHODS[name]
    return m(torch.from_numpy(x), at=At(name="a"), **{**m.compat.get("mergekit", {}), **params}).numpy()


def plus_election(x, w, normalize):
    wx = w[:, None, None] * x
    keep = np.where(wx.sum(0) >= 0, 1, -1) == np.sign(wx)
    mass = (w[:, None, None] * keep).sum(0)
    return (wx * keep).sum(0) / (np.where(mass > 0, mass, 1) if normalize else 1)


def keep_largest(t, count):
    cut = np.sort(np.abs(t).ravel())[-count]
    return np.where(np.abs(t) >= cut, t, 0)


def test_ties():
    trimmed = np.array([keep_largest(t, int(0.3 * t.size)) for t in D])
    np.testing.assert_allclose(weft("ties", weight=list(W), density=0.3), plus_election(trimmed, W, True))
    np.testing.assert_allclose(weft("ties", weight=list(W)), plus_election(D, W, True))  # its density is 1


@pytest.mark.parametrize("p, g", [(0.5, 0.01), (0.9, 0.05), (1.0, 0.01), (0.98, 0.1), (0.995, 0.01)])
def test_breadcrumbs(p, g):
    def one(t):
        order = np.argsort(-np.abs(t).ravel())
        start = min(int(g * t.size), t.size - int(p * t.size))
        out = np.zeros(t.size)
        out[order[start : start + int(p * t.size)]] = t.ravel()[order[start : start + int(p * t.size)]]
        return out.reshape(t.shape)

    cut = np.array([one(t) for t in D])
    got = weft("breadcrumbs", weight=list(W), density=p, gamma=g)
    np.testing.assert_allclose(got, np.tensordot(W, cut, 1), atol=1e-12)
    got = weft("breadcrumbs_ties", weight=list(W), density=p, gamma=g)
    np.testing.assert_allclose(got, plus_election(cut, W, False), atol=1e-12)


@pytest.mark.parametrize("name", ["dare", "della_linear"])
def test_l1_norm_is_restored(name):
    got = weft(name, D[:1], density=0.4)
    assert np.isclose(np.abs(got).sum(), np.abs(D[0]).sum())
    factors = got[got != 0] / D[0][got != 0]
    assert np.allclose(factors, factors[0]) and abs((got != 0).mean() - 0.4) < 0.06


@pytest.mark.parametrize("name", ["dare", "dare_ties", "della", "della_linear"])
def test_full_density_drops_nothing(name):
    expected = {
        "dare": D.sum(0), "della_linear": D.sum(0),
        "dare_ties": plus_election(D, np.ones(3), False), "della": plus_election(D, np.ones(3), True),
    }[name]  # fmt: skip
    np.testing.assert_allclose(weft(name), expected)


@pytest.mark.parametrize("x", [D, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("p", [0.3, 1.0])
def test_sce(x, p):
    var = x.var(0)
    count = int(p * np.count_nonzero(var))
    sel = np.where(var >= np.sort(var.ravel())[-count], x, 0)
    w = (sel**2).mean((1, 2))
    np.testing.assert_allclose(weft("sce", x, select_topk=p), elected_by_sum(sel, w / w.sum()), atol=1e-12)


def test_ram_plus_tl():
    on = np.abs(SPARSE) > 1e-5
    c = on.sum(0)
    ratio = (on & (c > 1)).sum((1, 2)) / (on & (c == 1)).sum((1, 2))
    lam = 1 + 0.5 * np.clip(ratio, 0, 2.0)
    unique = (np.where(c == 1, SPARSE, 0) * lam[:, None, None]).sum(0)
    shared = np.where(c > 1, SPARSE.sum(0) / np.maximum(c, 1), 0)
    np.testing.assert_allclose(weft("ramplus_tl", SPARSE, r=0.5, alpha=2.0), unique + shared)


@pytest.mark.parametrize("sign", [1, -1])
def test_model_stock(sign):
    x = D if sign > 0 else D - 1.2 * D.mean(0)
    u = x / np.sqrt((x**2).sum((1, 2), keepdims=True))
    c = np.mean([np.vdot(u[i], u[j]) for i, j in ((0, 1), (0, 2), (1, 2))])
    assert np.sign(c) == sign
    np.testing.assert_allclose(weft("model_stock", x), 3 * c / (1 + 2 * c) * x.mean(0))


def test_slerp_goes_straight_for_close_models():
    close = np.stack([BASE, BASE + 0.02 * D[0]])
    np.testing.assert_allclose(weft("slerp", close, t=0.3), 0.7 * close[0] + 0.3 * close[1])
    assert not np.allclose(METHODS["slerp"](torch.from_numpy(close), t=0.3), 0.7 * close[0] + 0.3 * close[1],
                           rtol=1e-9)  # fmt: skip


def test_multislerp_is_a_normalised_mean():
    norms = np.sqrt((D**2).sum((1, 2)))
    w = W / W.sum()
    mean = np.tensordot(w / norms, D, 1)
    got = weft("multislerp", weight=list(W))
    np.testing.assert_allclose(got, mean / np.linalg.norm(mean) * (w @ norms))


def test_karcher_stops_early():
    got, exact = weft("karcher"), METHODS["karcher"](torch.from_numpy(D)).numpy()
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    assert 0 < error < 1e-5


def test_arcee_fusion_takes_the_lower_of_two_neighbours():
    def log_softmax(v):
        return v - v.max(1, keepdims=True) - np.log(np.exp(v - v.max(1, keepdims=True)).sum(1, keepdims=True))

    tuned = BASE + D[0]
    p, q = log_softmax(tuned), log_softmax(BASE)
    score = np.abs(D[0]) * (np.exp(p) * (p - q)).sum(1, keepdims=True)
    low, middle, high = np.quantile(score, [0.25, 0.5, 0.75], method="lower")
    kept = np.where(score >= middle + 1.5 * (high - low), D[0], 0)
    x, base = torch.from_numpy(tuned)[None], torch.from_numpy(BASE)
    theirs = METHODS["arcee_fusion"].compat["mergekit"]
    got = METHODS["arcee_fusion"](x, base=base, **theirs).numpy()
    np.testing.assert_allclose(got, BASE + kept, atol=1e-12)


def test_compat_is_declared_where_mergekit_differs():
    differ = {"ties", "dare", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties", "sce",
              "ram_plus", "model_stock", "slerp", "multislerp", "karcher", "arcee_fusion"}  # fmt: skip
    assert {n for n in METHODS if "mergekit" in METHODS[n].compat} == differ
