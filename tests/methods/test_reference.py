"""Every method against a float64 numpy reference written from the paper's formula."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from gram_cases import GRAM
from made_up import made_up
from measured_cases import MEASURED
from spectral_cases import SPECTRAL

from weft.methods.registry import METHODS
from weft.methods.step import At

K, SHAPE = 3, (6, 20)
W = [0.7, -0.3, 1.1]
AT = At(name="layers.2.w", seed=5, layer=2, layers=5)


def bits(model, n, seed=AT.seed, name=AT.name):
    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key = hashlib.blake2b(f"weft/1:{seed}:{model}:0:{name}".encode(), digest_size=8).digest()
    k0, k1 = int.from_bytes(key[:4], "little"), int.from_bytes(key[4:], "little")
    return np.array([mix(mix(p ^ k0) ^ k1) for p in range(n)]) / 2**32


def wsum(x, w=W):
    return np.tensordot(np.broadcast_to(w, len(x)), x, 1)


def top(t, p):
    order = np.argsort(-np.abs(t).ravel())[: max(1, int(p * t.size))]
    keep = np.zeros(t.size, bool)
    keep[order] = True
    return np.where(keep.reshape(t.shape), t, 0)


def elected(x, w=W, count=False, mean=True):
    w = np.array(w)[:, None, None] * np.ones_like(x)
    gamma = np.sign((np.sign(w * x) if count else w * x).sum(0))
    agree = (np.sign(w * x) == gamma) & (x != 0)
    total, mass = (w * x * agree).sum(0), (w * agree).sum(0)
    return np.where(mass != 0, total / np.where(mass != 0, mass, 1), 0) if mean else total


def ref_dare(x, p=0.5, l1=False):
    out = []
    for i, t in enumerate(x):
        kept = np.where(bits(i, t.size).reshape(t.shape) < p, t, 0)
        out.append(kept * np.abs(t).sum() / np.abs(kept).sum() if l1 else kept / p)
    return np.array(out)


def ref_della(x, p=0.7, eps=0.07, l1=False):
    out = []
    for i, t in enumerate(x):
        rank = np.argsort(np.argsort(np.abs(t), 1), 1)
        prob = p + min(eps, p, 1 - p) * (2 * rank / (t.shape[1] - 1) - 1)
        kept = np.where(bits(i, t.size).reshape(t.shape) < prob, t, 0)
        out.append(kept * np.abs(t).sum() / np.abs(kept).sum() if l1 else kept / prob)
    return np.array(out)


def ref_band(x, p=0.143, g=0.007, density_first=False):
    out = []
    for t in x:
        n = t.size
        order, cut, kept = np.argsort(-np.abs(t).ravel()), int(g * n), max(1, int(p * n))
        cut = min(cut, n - kept) if density_first else cut
        keep = np.zeros(n, bool)
        keep[order[cut : cut + kept]] = True
        out.append(np.where(keep.reshape(t.shape), t, 0))
    return np.array(out)


def ref_slerp(a, b, t):
    phi = np.arccos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    return (np.sin((1 - t) * phi) * a + np.sin(t * phi) * b) / np.sin(phi)


def ref_karcher(x, w=W, steps=200):
    w = np.array(w) / np.sum(w)
    norms = [np.linalg.norm(t) for t in x]
    u = [t / n for t, n in zip(x, norms)]
    m = wsum(np.array(u), w)
    m = m / np.linalg.norm(m)
    for _ in range(steps):
        step = 0
        for wi, ui in zip(w, u):
            c = np.vdot(ui, m)
            step = step + wi * np.arccos(c) / np.sqrt(1 - c * c) * (ui - c * m)
        size = np.linalg.norm(step)
        m = np.cos(size) * m + np.sin(size) * step / size if size > 0 else m
    return m * np.dot(w, norms)


def ref_stock(x):
    n = len(x)
    cos = [
        np.vdot(x[i], x[j]) / np.linalg.norm(x[i]) / np.linalg.norm(x[j]) for i in range(n) for j in range(i)
    ]
    c = max(np.mean(cos), 0)
    return n * c / (1 + (n - 1) * c) * x.mean(0)


def ref_tall(x, task, thr=0.4, w=1.0, tau=None):
    tau = wsum(x, w) if tau is None else tau
    return np.abs(x[task]) >= thr * np.abs(tau - x[task]), tau


def ref_consensus(x, least=2, thr=0.4, tau=None):
    masks = [ref_tall(x, t, thr, tau=tau)[0] for t in range(len(x))]
    return np.where(np.sum(masks, 0) >= least, x.sum(0) if tau is None else tau, 0)


def ref_unified(x):
    gamma = np.where(x.sum(0) > 0, 1, -1)
    return gamma * np.where(np.sign(x) == gamma, np.abs(x), 0).max(0)


def ref_emr(x, task):
    kept = np.where(x[task] * ref_unified(x) > 0, ref_unified(x), 0)
    return kept * np.abs(x[task]).mean() / np.abs(kept).mean()


def ref_pcb(x, p=0.1, clip=0.01, w=1.0):
    n, a = x[0].size, []
    for t in x:
        s = np.sort(np.abs(t).ravel())
        lo, hi = s[int(clip * n)], s[n - 1 - int(clip * n)]
        a.append((np.clip(np.abs(t), lo, hi) - lo) / (hi - lo))
    a = np.array(a)
    hat = np.sign(x) * a
    score = np.maximum(np.exp(len(x) * a**2) * np.array([np.tanh(h * hat).sum(0) for h in hat]), 0)
    beta = []
    for s in score:
        low = max(np.sort(s.ravel())[-max(1, int(p * n))], 0)
        beta.append(np.clip((s - low) / (s.max() - low), 0, 1))
    beta = np.array(beta)
    return wsum(beta * x, w) / np.where(beta.sum(0) > 0, beta.sum(0), 1)


def ref_varm(x, axes):
    v = (x**2).mean(axes, keepdims=True)
    return (v / v.sum(0) * x).sum(0)


def ref_sce(x, p=1.0):
    var = x.var(0)
    sel = np.where(var >= np.sort(var.ravel())[-max(1, int(p * var.size))], x, 0)
    w = (sel**2).sum((1, 2))
    return elected_by_sum(sel, w / w.sum())


def elected_by_sum(x, w):
    w = w[:, None, None] * (np.sign(x) == np.sign(x.sum(0))) * (x != 0)
    return (w * x).sum(0) / np.where(w.sum(0) > 0, w.sum(0), 1)


def ref_ram(x, eps=0.0, r=0.0, alpha=0.0):
    on = np.abs(x) > eps
    c = on.sum(0)
    shared, unique = (on & (c > 1)).sum((1, 2)), (on & (c == 1)).sum((1, 2))
    lam = 1 + r * np.clip(shared / np.maximum(unique, 1), 0, alpha)
    scaled = np.where(c == 1, lam[:, None, None] * x, x) * on
    return scaled.sum(0) / np.maximum(c, 1)


def ref_arcee(d, base, divergence=True, factor=1.5):
    def soft(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = soft(base + d), soft(base)
    s = np.abs(d) * ((p * np.log(p / q)).sum(1, keepdims=True) if divergence else 1)
    q1, q2, q3 = np.quantile(s, [0.25, 0.5, 0.75])
    return np.where(s >= q2 + factor * (q3 - q1), d, 0)


def cols(fn, x):
    return np.stack([fn(np.array([t[r] for t in x])[:, None, :])[0] for r in range(x.shape[1])])


# (method, parameters, reference of x: [k, *shape]); a method of one or two models gets the first ones
CASES = [
    ("linear", {"weight": W}, lambda x: wsum(x) / sum(W)),
    ("linear", {"weight": W, "normalize": False}, wsum),
    ("task_arithmetic", {"weight": W, "scale": 0.5}, lambda x: 0.5 * wsum(x)),
    ("task_arithmetic", {"weight": W, "normalize": True}, lambda x: wsum(x) / sum(W)),
    ("expo", {"alpha": 0.25}, lambda x: 1.25 * x[0]),
    ("wise_ft", {"alpha": 0.25}, lambda x: 0.25 * x[0]),
    ("passthrough", {"scale": 0.25}, lambda x: 0.25 * x[0]),
    ("ties", {"weight": W}, lambda x: elected(np.array([top(t, 0.2) for t in x]))),
    ("ties", {"weight": W, "density": [0.5, 1.0, 0.0], "scale": 2.0},
     lambda x: 2 * elected(np.array([top(x[0], 0.5), x[1], 0 * x[2]]))),
    ("ties", {"weight": W, "elect": "count", "density": 1.0}, lambda x: elected(x, count=True)),
    ("ties", {"weight": W, "normalize": False, "density": 1.0}, lambda x: elected(x, mean=False)),
    ("magnitude", {"weight": W}, lambda x: wsum([top(t, 0.2) for t in x])),
    ("magnitude", {"weight": W, "density": 0.6, "normalize": True, "scale": 2.0},
     lambda x: 2 * wsum([top(t, 0.6) for t in x]) / sum(W)),
    ("breadcrumbs", {}, lambda x: 0.3 * wsum(ref_band(x), 1.0)),
    ("breadcrumbs", {"weight": W, "density": 0.3, "gamma": 0.1, "normalize": True, "scale": 1.0},
     lambda x: wsum(ref_band(x, 0.3, 0.1)) / sum(W)),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.1, "scale": 1.0},
     lambda x: wsum(ref_band(x, 0.95, 0.1), 1.0)),
    ("breadcrumbs", {"density": 0.95, "gamma": 0.1, "prefer": "density", "scale": 1.0},
     lambda x: wsum(ref_band(x, 0.95, 0.1, True), 1.0)),
    ("breadcrumbs_ties", {"weight": W, "density": 0.5, "gamma": 0.1},
     lambda x: elected(ref_band(x, 0.5, 0.1))),
    ("breadcrumbs_ties", {"weight": W, "density": 0.5, "elect": "count", "normalize": False, "scale": 2.0},
     lambda x: 2 * elected(ref_band(x, 0.5), count=True, mean=False)),
    ("breadcrumbs_ties", {"density": 0.95, "gamma": 0.1, "prefer": "density"},
     lambda x: elected(ref_band(x, 0.95, 0.1, True), [1] * K)),
    ("dare", {"weight": W}, lambda x: wsum(ref_dare(x))),
    ("dare", {"density": 0.3, "rescale": "l1", "normalize": True, "scale": 2.0},
     lambda x: 2 * ref_dare(x, 0.3, True).mean(0)),
    ("dare", {"density": 0.3, "rescale": "none"}, lambda x: 0.3 * ref_dare(x, 0.3).sum(0)),
    ("dare_ties", {"weight": W}, lambda x: elected(ref_dare(x))),
    ("dare_ties", {"density": 0.8, "rescale": "l1", "elect": "count", "normalize": False, "scale": 2.0},
     lambda x: 2 * elected(ref_dare(x, 0.8, True), [1] * K, count=True, mean=False)),
    ("della", {"weight": W}, lambda x: elected(ref_della(x))),
    ("della", {"density": 0.9, "epsilon": 0.5, "rescale": "l1", "elect": "count", "normalize": False,
               "scale": 2.0},
     lambda x: 2 * elected(ref_della(x, 0.9, 0.5, True), [1] * K, count=True, mean=False)),
    ("della_linear", {"weight": W}, lambda x: wsum(ref_della(x))),
    ("della_linear", {"density": 0.2, "epsilon": 0.15, "rescale": "l1", "normalize": True, "scale": 2.0},
     lambda x: 2 * ref_della(x, 0.2, 0.15, True).mean(0)),
    ("slerp", {"t": 0.3}, lambda x: ref_slerp(x[0], x[1], 0.3)),
    ("slerp", {"t": 0.3, "linear_above": 0.0}, lambda x: 0.7 * x[0] + 0.3 * x[1]),
    ("slerp", {"t": 0.3, "row_wise": True}, lambda x: cols(lambda y: ref_slerp(y[0], y[1], 0.3), x)),
    ("nuslerp", {"weight": [3.0, 1.0]}, lambda x: ref_slerp(x[0], x[1], 0.25)),
    ("nuslerp", {"row_wise": True}, lambda x: cols(lambda y: ref_slerp(y[0], y[1], 0.5), x)),
    ("nuslerp", {"column_wise": True},
     lambda x: cols(lambda y: ref_slerp(y[0], y[1], 0.5), x.swapaxes(1, 2)).T),
    ("karcher", {"weight": [0.7, 0.2, 1.1]}, lambda x: ref_karcher(x, [0.7, 0.2, 1.1])),
    ("karcher", {"max_iter": 2}, lambda x: ref_karcher(x, [1, 1, 1], 2)),
    ("karcher", {"tol": 10.0}, lambda x: ref_karcher(x, [1, 1, 1], 0)),
    ("karcher", {"row_wise": True, "weight": [1.0, 2.0, 3.0]},
     lambda x: cols(lambda y: ref_karcher(y, [1, 2, 3]), x)),
    ("multislerp", {"weight": [0.7, 0.2, 1.1]}, lambda x: ref_karcher(x, [0.7, 0.2, 1.1], 1)),
    ("multislerp", {"steps": 0}, lambda x: ref_karcher(x, [1, 1, 1], 0)),
    ("multislerp", {"row_wise": True}, lambda x: cols(lambda y: ref_karcher(y, [1, 1, 1], 1), x)),
    ("model_stock", {}, ref_stock),
    ("model_stock", {"row_wise": True}, lambda x: cols(ref_stock, x)),
    ("tall_masks", {"task": 1}, lambda x: np.prod(ref_tall(x, 1), axis=0)),
    ("tall_masks", {"task": 2, "threshold": 0.8, "weight": W},
     lambda x: np.prod(ref_tall(x, 2, 0.8, W), axis=0)),
    ("consensus", {}, lambda x: 0.3 * ref_consensus(x)),
    ("consensus", {"min_tasks": 3, "threshold": 0.2, "scale": 1.0}, lambda x: ref_consensus(x, 3, 0.2)),
    ("consensus", {"weight": W}, lambda x: 0.3 * ref_consensus(x, tau=wsum(x))),
    ("consensus", {"of": "ties", "density": 0.5, "scale": 1.0},
     lambda x: ref_consensus(x, tau=elected(np.array([top(t, 0.5) for t in x]), [1] * K))),
    ("emr", {}, ref_unified),
    ("emr", {"task": 0}, lambda x: ref_emr(x, 0)),
    ("emr", {"task": 2}, lambda x: ref_emr(x, 2)),
    ("magmax", {}, lambda x: 0.5 * np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]),
    ("magmax", {"scale": 1.0}, lambda x: np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]),
    ("pcb", {"weight": W}, lambda x: 1.2 * ref_pcb(x, w=W)),
    ("pcb", {"density": 0.5, "clip": 0.2, "scale": 1.0}, lambda x: ref_pcb(x, 0.5, 0.2)),
    ("lines", {}, lambda x: (1 / K + 0.5 * 2 / 4) * x.sum(0)),
    ("lines", {"weight": W, "alpha": 0.3, "beta": 0.9}, lambda x: (0.3 + 0.9 * 2 / 4) * wsum(x)),
    ("varm", {}, lambda x: ref_varm(x, tuple(range(1, x.ndim)))),
    ("varm", {"over": "element"}, lambda x: ref_varm(x, ())),
    ("sce", {}, ref_sce),
    ("sce", {"select_topk": 0.3}, lambda x: ref_sce(x, 0.3)),
    ("ram", {"epsilon": 0.5}, lambda x: ref_ram(x, 0.5)),
    ("ram_plus", {"epsilon": 1.0}, lambda x: ref_ram(x, 1.0, 0.1, 0.2)),
    ("ram_plus", {"epsilon": 1.0, "r": 0.5, "alpha": 3.0}, lambda x: ref_ram(x, 1.0, 0.5, 3.0)),
    ("nearswap", {"t": 0.5}, lambda x: np.minimum(0.5 / np.abs(x[0]), 1) * x[0]),
    *SPECTRAL,
    *MEASURED,
    *GRAM,
]  # fmt: skip


def models(name, seed=0):
    k = min(K, METHODS[name].models[1] or K)
    rng = np.random.default_rng(seed)
    # float32 values, so that comparing magnitudes as float32 loses nothing; a common part, so that they agree
    x = rng.normal(size=(k, *SHAPE)) + 0.6 * rng.normal(size=SHAPE)
    return x.astype(np.float32).astype(np.float64)


def known(name, x):
    """What a method that takes statistics gets of them."""
    return made_up(METHODS[name].needs, torch.as_tensor(x))


@pytest.mark.parametrize("name, params, reference", CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_reference(name, params, reference):
    x = models(name)
    got = METHODS[name](torch.from_numpy(x), at=AT, statistics=known(name, x), **params)
    np.testing.assert_allclose(got.numpy(), reference(x), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("params", [{}, {"factor": 0.5}, {"importance": "magnitude"}])
def test_arcee_fusion(params):
    rng = np.random.default_rng(1)
    base, d = rng.normal(size=SHAPE), rng.normal(size=SHAPE)
    got = METHODS["arcee_fusion"](torch.from_numpy(base + d)[None], base=torch.from_numpy(base), **params)
    kept = ref_arcee(d, base, params.get("importance") != "magnitude", params.get("factor", 1.5))
    np.testing.assert_allclose(got.numpy(), base + kept, atol=1e-12)
    assert 0 < (kept != 0).mean() < 0.5


def test_every_method_has_a_reference():
    assert set(METHODS) == {c[0] for c in CASES} | {"arcee_fusion"}


# parameters whose effect needs special data or several tensors; each has its own test
ELSEWHERE = {
    "scope": "test_streaming.py::test_scope",
    "tie": "test_laws.py::test_tie",
    "select_of": "test_laws.py::test_select_of",
    "entries": "test_cat.py::test_scales_by_inputs_and_shifts_by_size",
    "diagonal": "test_gram.py::test_tables_and_scales_by_their_diagonal",
    "outside": "test_spectral.py::test_outside_the_blocks",
    "clip": "test_spectral.py::test_rank_is_told_from_rounding",
    "quartiles": "test_mergekit_compat.py::test_arcee_fusion_takes_the_lower_of_two_neighbours",
    "clamp": "test_regressions.py::test_model_stock_negative_cosine",
}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_is_exercised(name):
    used = {p for case in CASES if case[0] == name for p in case[1]}
    if name == "arcee_fusion":
        used = {"factor", "importance"}
    assert set(METHODS[name].params) <= used | set(ELSEWHERE)
    declared = METHODS[name].params
    for case in CASES:
        if case[0] != name:
            continue
        for p, value in case[1].items():
            if declared[p].required or (name, p) == ("emr", "task"):
                continue
            x, rest = torch.from_numpy(models(name)), {q: v for q, v in case[1].items() if q != p}
            measured = known(name, x)
            with_p = METHODS[name](x, at=AT, statistics=measured, **case[1])
            without = METHODS[name](x, at=AT, statistics=measured, **rest)
            assert not torch.equal(with_p, without), (p, value)
