"""RobustMerge: prune each factor, make up for it rank by rank, normalise over tasks.

Zeng et al., NeurIPS 2025, arXiv:2502.17159. For adapters i = 1 … k of one rank r, with Â, B̂ the entries of
largest magnitude of a factor:

    sᵢ = Σⱼ |Aᵢ|ⱼ / Σⱼ |Âᵢ|ⱼ                   [r]: how much each row of Aᵢ lost; at most `limit`
    A  = λ Σᵢ Âᵢ,   B = λ Σᵢ B̂ᵢ diag(sᵢ / Σₗ sₗ)

A's are added to A's and B's to B's, so the product holds cross-terms. λ = 2 is the authors' for eight unlike tasks.
For k equal adapters the result is λ²k times one of them, so choose λ on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from weft.adapters.factors import Factors
from weft.adapters.lowrank import same_weight
from weft.errors import UsageError
from weft.methods.ties import trim


def robustmerge(
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    density: float = 0.2,
    scale: float = 2.0,
    limit: float = 10.0,
) -> Factors:
    """A and B as above, wᵢ on Bᵢ. Rank r; all ranks must be equal, 0 < density ≤ 1."""
    shape, transposed = same_weight(factors)
    if len({f.rank for f in factors}) > 1:
        raise UsageError("robustmerge needs equal ranks: resize the adapters first")
    if not 0 < density <= 1:
        raise UsageError(f"robustmerge keeps a share of the entries in (0, 1], not density {density}")
    a = torch.stack([f.a for f in factors])  # [k, r, in]
    b = torch.stack([f.b for f in factors])  # [k, out, r]
    kept_a, kept_b = trim(a, density=density), trim(b, density=density)
    before, after = a.abs().sum(2), kept_a.abs().sum(2)  # [k, r]
    # a row that lost everything has nothing left to scale up
    s = torch.where(after > 0, before / torch.where(after > 0, after, 1.0), 1.0).clamp_max(limit)
    s = s / s.sum(0)
    w = torch.tensor(list(weights), dtype=b.dtype)[:, None, None]
    return Factors(scale * (w * kept_b * s[:, None, :]).sum(0), scale * kept_a.sum(0), shape, transposed)
