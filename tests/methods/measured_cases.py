"""References of the methods that take statistics, in float64 numpy from the papers' formulas.

A reference gets the stack x [k, out, in] and the same made-up statistics that the method gets.
"""

from __future__ import annotations

import numpy as np
import torch
from made_up import made_up
from numpy.linalg import norm, solve

from weft.methods.kinds import Need

W = [0.7, -0.3, 1.1]


def known(x, *needs):
    """The made-up statistics of x, as arrays; `needs` in the order in which the method declares them."""
    found = made_up(tuple(map(Need.parse, needs)), torch.from_numpy(x))
    return {k: v.numpy() for k, v in found.items()}


def ref_fisher(x, w=(1, 1, 1), unit=True, floor=1e-6, first=False, prior=0.0):
    s = known(x, "fisher", "fisher_norm", "base_fisher?", "base_fisher_norm?")
    f, f0 = s["fisher"], s["base_fisher"]
    if unit:
        f, f0 = np.array([fi / norm(fi) for fi in f]), f0 / norm(f0)
    f = np.array([np.maximum(fi, floor) if i == 0 or not first else fi for i, fi in enumerate(f)])
    wf = np.array(w)[:, None, None] * f
    return (wf * x).sum(0) / (wf.sum(0) + prior * np.maximum(f0, floor))


def ref_nodes(x, w=(1, 1, 1), unit=False):
    f = known(x, "node", "node_norm")["node"]  # [k, out]
    f = np.array([wi * fi / (norm(fi) if unit else 1) for wi, fi in zip(w, f, strict=True)])
    return (f[:, :, None] * x).sum(0) / f.sum(0)[:, None]


def ref_ubgm(x, alpha=(1, 1, 1), size=(10, 20, 30), base_size=10, delta=1e-12):
    s = known(x, "fisher", "fisher_samples?", "base_fisher?", "base_fisher_samples?")
    h0 = base_size * s["base_fisher"] + delta
    h = [n * f for n, f in zip(size, s["fisher"], strict=True)]
    bar = sum(a * ht for a, ht in zip(alpha, h, strict=True)) + h0
    total = np.zeros_like(x[0])
    for a, ht, xt in zip(alpha, h, x, strict=True):
        gain = np.where(bar > 0, a * (ht + h0) / bar, a)
        total += xt * np.minimum(np.maximum(gain, -1 - abs(a)), 1 + abs(a))
    return total


def ref_mats(x, w=(1, 1, 1), kfac=True, scale=0.3, iterations=None, keep=1.0, tol=0.0):
    """Σ wᵢ (B ⊗ A) (D − τᵢ) = 0 as one dense system; solved, or by the textbook's conjugate gradients."""
    s = known(x, "kfac_a", "kfac_g", "gram")
    eye = np.eye(x.shape[1])
    pairs = list(zip(s["kfac_g"], s["kfac_a"], strict=True)) if kfac else [(eye, a) for a in s["gram"]]
    shrink = [
        (np.where(np.eye(len(b)), b, keep * b), np.where(np.eye(len(a)), a, keep * a)) for b, a in pairs
    ]
    blocks = [wi * np.kron(b, a) for wi, (b, a) in zip(w, shrink, strict=True)]
    c, rhs = sum(blocks), sum(m @ t.ravel() for m, t in zip(blocks, x, strict=True))
    if iterations is None:
        return solve(c, rhs).reshape(x[0].shape)
    d = scale * sum(wi * t for wi, t in zip(w, x, strict=True)).ravel()
    r = p = rhs - c @ d
    for _ in range(iterations):
        if r @ r <= tol**2 * (rhs @ rhs):
            break
        a = (r @ r) / (p @ c @ p)
        d, new = d + a * p, r - a * (c @ p)
        p, r = new + (new @ new) / (r @ r) * p, new
    return d.reshape(x[0].shape)


def ref_aim(x, change, omega=0.4):
    s = known(x, "base_abs_mean")["base_abs_mean"]
    return change * (1 - s / s.max() * (1 - omega))


def total(x, w=(1, 1, 1)):
    return np.tensordot(w, x, 1)


def ref_ties(x, density):
    cut = [np.sort(np.abs(t).ravel())[-int(density * t.size)] for t in x]
    kept = np.array([np.where(np.abs(t) >= c, t, 0) for t, c in zip(x, cut, strict=True)])
    agree = (np.sign(kept) == np.sign(kept.sum(0))) & (kept != 0)
    return (kept * agree).sum(0) / np.maximum(agree.sum(0), 1)


MEASURED = [
    ("fisher", {}, ref_fisher),
    ("fisher", {"weight": [0.7, 0.3, 1.1]}, lambda x: ref_fisher(x, [0.7, 0.3, 1.1])),
    ("fisher", {"normalize": "none"}, lambda x: ref_fisher(x, unit=False)),
    ("fisher", {"floor": 0.1}, lambda x: ref_fisher(x, floor=0.1)),
    ("fisher", {"floor": 0.1, "favor": "first"}, lambda x: ref_fisher(x, floor=0.1, first=True)),
    ("fisher", {"prior": 0.5}, lambda x: ref_fisher(x, prior=0.5)),
    ("fisher_nodes", {}, ref_nodes),
    ("fisher_nodes", {"weight": [0.7, 0.3, 1.1]}, lambda x: ref_nodes(x, [0.7, 0.3, 1.1])),
    ("fisher_nodes", {"normalize": "model"}, lambda x: ref_nodes(x, unit=True)),
    ("ubgm", {}, ref_ubgm),
    ("ubgm", {"weight": W}, lambda x: ref_ubgm(x, W)),
    ("ubgm", {"size": [100.0, 5.0, 20.0], "base_size": 50.0},
     lambda x: ref_ubgm(x, size=(100, 5, 20), base_size=50)),
    ("ubgm", {"delta": 3.0}, lambda x: ref_ubgm(x, delta=3.0)),
    ("mats", {}, ref_mats),
    ("mats", {"weight": [0.7, 0.3, 1.1]}, lambda x: ref_mats(x, [0.7, 0.3, 1.1])),
    ("mats", {"curvature": "gram", "off_diagonal": 0.9}, lambda x: ref_mats(x, kfac=False, keep=0.9)),
    ("mats", {"iterations": 5, "off_diagonal": 0.5}, lambda x: ref_mats(x, iterations=5, keep=0.5)),
    ("mats", {"iterations": 3, "scale": 1.0}, lambda x: ref_mats(x, scale=1.0, iterations=3)),
    ("mats", {"tol": 0.2}, lambda x: ref_mats(x, iterations=100, tol=0.2)),
    ("aim", {}, lambda x: ref_aim(x, total(x))),
    ("aim", {"weight": W, "scale": 0.5, "omega": 0.2}, lambda x: ref_aim(x, 0.5 * total(x, W), 0.2)),
    ("aim", {"of": "ties"}, lambda x: ref_aim(x, ref_ties(x, 0.2))),
    ("aim", {"of": "ties", "density": 0.5, "scale": 2.0}, lambda x: ref_aim(x, 2 * ref_ties(x, 0.5))),
]  # fmt: skip
