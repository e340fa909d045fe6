"""Exact Pareto optimal search: weights α of the tasks' gradients that lead to rₜlₜ equal, or down where they are.

l̂ = r⊙l / Σ r⊙l,  μ = KL(l̂ ‖ uniform) = Σ l̂ log(m l̂),  a = r ⊙ (log(m l̂) − μ),  C = G Gᵀ

balance (μ > ε)   max αᵀCa   over α ∈ Δ with (Cα)ⱼ ≥ (Ca)ⱼ where that is below zero, free where it is above, and ≥ 0
                  for the largest rₜlₜ
descent (else)    max 1ᵀCα   over α ∈ Δ with αᵀCa ≥ min(0, max Ca) and Cα ≥ 0

Mahapatra & Rajan 2020; as PWE-MoE uses it (arXiv:2406.09770). Where a program has no solution, α = r / Σr. At the
end rₜlₜ = rₛlₛ, so a task of twice the preference has half the loss; Σ rₜlₜ promises no ratio.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.errors import MissingExtra

BALANCED = 1e-4


def non_uniformity(losses: Tensor, r: Tensor) -> float:
    """μ: 0 exactly where all rₜlₜ are equal."""
    share = _shares(losses, r)
    return float((share * (len(share) * share).log()).sum())


def epo_weights(losses: Tensor, r: Tensor, gram: Tensor) -> Tensor:
    """α [m] from losses l [m] ≥ 0, a preference r [m] and C [m, m], float64."""
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise MissingExtra("scipy", "search", "balance='epo'") from None
    m = len(losses)
    share = _shares(losses, r)
    log = (m * share).log()
    mu = float((share * log).sum())
    a = r * (log - mu)
    size = float(gram.abs().max())
    if size == 0 or not math.isfinite(size):
        return r / r.sum()
    c = (gram / size).double()
    ca = c @ a
    if mu > BALANCED:
        objective = -ca
        if bool((ca > 0).any()):
            bound = torch.where(ca <= 0, ca, torch.full_like(ca, -math.inf))
            bound[int((r * losses).argmax())] = 0.0
        else:
            bound = torch.zeros_like(ca)
        kept = bound > -math.inf
        left, right = -c[kept], -bound[kept]
    else:
        objective = -c.sum(0)
        left = torch.cat([-ca[None], -c])
        right = torch.cat([-ca.max().clamp(max=0.0)[None], torch.zeros(m, dtype=c.dtype)])
    found = linprog(
        objective.numpy(), A_ub=left.numpy() if len(left) else None, b_ub=right.numpy() if len(right) else None,
        A_eq=[[1.0] * m], b_eq=[1.0], bounds=(0, 1),
    )  # fmt: skip
    if found.x is None or not found.success:
        return r / r.sum()
    return torch.as_tensor(found.x, dtype=torch.float64)


def _shares(losses: Tensor, r: Tensor) -> Tensor:
    weighed = (r * losses).clamp_min(1e-12)
    return weighed / weighed.sum()
