"""`bbp_map`: units of many clients matched to global ones, of which there may be more than any client has.

Yurochkin et al., arXiv:1905.12022: client j has some of the global units θ_i, each at most once, v_jl ~ N(θ_i, σ²),
θ_i ~ N(0, σ₀²), and how many there are follows a Beta-Bernoulli process of mass γ. Given all other clients, the
best matching of client j is an assignment (equation 8 of the paper), for a unit i that m_i of them have

    |Σ v/σ² + v_jl/σ²|² / (1/σ₀² + n/σ² + 1/σ²) − |Σ v/σ²|² / (1/σ₀² + n/σ²) + 2 log m_i/(J − m_i)

and for the k-th new one  |v_jl/σ²|² / (1/σ₀² + 1/σ²) − 2 log (k J/γ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.align.plans import assigned
from weft.errors import DataError, UsageError


def bbp_map(
    vectors: Sequence[Tensor], *, sigma: float = 1.0, prior: float = 10.0, gamma: float = 7.0, sweeps: int = 5,
    seed: int = 0, precisions: Sequence[Tensor] | None = None, most: int | None = None,
) -> list[Tensor]:  # fmt: skip
    """For each client [n_j, D] the global unit of each of its units: int64 [n_j], from 0, none left out.

    `sigma` and `prior` are the variances σ² and σ₀², `gamma` the mass: more lets more units be new. `precisions`
    multiplies 1/σ² for each coordinate of a client ([D], one each). `most` bounds the number of global units.
    """
    problem = next(
        (n for n, v in (("sigma", sigma), ("prior", prior), ("gamma", gamma)) if not 0 < v < math.inf), None
    )
    if problem or sweeps < 1:
        raise UsageError(f"{problem or 'sweeps'} must be above 0")
    if len({v.shape[1] for v in vectors}) > 1:
        raise DataError(f"units of {', '.join(str(v.shape[1]) for v in vectors)} weights cannot be matched")
    if not all(bool(v.isfinite().all()) for v in vectors):
        raise DataError("some client's weights are NaN or infinite, so its units cannot be matched")
    clients = len(vectors)
    ones = torch.ones(vectors[0].shape[1], dtype=torch.float64)
    weight = [p.double() / sigma for p in precisions] if precisions else [ones / sigma] * clients
    found: list[Tensor | None] = [None] * clients
    generator = torch.Generator().manual_seed(seed)
    # the widest first: it starts the global units, and nothing depends on the order in which clients are given
    order = sorted(range(clients), key=lambda j: -len(vectors[j]))
    for sweep in range(sweeps):
        before = [None if f is None else f.clone() for f in found]
        for j in order if sweep == 0 else torch.randperm(clients, generator=generator).tolist():
            found[j] = None
            kept = _compact(found)
            sums, mass, count = _gathered(vectors, weight, kept)
            found = list(kept)
            score = _scores(vectors[j].double(), weight[j], sums, mass, count, clients, prior, gamma)
            found[j] = assigned(score if most is None else score[:, : max(most, len(vectors[j]))])
        if all(
            b is not None and f is not None and torch.equal(b, f) for b, f in zip(before, found, strict=True)
        ):
            break
    return [f for f in _compact(found) if f is not None]


def _compact(found: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Global units renumbered without those that nobody has."""
    used = torch.unique(torch.cat([f for f in found if f is not None] or [torch.zeros(0, dtype=torch.long)]))
    return [None if f is None else torch.searchsorted(used, f) for f in found]


def _gathered(
    vectors: Sequence[Tensor], weight: Sequence[Tensor], found: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of every global unit: Σ v/σ² [N, D], n/σ² [N, D], and how many clients have it [N]."""
    n = max((int(f.max()) + 1 for f in found if f is not None and len(f)), default=0)
    d = vectors[0].shape[1]
    sums, mass = (torch.zeros(n, d, dtype=torch.float64) for _ in range(2))
    count = torch.zeros(n, dtype=torch.float64)
    for v, w, f in zip(vectors, weight, found, strict=True):
        if f is not None:
            sums.index_add_(0, f, v.double() * w)
            mass.index_add_(0, f, w.expand(len(f), d))
            count.index_add_(0, f, torch.ones(len(f), dtype=torch.float64))
    return sums, mass, count


def _scores(
    v: Tensor, weight: Tensor, sums: Tensor, mass: Tensor, count: Tensor, clients: int, prior: float, gamma: float
) -> Tensor:  # fmt: skip
    """[units of the client, global units, then as many new ones]."""
    scaled = v * weight
    own = ((scaled[:, None] + sums) ** 2 / (1 / prior + mass + weight)).sum(-1)
    old = own - (sums**2 / (1 / prior + mass)).sum(-1) + 2 * (count / (clients - count)).log()
    new = (scaled**2 / (1 / prior + weight)).sum(-1)
    ranks = torch.arange(1, len(v) + 1, dtype=torch.float64)
    return torch.cat([old, new[:, None] - 2 * (ranks * clients / gamma).log()], 1)
