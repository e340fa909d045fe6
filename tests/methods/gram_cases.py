"""References of the Gram solver in numpy, from the papers' formulas: they say nothing of singular matrices."""

from __future__ import annotations

import numpy as np
from measured_cases import known
from numpy.linalg import eigh, inv, norm


def ref_least_squares(x, grams, w=(1, 1, 1), start=0.0, gain=lambda v: 1 / v):
    """M₀ + (D − M₀C) V g(λ) Vᵀ."""
    c = sum(wi * g for wi, g in zip(w, grams, strict=True))
    d = sum(wi * t @ g for wi, t, g in zip(w, x, grams, strict=True))
    values, v = eigh(c)
    return start + (d - start @ c if np.ndim(start) else d) @ v @ np.diag(gain(values)) @ v.T


def ref_regmean(x, w=(1, 1, 1), keep=0.9, ridge=0.0, over="none", mean=None):
    g = known(x, "gram")["gram"]
    g = [np.where(np.eye(len(a)), a, keep * a) for a in g]
    size = {
        "none": lambda t, a: 1,
        "trace": lambda t, a: np.trace(a),
        "outputs": lambda t, a: (t @ a * t).sum(),
    }
    c = sum(wi / size[over](t, a) * a for wi, t, a in zip(w, x, g, strict=True))
    d = sum(wi / size[over](t, a) * t @ a for wi, t, a in zip(w, x, g, strict=True))
    mean = np.tensordot(w, x, 1) / sum(w) if mean is None else mean
    pull = ridge * np.diag(np.diag(c))  # a prior on changes of the mean, in units of each input
    return (d + mean @ pull) @ inv(c + pull)


def ref_swudi(x, w=(1, 1, 1), time=1300.0, share=0.65, start=None):
    own = [1 / norm(t) ** 2 for t in x]
    start = np.tensordot(w, x, 1) if start is None else start
    n = x.shape[2]
    k = int(np.ceil(share * n))

    def gain(v):
        v = np.maximum(v, 1e-8)
        return np.where(np.arange(n) >= n - k, (1 - np.exp(-v * time)) / v, 0)

    return ref_least_squares(
        x, [t.T @ t for t in x], [a * b for a, b in zip(w, own, strict=True)], start, gain
    )


