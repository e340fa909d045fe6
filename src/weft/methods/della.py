"""DELLA: drop entries at random, the small ones sooner. Deep et al. 2024, arXiv:2406.11617.

    r    = rank of |τ| within its row of n entries, 0 for the smallest
    pᵣ   = p + ε'(2r/(n−1) − 1)            the probability to be kept; ε' = min(ε, p, 1−p)
    m    ~ Bernoulli(pᵣ)
    τ̂    = m ⊙ τ / pᵣ                       so that E[τ̂] = τ
    θ    = θ0 + λ · TIES election and mean of τ̂ (della), or λ Σ wᵢτ̂ᵢ (della_linear)

p is the density, ε half of the window (the paper writes the whole window ε, of drop rates p ± ε/2; its
repository's example keeps 0.7 with a window of 0.14). A window that would leave [0, 1] is narrowed on both
sides, so that the mean is p whatever ε (MergeKit raises; its default ε fails for densities above 0.85).
Equal magnitudes share the mean of their ranks, and so have one chance: the paper is silent, and a rank by
position would favour whatever stands last among the many equal differences of 16-bit weights. A row of one
entry has pᵣ = p. Rows are step.row_length's: MergeKit ranks fused experts [E, out, in] along `out`, and
restores the L1 norm of the tensor instead of dividing by pᵣ (`rescale="l1"`). Magnitudes are compared as
float32, and the draw is random.py's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.dare import Rescale, restore
from weft.methods.params import Density, Fraction, Weight, per_model
from weft.methods.random import uniform_bits
from weft.methods.registry import method
from weft.methods.stats import Sums, compared
from weft.methods.step import At, Pipeline, anything_goes, row_length, step
from weft.methods.ties import Elect, Tie, disjoint_mean, elect_sign


def keep_probability(x: Tensor, density: float, epsilon: float) -> Tensor:
    """pᵣ of every entry, x: [rows, n] → [rows, n] float64."""
    n = x.shape[-1]
    window = min(epsilon, density, 1.0 - density)
    size, order = compared(x.detach()).sort(dim=-1)
    here = torch.arange(n, device=x.device).expand_as(order)
    other = size.diff(dim=-1) != 0  # where a run of equal magnitudes ends
    edge = torch.ones_like(size[..., :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, other], -1), here, 0).cummax(-1).values
    last = torch.where(torch.cat([other, edge], -1), here, n - 1).flip(-1).cummin(-1).values.flip(-1)
    chance = density + window * ((first + last - (n - 1)).double() / max(n - 1, 1))
    return torch.empty_like(x, dtype=torch.float64).scatter_(-1, order, chance)


def thinned(x: Tensor, density: Density, epsilon: float, rescale: bool, at: At) -> Tensor:
    """Keep every entry with its pᵣ, divided by pᵣ when `rescale`. x: [k, rows, n] → same."""
    out = []
    for i, (xi, p) in enumerate(zip(x, per_model(density, x.shape[0], "density"), strict=True)):
        chance = keep_probability(xi, p, epsilon)
        bits = uniform_bits(at, i, xi.numel(), x.device).reshape(xi.shape)
        kept = bits < (chance * (1 << 32)).long()
        # where nothing is kept the divisor is never seen, but must not be zero
        divisor = torch.where(kept, chance, 1.0).to(x.dtype) if rescale else 1.0
        out.append(torch.where(kept, xi, 0.0) / divisor)
    return torch.stack(out)


@step(grain="row", refuses=anything_goes)
def thin(
    x: Tensor, *, at: At, density: Density = 0.7, epsilon: Fraction = 0.07, rescale: bool = True
) -> Tensor:
    """Keep entries at random, large ones of a row more likely, divided by that likelihood."""
    return thinned(x, density, epsilon, rescale, at)


def _masses(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    rows = x.reshape(x.shape[0], -1, row_length(at.shape))
    kept = thinned(rows, params["density"], params["epsilon"], False, at)
    return torch.cat([rows.abs(), kept.abs()]).reshape(2 * x.shape[0], -1)  # [2k, n]


@step(grain="row", stat=Sums("masses", _masses), refuses=anything_goes)
def thin_keep_l1(
    x: Tensor, *, at: At, masses: Tensor, density: Density = 0.7, epsilon: Fraction = 0.07
) -> Tensor:
    """`thin` without its division; instead each tensor's L1 norm is restored."""
    return restore(thinned(x, density, epsilon, False, at), masses)


def _thinned(density: Density, epsilon: float, rescale: Rescale) -> Pipeline:
    if rescale == "l1":
        return thin_keep_l1(density=density, epsilon=epsilon)
    return thin(density=density, epsilon=epsilon, rescale=rescale == "inverse")


@method(
    space="deltas",
    paper="Deep et al., DELLA-Merging, arXiv:2406.11617",
    compat={"mergekit": {"density": 1.0, "epsilon": 0.15, "rescale": "l1", "tie": "plus"}},
)
def della(
    *,
    weight: Weight = 1.0,
    density: Density = 0.7,
    epsilon: Fraction = 0.07,
    rescale: Rescale = "inverse",
    elect: Elect = "mass",
    tie: Tie = "none",
    normalize: bool = True,
    scale: float = 1.0,
) -> Pipeline:
    """Drop entries at random by rank, then elect signs and average as TIES does."""
    return (
        _thinned(density, epsilon, rescale)
        | elect_sign(weight=weight, elect=elect, tie=tie)
        | disjoint_mean(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )


@method(
    space="deltas",
    paper="Deep et al., DELLA-Merging, arXiv:2406.11617; Goddard et al., MergeKit, arXiv:2403.13257",
    compat={"mergekit": {"density": 1.0, "epsilon": 0.15, "rescale": "l1"}},
)
def della_linear(
    *,
    weight: Weight = 1.0,
    density: Density = 0.7,
    epsilon: Fraction = 0.07,
    rescale: Rescale = "inverse",
    normalize: bool = False,
    scale: float = 1.0,
) -> Pipeline:
    """Drop entries at random by rank, then add up."""
    return (
        _thinned(density, epsilon, rescale)
        | weighted_sum(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )
