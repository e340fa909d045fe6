"""References of the spectral methods, in float64 numpy from the papers' formulas; no line shared with weft.

They hold for experts in general position, for which the published codes are right too: full SVDs, polar factors.
"""

from __future__ import annotations

import numpy as np
import torch
from made_up import made_up
from numpy.linalg import eigh, norm, svd

from weft.methods.kinds import Need

W = [0.7, -0.3, 1.1]


def cut(t, r):
    u, s, vh = svd(t, full_matrices=False)
    return u[:, :r], s[:r], vh[:r]


def low(t, r):
    u, s, vh = cut(t, r)
    return u @ np.diag(s) @ vh


def isometry(m):
    u, _, vh = svd(m, full_matrices=False)
    return u @ vh


def donoho(t):
    b = min(t.shape) / max(t.shape)
    s = svd(t, compute_uv=False)
    return max(1, int((s > (0.56 * b**3 - 0.95 * b**2 + 1.82 * b + 1.43) * np.median(s)).sum()))


def total(x, w=(1, 1, 1)):
    return sum(wi * t for wi, t in zip(w, x))


def ref_tsv(x, w=(1, 1, 1), ranks=None):
    p = min(x[0].shape)
    parts = [cut(t, r) for t, r in zip(x, ranks or [p // len(x)] * len(x))]
    s = np.concatenate([wi * a[1] for wi, a in zip(w, parts)])
    left, right = (np.concatenate([a[0] for a in parts], 1), np.concatenate([a[2] for a in parts]))
    return isometry(left) @ np.diag(s) @ isometry(right)


def ref_iso(x, w=(1, 1, 1), rank=None):
    m = total(x, w)
    u, s, vh = cut(m, rank or min(m.shape))
    return s.mean() * u @ vh


def ref_cts(x, w=(1, 1, 1), common=0.8):
    m, p, k = total(x, w), min(x[0].shape), len(x)
    own = round((p - int(common * p)) / k)
    u, s, vh = cut(m, p - own * k)
    lefts, rights, values = [u], [vh], [s]
    for wi, t in zip(w, x):
        a, b, c = cut(t - u @ u.T @ t, own)
        lefts, rights, values = [*lefts, a], [*rights, c * np.sign(wi)], [*values, abs(wi) * b]
    mean = np.concatenate(values).mean()
    return mean * isometry(np.concatenate(lefts, 1)) @ isometry(np.concatenate(rights))


def ref_dc(x, w=(1, 1, 1), density=0.001, smooth=None, ratio=5.0, ranks=None):
    p, k = min(x[0].shape), len(x)
    parts = [cut(t, r) for t, r in zip(x, ranks or [p // k] * k)]
    left = isometry(np.concatenate([a[0] for a in parts], 1))
    right = isometry(np.concatenate([a[2] for a in parts]))
    cores, size = [], left.shape[1]
    mask, at = np.zeros((size, size)), 0
    for wi, (u, s, vh) in zip(w, parts):
        r = len(s)
        if smooth == "mean":
            s = np.full(r, s.mean())
        elif smooth == "linear" and s[0] / s[-1] > ratio:
            ramp = np.linspace(ratio, 1, r)
            s = s.sum() * ramp / ramp.sum()
        core = left.T @ u @ np.diag(wi * s) @ vh @ right.T
        keep = int(density * core.size)
        kept = np.abs(core) >= np.append(np.sort(np.abs(core).ravel()), np.inf)[core.size - keep]
        for j in range(at, at + r):
            kept[j, j] = True
        if not keep:
            kept = np.diag((np.arange(size) >= at) & (np.arange(size) < at + r))
        cores.append(np.where(kept, core, 0))
        mask[at : at + r, at : at + r] = 1
        at += r
    cores = np.array(cores)
    agree = (np.sign(cores) == np.sign(cores.sum(0))) & (cores != 0)
    mean = (cores * agree).sum(0) / np.maximum(agree.sum(0), 1)
    return left @ (mean * mask) @ right


def ref_star(x, w=(1, 1, 1), eta=0.4):
    out = 0
    for wi, t in zip(w, x):
        s = svd(t, compute_uv=False)
        r = next(j for j in range(1, len(s) + 1) if s[:j].sum() >= eta * s.sum())
        out = out + wi * low(t, r) * s.sum() / s[:r].sum() / len(x)
    return out


def ref_cart(x, w=(1, 1, 1), ranks=(1, 1, 1), scale=1.0):
    mean = sum(x) / len(x)
    return mean + scale * sum(wi * low(t - mean, r) for wi, t, r in zip(w, x, ranks))


def ties(x, w, density):
    kept = []
    for t in x:
        least = np.sort(np.abs(t).ravel())[-max(1, int(density * t.size))]
        kept.append(np.where(np.abs(t) >= least, t, 0))
    kept = np.array(kept)
    w = np.array(w)[:, None, None]
    agree = (np.sign(w * kept) == np.sign((w * kept).sum(0))) & (kept != 0)
    mass = (w * agree).sum(0)
    return np.where(mass != 0, (w * kept * agree).sum(0) / np.where(mass != 0, mass, 1), 0)


def ref_knots(x, w=(1, 1, 1), density=0.2, elect=True):
    _, s, vh = svd(np.concatenate(x, 1), full_matrices=False)
    u = svd(np.concatenate(x, 1), full_matrices=False)[0]
    n = x[0].shape[1]
    rows = [np.diag(s) @ vh[:, i * n : (i + 1) * n] for i in range(len(x))]
    return u @ (ties(rows, w, density) if elect else total(rows, w))


def ref_core(x, w=(1, 1, 1), density=0.2, merge=ties):
    u = svd(np.concatenate(x, 1), full_matrices=False)[0]
    vh = svd(np.concatenate(x, 0), full_matrices=False)[2]
    return u @ merge([u.T @ t @ vh.T for t in x], w, density) @ vh


def ref_esm(x, w=(1, 1, 1), rank=None, power=0.15):
    """With the made-up Gram matrices, of inputs `half` = G^½ row by row."""
    lefts, rights = [], []
    for wi, t, g in zip(w, x, made_up((Need.parse("gram"),), torch.from_numpy(x))["gram"].numpy()):
        values, q = eigh(g)
        shifted = np.diag(np.sqrt(values)) @ q.T @ t.T  # Xτᵀ for an X with XᵀX = G
        _, s, ph = svd(shifted, full_matrices=False)
        r = rank or min(t.shape) // len(x)
        u, e = ph[:r].T, s[:r] ** 2
        f = (e / e.mean()) ** power
        v = np.diag(f) @ u.T @ t
        rows = norm(v, axis=1)
        lefts.append(u @ np.diag(f))
        rights.append(wi * np.diag((rows / rows.mean()) ** 2) @ v)
    u, v = np.concatenate(lefts, 1), np.concatenate(rights)
    columns = norm(v, axis=0)
    v = v @ np.diag((columns / columns.mean()) ** 2)
    mean_u, mean_v = (svd(m, compute_uv=False).mean() for m in (u, v))
    return 2 * mean_u * mean_v * isometry(u) @ isometry(v)


def ref_svc(x, merged, alpha):
    u, s, vh = svd(merged, full_matrices=False)
    gamma = []
    for r in range(len(s)):
        p = [u[:, r] @ merged @ (u[:, r] @ t) / norm(u[:, r] @ t) ** 2 for t in x]
        gamma.append(len(x) / sum(max(alpha, v) for v in p))
    return u @ np.diag(np.array(gamma) * s) @ vh


def ref_boost(x, beta, w=(1, 1, 1)):
    u, s, vh = svd(total(x, w), full_matrices=False)
    share = np.cumsum(s) / s.sum()
    return u @ np.diag(np.maximum(s, s[np.argmax(share >= beta)])) @ vh


def noisy(x):
    return [min(donoho(t), 2) for t in x]


SPECTRAL = [
    ("tsv", {}, ref_tsv),
    ("tsv", {"weight": W, "scale": 0.5}, lambda x: 0.5 * ref_tsv(x, W)),
    ("tsv", {"share": 0.17}, lambda x: ref_tsv(x, ranks=[1, 1, 1])),
    ("tsv", {"clip": "noise"}, lambda x: ref_tsv(x, ranks=noisy(x))),
    ("tsv_c", {"task": 1}, lambda x: low(x[1], 2)),
    ("tsv_c", {"task": 2, "share": 0.7, "scale": 2.0}, lambda x: 2 * low(x[2], 4)),
    ("tsv_c", {"task": 0, "clip": "noise"}, lambda x: low(x[0], min(donoho(x[0]), 2))),
    ("iso_c", {}, ref_iso),
    ("iso_c", {"weight": W, "scale": 1.3}, lambda x: 1.3 * ref_iso(x, W)),
    ("iso_c", {"clip": "noise"}, lambda x: ref_iso(x, rank=donoho(sum(x)))),
    ("iso_cts", {}, ref_cts),
    ("iso_cts", {"common": 0.3}, lambda x: ref_cts(x, common=0.3)),
    ("iso_cts", {"weight": W, "scale": 1.5, "common": 0.1}, lambda x: 1.5 * ref_cts(x, W, 0.1)),
    ("dc_merge", {}, ref_dc),
    ("dc_merge", {"weight": W, "scale": 0.5, "density": 0.4}, lambda x: 0.5 * ref_dc(x, W, 0.4)),
    ("dc_merge", {"smooth": "mean"}, lambda x: ref_dc(x, smooth="mean")),
    ("dc_merge", {"smooth": "linear", "ratio": 1.1}, lambda x: ref_dc(x, smooth="linear", ratio=1.1)),
    ("dc_merge", {"clip": "noise"}, lambda x: ref_dc(x, ranks=noisy(x))),
    ("star", {}, ref_star),
    ("star", {"weight": W, "nuclear": 0.8, "scale": 2.0}, lambda x: 2 * ref_star(x, W, 0.8)),
    ("cart", {}, ref_cart),
    ("cart", {"weight": W, "share": 0.5, "scale": 0.7}, lambda x: ref_cart(x, W, (3, 3, 3), 0.7)),
    ("knots", {}, ref_knots),
    ("knots", {"weight": W, "density": 0.6, "scale": 2.0}, lambda x: 2 * ref_knots(x, W, 0.6)),
    ("knots", {"within": "task_arithmetic", "weight": W}, lambda x: ref_knots(x, W, elect=False)),
    ("core_space", {}, ref_core),
    ("core_space", {"weight": W, "density": 0.6, "scale": 2.0}, lambda x: 2 * ref_core(x, W, 0.6)),
    ("core_space", {"within": "tsv"}, ref_tsv),
    ("esm", {}, ref_esm),
    ("esm", {"weight": W, "power": 0.0, "scale": 0.1}, lambda x: 0.1 * ref_esm(x, W, power=0)),
    ("esm", {"share": 0.17}, lambda x: ref_esm(x, rank=1)),
    ("esm", {"power": 0.5}, lambda x: ref_esm(x, power=0.5)),
    ("svc", {}, lambda x: ref_svc(x, sum(x), 0.1)),
    ("svc", {"weight": W, "alpha": 0.5, "scale": 2.0}, lambda x: 2 * ref_svc(x, total(x, W), 0.5)),
    ("svc", {"after": "mean"}, lambda x: ref_svc(x, sum(x) / 3, 0.1)),
    ("svc", {"after": "tsv"}, lambda x: ref_svc(x, ref_tsv(x), 1.0)),
    ("subspace_boosting", {}, lambda x: ref_boost(x, 0.02)),
    ("subspace_boosting", {"weight": W, "beta": 0.6, "scale": 2.0}, lambda x: 2 * ref_boost(x, 0.6, W)),
]  # fmt: skip