def ref_swudi_a(x, w=(1, 1, 1), start=None, noise=False):
    own = [wi / norm(t) ** 2 for wi, t in zip(w, x, strict=True)]
    c = sum(a * t.T @ t for a, t in zip(own, x, strict=True))
    v = np.maximum(eigh(c)[0], 0)
    k = int(np.ceil(np.sqrt(v).sum() ** 2 / v.sum()))
    if noise:
        m, n = sorted((x.shape[0] * x.shape[1], x.shape[2]))
        b = m / n
        s = np.sqrt(v[::-1][:m])
        # torch's median is the lower of two
        k = max(1, (s > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * np.sort(s)[(m - 1) // 2]).sum())

    def gain(v):
        return np.where(np.arange(len(v)) >= len(v) - k, 1 / np.maximum(v, 1e-12), 0)

    return ref_least_squares(x, [t.T @ t for t in x], own, x.sum(0) if start is None else start, gain)


def ref_wudi(x, w=(1, 1, 1), steps=300, rate=1e-5, p=None):
    """The published loop: Adam on all task vectors, gradients by hand."""
    own = [wi / norm(t) ** 2 for wi, t in zip(w, x, strict=True)]
    p = np.tensordot(w, x, 1) if p is None else p
    m, v = np.zeros_like(p), np.zeros_like(p)
    for i in range(1, steps + 1):
        g = sum(2 * a * (p - t) @ t.T @ t for a, t in zip(own, x, strict=True))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - rate * (m / (1 - 0.9**i)) / (np.sqrt(v / (1 - 0.999**i)) + 1e-8)
    return p


def ref_actmat(x, w=(1, 1, 1), ridge=0.0):
    c = sum(wi * t.T @ t for wi, t in zip(w, x, strict=True))
    c = c + ridge * np.trace(c) / len(c) * np.eye(len(c))
    return sum(wi * t @ t.T @ t for wi, t in zip(w, x, strict=True)) @ np.linalg.pinv(c, rcond=1e-10)


def ref_gram(x, prior=0.1, ridge=0.01, start=None, w=(1, 1, 1), gain=None, keep=1.0, unit=False, share=1.0):
    g = [np.where(np.eye(len(a)), a, keep * a) for a in known(x, "gram")["gram"]]
    mix = [(1 - prior) * a / np.trace(a) + prior * t.T @ t / norm(t) ** 2 for a, t in zip(g, x, strict=True)]
    c = sum(wi * a for wi, a in zip(w, mix, strict=True))
    size = np.sqrt(np.diag(c)) if unit else np.ones(len(c))
    mean = np.trace(c / np.outer(size, size)) / len(c)
    start = np.tensordot(w, x, 1) if start is None else start
    first = len(c) - int(np.ceil(share * len(c)))

    def plain(v):
        kept = (v > 1e-9) & (np.arange(len(v)) >= first)
        return np.where(kept, 1 / (np.maximum(v, 1e-9) + ridge * mean), 0)

    own = [a / np.outer(size, size) for a in mix]
    return ref_least_squares(x * size, own, w, start * size, gain or plain) / size


def ref_weave(x, power=0.25, scale=1.25, **more):
    """`gram`'s merge with its singular values to a power, of the same norm."""
    u, s, vh = np.linalg.svd(ref_gram(x, **more), full_matrices=False)
    kept = s > 1e-5 * s[0]
    raised = np.where(kept, s, 1.0) ** power * kept
    return scale * (u * raised) @ vh * norm(s[kept]) / norm(raised)


def ref_ace(x, w=(1, 1, 1), eps=0.01, limit=0.3, share=0.3, prior=True):
    """The released code, with τ itself rather than the centred one in the product."""
    n = x.shape[2]
    traces = np.array([norm(t) ** 2 for t in x])
    logs = np.log(traces)
    spread = logs.var(ddof=1) / logs.mean() ** 2 > limit
    raw = [(t - t.mean(0)).T @ (t - t.mean(0)) for t in x]
    size = [np.trace(g) if spread else 1.0 for g in raw]
    sigmas = [g / s for g, s in zip(raw, size, strict=True)]
    full = [g + eps / s * np.eye(n) for g, s in zip(sigmas, size, strict=True)]
    a = sum(wi * g for wi, g in zip(w, full, strict=True))
    b = sum(wi * t @ g for wi, t, g in zip(w, x, full, strict=True))
    if prior:
        row = sum(wi * g for wi, g in zip(w, sigmas, strict=True)).mean(0)
        a_inv = inv(a + (row / traces.mean() if spread else row))
    else:
        a_inv = inv(a)
    merged = b @ a_inv
    if spread and share:
        rest = merged + sum(t @ (g - a / sum(w)) for t, g in zip(x, sigmas, strict=True))
        u, s, vh = np.linalg.svd(rest, full_matrices=False)
        top = int(len(s) * share)
        merged = merged + s[:top].mean() * u[:, :top] @ vh[:top]
    return merged


def ref_cat(x, w=(1, 1, 1), own=5.0, directions=2, scale=1.0):
    """Σ wₖ (I − BₖBₖᵀ) τₖ, Bₖ of the positive leading eigenvalues of τₖ (Σ_{i≠k} Gᵢ − λGₖ) τₖᵀ."""
    g = known(x, "gram")["gram"]
    total = np.zeros_like(x[0])
    for k, t in enumerate(x):
        values, v = eigh(t @ (sum(g[i] for i in range(len(x)) if i != k) - own * g[k]) @ t.T)
        b = v[:, [j for j in range(len(values))[::-1][:directions] if values[j] > 0]]
        total += w[k] * (t - b @ b.T @ t)
    return scale * total


U = [0.7, 0.3, 1.1]
GRAM = [
    ("cat", {}, ref_cat),
    ("cat", {"weight": [0.7, -0.3, 1.1], "own": 0.5, "directions": 1, "scale": 0.4},
     lambda x: ref_cat(x, (0.7, -0.3, 1.1), 0.5, 1, 0.4)),
    ("cat", {"own": 0.0, "directions": 5}, lambda x: ref_cat(x, own=0.0, directions=5)),
    ("regmean", {}, ref_regmean),
    ("regmean", {"weight": U, "off_diagonal": 0.5}, lambda x: ref_regmean(x, U, 0.5)),
    ("regmean", {"off_diagonal": 1.0}, lambda x: ref_regmean(x, keep=1.0)),
    ("regmean", {"ridge": 0.3}, lambda x: ref_regmean(x, ridge=0.3)),
    ("regmean", {"normalize": "trace"}, lambda x: ref_regmean(x, over="trace")),
    ("regmean", {"normalize": "outputs", "weight": U}, lambda x: ref_regmean(x, U, over="outputs")),
    ("lot", {}, lambda x: ref_least_squares(x, known(x, "gram")["gram"])),
    ("lot", {"weight": U, "scale": 0.5}, lambda x: 0.5 * ref_least_squares(x, known(x, "gram")["gram"], U)),
    ("lot", {"ridge": 0.4}, lambda x: ref_regmean(x, keep=1.0, ridge=0.4, mean=0 * x[0])),
    ("wudi", {}, ref_wudi),
    ("wudi", {"keep": "mean", "scale": 1.5}, lambda x: 1.5 * ref_wudi(x, p=x.mean(0))),
    ("wudi", {"weight": U, "steps": 40, "rate": 0.003}, lambda x: ref_wudi(x, U, 40, 0.003)),
    ("swudi", {}, ref_swudi),
    ("swudi", {"weight": U, "time": 5.0, "share": 0.9}, lambda x: ref_swudi(x, U, 5.0, 0.9)),
    ("swudi", {"keep": "mean", "time": 2.0, "share": 1.0},
     lambda x: ref_swudi(x, time=2.0, share=1.0, start=x.mean(0))),
    ("swudi", {"scale": 0.4}, lambda x: 0.4 * ref_swudi(x)),
    ("swudi_a", {}, ref_swudi_a),
    ("swudi_a", {"weight": U, "keep": "zero", "scale": 2.0}, lambda x: 2 * ref_swudi_a(x, U, 0 * x[0])),
    ("swudi_a", {"cut": "noise"}, lambda x: ref_swudi_a(x, noise=True)),
    ("actmat", {}, ref_actmat),
    ("actmat", {"weight": U}, lambda x: ref_actmat(x, U)),
    ("actmat", {"ridge": 0.2, "scale": 0.7}, lambda x: 0.7 * ref_actmat(x, ridge=0.2)),
    ("ace", {}, ref_ace),
    ("ace", {"limit": 0.0}, lambda x: ref_ace(x, limit=0.0)),
    ("ace", {"limit": 0.0, "share": 0.6, "epsilon": 0.5}, lambda x: ref_ace(x, eps=0.5, limit=0.0, share=0.6)),
    ("ace", {"weight": U, "prior": False, "scale": 0.5}, lambda x: 0.5 * ref_ace(x, U, prior=False)),
    ("weave", {}, ref_weave),
    ("weave", {"weight": U, "prior": 0.5, "ridge": 0.2, "power": 0.6, "scale": 0.7},
     lambda x: ref_weave(x, 0.6, 0.7, w=U, prior=0.5, ridge=0.2)),
    ("weave", {"filter": "flow", "keep": "mean"},
     lambda x: ref_weave(x, start=x.mean(0), gain=lambda v: (1 - np.exp(-1300 * v)) / np.maximum(v, 1e-9))),
    ("gram", {}, ref_gram),
    ("gram", {"prior": 0.6, "ridge": 0.2, "keep": "mean", "scale": 0.5},
     lambda x: 0.5 * ref_gram(x, 0.6, 0.2, x.mean(0))),
    ("gram", {"prior": 0.0, "filter": "flow", "time": 3.0, "keep": "zero"},
     lambda x: ref_gram(x, 0.0, start=0 * x[0], gain=lambda v: -np.expm1(-3.0 * v) / v)),
    ("gram", {"prior": 1.0, "filter": "exact", "keep_scale": 0.4},
     lambda x: ref_gram(x, 1.0, 0.0, 0.4 * x.sum(0))),
    ("gram", {"weight": U, "off_diagonal": 0.3, "unit": True},
     lambda x: ref_gram(x, w=U, keep=0.3, unit=True)),
    ("gram", {"share": 0.3, "keep": "mean"}, lambda x: ref_gram(x, share=0.3, start=x.mean(0))),
    ("gram", {"prior": 1.0, "filter": "exact", "cut": "participation"}, ref_swudi_a),
]  # fmt: skip
