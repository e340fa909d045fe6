"""Assignments and transport plans from scipy, and entropic ones by Sinkhorn's iteration.

Rows are the units that are made, columns those that they are made of.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.align import assign
from weft.errors import DataError, MissingExtra, UsageError


def _scipy() -> Any:
    try:
        import scipy.optimize
        import scipy.sparse
    except ImportError:
        raise MissingExtra("scipy", "align", "matching units") from None
    return scipy


def assigned(score: Tensor) -> Tensor:
    """π maximising Σ_i score[i, π_i], for each matrix of [..., n, m], n ≤ m: int64 [..., n]. Exact."""
    flat = score.reshape(-1, *score.shape[-2:])
    return torch.stack([assign.assigned(s) for s in flat]).reshape(score.shape[:-1])


def gained(score: Tensor) -> Tensor:
    """The largest Σ score[i, π_i] for each matrix of [..., n, m]; the fewer units are all matched."""
    if score.shape[-2] > score.shape[-1]:
        score = score.mT
    return score.gather(-1, assigned(score)[..., None]).sum((-2, -1))


def exact(cost: Tensor, made: Tensor | None = None, given: Tensor | None = None) -> Tensor:
    """The plan P ≥ 0 [n, m] that minimises ⟨P, cost⟩ with P1 = made and Pᵀ1 = given (uniform by default).

    Between equally many equal masses it is a permutation, from scipy's assignment; else from its linear program.
    """
    n, m = cost.shape
    uniform = made is None and given is None
    if uniform and n == m:
        plan = torch.zeros(n, m, dtype=torch.float64)
        return plan.scatter_(1, assigned(-cost)[:, None], 1 / n)
    scipy = _scipy()
    made = torch.full((n,), 1 / n, dtype=torch.float64) if made is None else made.double()
    given = torch.full((m,), 1 / m, dtype=torch.float64) if given is None else given.double()
    _balanced(made, given)
    rows = scipy.sparse.kron(scipy.sparse.eye(n), torch.ones(1, m).numpy(), format="csr")
    columns = scipy.sparse.kron(torch.ones(1, n).numpy(), scipy.sparse.eye(m), format="csr")
    cost = cost.double()
    scale = float(cost.abs().max().clamp_min(1e-300))
    found = scipy.optimize.linprog(
        (cost / scale).reshape(-1).numpy(),
        A_eq=scipy.sparse.vstack([rows, columns[:-1]]),
        b_eq=torch.cat([made, given[:-1]]).numpy(),
        method="highs-ds",
    )
    if found.x is None:
        raise DataError(f"no transport plan was found for {n} × {m} units: {found.message}")
    return torch.as_tensor(found.x).reshape(n, m).clamp_min(0)


def entropic(
    cost: Tensor, reg: float, made: Tensor | None = None, given: Tensor | None = None, *,
    steps: int = 2000, tolerance: float = 1e-6,
) -> Tensor:  # fmt: skip
    """The plan that minimises ⟨P, cost⟩ + reg · max(cost) · Σ P log P; Sinkhorn's iteration on logarithms."""
    if not reg > 0:
        raise UsageError(f"reg must be above 0, not {reg}: take an exact plan instead")
    n, m = cost.shape
    made = torch.full((n,), 1 / n, dtype=torch.float64) if made is None else made.double()
    given = torch.full((m,), 1 / m, dtype=torch.float64) if given is None else given.double()
    _balanced(made, given)
    cost = cost.double()
    k = -cost / (reg * cost.abs().max().clamp_min(1e-300))
    f, g = torch.zeros_like(made), torch.zeros_like(given)
    for step in range(steps):
        f = made.log() - torch.logsumexp(k + g, 1)
        g = given.log() - torch.logsumexp(k + f[:, None], 0)
        if step % 10 == 9:
            off = (torch.logsumexp(k + f[:, None] + g, 1).exp() - made).abs().sum()
            if off < tolerance:
                break
    return (k + f[:, None] + g).exp()


def _balanced(made: Tensor, given: Tensor) -> None:
    if bool((made <= 0).any() or (given <= 0).any()) or abs(float(made.sum() - given.sum())) > 1e-9:
        raise UsageError("masses must be above 0 and as much must be given as is made")
