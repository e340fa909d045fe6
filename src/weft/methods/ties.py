"""TIES-Merging: trim, elect sign, disjoint merge. Yadav et al. 2023, arXiv:2306.01708.

    τ̂ᵢ = τᵢ where |τᵢ| is among the largest k %, else 0
    γ  = sign(Σ wᵢτ̂ᵢ)                                   (elect="count": sign(Σ sign τ̂ᵢ))
    τ  = Σ_{i: sign τ̂ᵢ = γ} wᵢτ̂ᵢ / Σ_{same i} wᵢ
    θ  = θ0 + λτ

TIES is several algorithms. The paper trims over the whole model (`scope="model"`); MergeKit and PEFT trim
tensor by tensor. Where positive and negative mass balance exactly, sgn(0) = 0 elects nobody (`tie="none"`);
MergeKit elects plus. PEFT's "frequency" is elect="count".
"""

from __future__ import annotations

import math
from typing import Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.params import Density, Scope, Weight, per_model
from weft.methods.registry import method
from weft.methods.stats import Select, compared
from weft.methods.step import Pipeline, anything_goes, step

Elect = Literal["mass", "count"]
Tie = Literal["none", "plus"]


def kept_count(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps: ⌊p·n⌋, but one at least when p > 0."""
    if density <= 0:
        return 0
    # 0.29 * 100 is 28.999…: a count that is whole but for rounding is meant to be whole
    return max(1, math.floor(density * numel + 1e-9 * numel))


def column(values: Tensor, x: Tensor) -> Tensor:
    """A per-model vector [k] shaped to broadcast against x: [k, *shape]."""
    return torch.as_tensor(values, device=x.device).reshape(-1, *[1] * (x.ndim - 1))


@step(
    stat=Select("threshold", lambda p, k, n: [[kept_count(d, n)] for d in per_model(p["density"], k)]),
    refuses=anything_goes,
)
def trim(x: Tensor, *, threshold: Tensor, density: Density = 0.2, scope: Scope = "tensor") -> Tensor:
    """Keep each model's ⌊p·n⌋ entries of largest magnitude (all that tie with the last), zero the rest."""
    return torch.where(compared(x) >= column(threshold[:, 0], x), x, 0.0)


@step(refuses=anything_goes)
def elect_sign(x: Tensor, *, weight: Weight = 1.0, elect: Elect = "mass", tie: Tie = "none") -> Tensor:
    """Zero the entries whose sign is not the elected one. x: [k, *shape] → [k, *shape]."""
    w = per_model(weight, x.shape[0])
    votes = x[0].detach() * w[0] if elect == "mass" else (x[0].detach() * w[0]).sign()
    for xi, wi in zip(x[1:].detach(), w[1:], strict=True):
        votes = votes + (xi * wi if elect == "mass" else (xi * wi).sign())
    sign = votes.sign() if tie == "none" else torch.where(votes >= 0, 1.0, -1.0).to(x.dtype)
    signs = torch.stack([(xi * wi).sign() for xi, wi in zip(x.detach(), w, strict=True)])
    return torch.where((signs == sign) & (sign != 0), x, 0.0)


@step(reduces=True, refuses=anything_goes)
def disjoint_mean(x: Tensor, *, weight: Weight = 1.0, normalize: bool = True) -> Tensor:
    """Weighted mean over the models whose entry is not zero; the plain sum unless `normalize`."""
    if not normalize:
        return weighted_sum.fn(x, weight=weight)
    w = per_model(weight, x.shape[0])
    total = x[0] * w[0]
    mass = (x[0] != 0).to(x.dtype) * w[0]  # in the working dtype: 0.3 is not 0.3 in float32
    for xi, wi in zip(x[1:], w[1:], strict=True):
        total = total + xi * wi
        mass = mass + (xi != 0).to(x.dtype) * wi
    return torch.where(mass != 0, total / torch.where(mass != 0, mass, 1.0), 0.0)


@method(
    space="deltas",
    paper="Yadav et al., TIES-Merging, arXiv:2306.01708",
    compat={"mergekit": {"density": 1.0, "scope": "tensor", "tie": "plus"}},
)
def ties(
    *,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scope: Scope = "model",
    elect: Elect = "mass",
    tie: Tie = "none",
    normalize: bool = True,
    scale: float = 1.0,
) -> Pipeline:
    """Trim small entries, elect a sign by majority, average the entries that agree with it."""
    return (
        trim(density=density, scope=scope)
        | elect_sign(weight=weight, elect=elect, tie=tie)
        | disjoint_mean(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )
