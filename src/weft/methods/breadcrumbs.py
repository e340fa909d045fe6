"""Keep entries by magnitude: a band (Model Breadcrumbs) or the largest (pruning).

breadcrumbs   mᵢ = 1 where |τᵢ| is neither among the ⌊γn⌋ largest nor below the next ⌊pn⌋;  θ0 + λ Σ wᵢ mᵢτᵢ
              Davari & Belilovsky 2024, arXiv:2312.06795
magnitude     mᵢ = 1 where |τᵢ| is among the ⌊pn⌋ largest;                                  θ0 + λ Σ wᵢ mᵢτᵢ

p is the fraction kept (density), γ the fraction of the largest dropped (gamma), n the entries of a tensor, or
of the model with scope="model". The paper speaks of percentiles, β = 85 % and γ = 99.3 %: p = 0.143 and
gamma = 0.007 here. Entries that tie with the first or last kept are kept, so a tensor of one magnitude
stays whole. With γn < 1 nothing is dropped above the band (MergeKit loses the whole tensor there).

p + γ > 1 asks for more than is left. By default γ is honoured and fewer are kept; `prefer="density"`, which
is MergeKit's reading, honours p, so that its default density of 1 drops no outlier at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.params import Density, Fraction, Scope, Weight, per_model
from weft.methods.registry import method
from weft.methods.stats import Select, compared
from weft.methods.step import Pipeline, anything_goes, step
from weft.methods.ties import Elect, Tie, column, disjoint_mean, elect_sign, kept_count, trim

Prefer = Literal["gamma", "density"]


def band_ranks(params: Mapping[str, Any], k: int, numel: int) -> list[list[int]]:
    """Per model the ranks (from the largest, 1-based) of the first and the last entry kept."""
    dropped = math.floor(params["gamma"] * numel + 1e-9 * numel)
    ranks = []
    for p in per_model(params["density"], k, "density"):
        kept = kept_count(p, numel)
        if params["prefer"] == "density":
            first = min(dropped, numel - kept) + 1
        else:
            first = dropped + 1
        # rank 0 is +inf: nothing reaches it
        ranks.append([first, first + kept - 1] if kept else [0, 0])
    return ranks


@step(stat=Select("bounds", band_ranks), refuses=anything_goes)
def band(
    x: Tensor,
    *,
    bounds: Tensor,
    density: Density = 0.143,
    gamma: Fraction = 0.007,
    prefer: Prefer = "gamma",
    scope: Scope = "tensor",
) -> Tensor:
    """Zero the largest ⌊γn⌋ entries of each model and all but ⌊pn⌋ of the others. bounds: [k, 2]."""
    size = compared(x)
    return torch.where((size <= column(bounds[:, 0], x)) & (size >= column(bounds[:, 1], x)), x, 0.0)


@method(
    space="deltas",
    paper="Davari & Belilovsky, Model Breadcrumbs, arXiv:2312.06795",
    compat={"mergekit": {"density": 1.0, "gamma": 0.01, "prefer": "density", "scale": 1.0}},
)
def breadcrumbs(
    *,
    weight: Weight = 1.0,
    density: Density = 0.143,
    gamma: Fraction = 0.007,
    prefer: Prefer = "gamma",
    scope: Scope = "tensor",
    normalize: bool = False,
    scale: float = 0.3,
) -> Pipeline:
    """Drop the largest and the smallest entries of each task vector, then add up."""
    return (
        band(density=density, gamma=gamma, prefer=prefer, scope=scope)
        | weighted_sum(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )


@method(
    space="deltas",
    paper="Davari & Belilovsky, arXiv:2312.06795; Goddard et al., MergeKit, arXiv:2403.13257",
    compat={
        "mergekit": {"density": 1.0, "gamma": 0.01, "prefer": "density", "tie": "plus", "normalize": False}
    },
)
def breadcrumbs_ties(
    *,
    weight: Weight = 1.0,
    density: Density = 0.143,
    gamma: Fraction = 0.007,
    prefer: Prefer = "gamma",
    scope: Scope = "tensor",
    elect: Elect = "mass",
    tie: Tie = "none",
    normalize: bool = True,
    scale: float = 1.0,
) -> Pipeline:
    """Drop the largest and the smallest entries, then elect signs and average as TIES does."""
    return (
        band(density=density, gamma=gamma, prefer=prefer, scope=scope)
        | elect_sign(weight=weight, elect=elect, tie=tie)
        | disjoint_mean(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )


@method(space="deltas", paper="Han et al., Learning both weights and connections, NeurIPS 2015")
def magnitude(
    *,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scope: Scope = "tensor",
    normalize: bool = False,
    scale: float = 1.0,
) -> Pipeline:
    """Keep the largest entries of each task vector, then add up."""
    return (
        trim(density=density, scope=scope)
        | weighted_sum(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )
