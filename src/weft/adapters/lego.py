"""LoRA-LEGO: take adapters apart into their ranks, cluster the ranks, build one adapter of the centroids.

Zhao et al., ICLR 2025, arXiv:2409.16167. A rank's unit is its row of A and its column of B in one vector,
(aⱼ, bⱼ): in ℝ^(in+out). The R = Σ rᵢ units of all adapters are clustered into k by k-means; the centroids are the
ranks of the merged adapter. Averaging shrinks norms, and more ranks add variance, hence two corrections:

    (a, b)_c ← (a, b)_c · mean_{j∈c} ‖(aⱼ, bⱼ)‖ / ‖(a, b)_c‖          norm decay
    ΔW ← ΔW · √(r/k),  r the mean rank of the adapters                variance of the output

Order of ranks and of adapters does not matter, nor do ranks need to be equal. The scale of a unit between a and
b is arbitrary; here every Bᵢ carries its adapter's scale.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch

from weft.adapters.factors import Factors
from weft.adapters.lowrank import same_weight
from weft.errors import MissingExtra, UsageError


def lego(
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    rank: int | None = None,
    reweight: bool = True,
    name: str = "",
    seed: int = 0,
    restarts: int = 4,
) -> Factors:
    """`rank` centroids of all ranks (the mean rank by default). wᵢ·k multiplies Bᵢ, so that 1/k is neutral.

    k-means++ with `restarts` starts, of which the tightest is taken; seeded by `seed` and `name`.
    """
    shape, transposed = same_weight(factors)
    present = [f for f in factors if f.rank]
    if not present:
        return factors[0]
    mean = sum(f.rank for f in present) / len(present)
    clusters = max(1, round(mean)) if rank is None else rank
    if clusters < 1:
        raise UsageError(f"rank must be at least 1, not {clusters}")
    k = len(factors)
    b = torch.cat([w * k * f.b for f, w in zip(factors, weights, strict=True)], 1)  # [out, R]
    a = torch.cat([f.a for f in factors])  # [R, in]
    units = torch.cat([a, b.T], 1)  # [R, in + out]
    clusters = min(clusters, len(units))
    labels = clustered(units, clusters, seed, name, restarts)
    member = torch.nn.functional.one_hot(labels, clusters).to(units)  # [R, clusters]
    share = member / member.sum(0).clamp_min(1)
    made = share.T @ units  # [clusters, in + out]; an empty cluster, of equal units, is zeros
    if reweight:
        length = made.norm(dim=1)
        growth = (share.T @ units.norm(dim=1)) / torch.where(length > 0, length, 1.0)
        made = made * growth[:, None]
    centre_a, centre_b = made[:, : a.shape[1]], made[:, a.shape[1] :]
    spread = sqrt(mean / clusters) if reweight else 1.0
    return Factors(spread * centre_b.T, centre_a.contiguous(), shape, transposed)


def clustered(units: torch.Tensor, clusters: int, seed: int, name: str, restarts: int) -> torch.Tensor:
    """The cluster of each unit, [R], in 0 … clusters − 1. Equal units may leave clusters empty."""
    try:
        from scipy.cluster.vq import kmeans2
    except ImportError:
        raise MissingExtra("scipy", "search", "LoRA-LEGO") from None
    import numpy as np

    # k-means needs distances only, so the R×R coordinates of the units do
    u, s, _ = torch.linalg.svd(units, full_matrices=False)
    points = (u * s).numpy()
    key = hashlib.blake2b(f"lego:{seed}:{name}".encode(), digest_size=8).digest()
    rng = np.random.default_rng(int.from_bytes(key, "little"))
    tried: list[tuple[float, int, Any]] = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        for _ in range(restarts):
            centres, labels = kmeans2(points, clusters, iter=100, minit="++", rng=rng)
            tried.append((float(((points - centres[labels]) ** 2).sum()), len(tried), labels))
    return torch.from_numpy(min(tried)[2].astype(np.int64))
