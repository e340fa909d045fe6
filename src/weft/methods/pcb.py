"""PCB-Merging: parameter competition balancing. Du et al. 2024, arXiv:2410.02396.

    aᵢ = |τᵢ| clamped to its c and 1−c quantiles, min–max scaled to [0, 1];  τ̂ᵢ = sign(τᵢ) aᵢ
    intraᵢ = exp(k aᵢ²)             how much the task itself wants the change
    interᵢ = Σⱼ tanh(τ̂ᵢ τ̂ⱼ)         how far the others agree
    sᵢ = intraᵢ · interᵢ;  of each model the ⌊pn⌋ largest are min–max scaled to βᵢ in [0, 1], the rest 0
    θ  = θ0 + λ Σ wᵢ βᵢ τᵢ / Σ βᵢ

k models, density p, n entries of the whole model (`scope="tensor"`: of a tensor). Two order statistics are
needed one after the other, of |τ| and of s; both are found by streaming selection. Changes that conflict
(s ≤ 0) never take part, however large p. The min–max scaling of s puts the smallest kept score at β = 0, as
published; where all kept scores are equal β is 1. A quantile is the entry at that rank, not interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.params import Bounds, Fraction, Scope, Weight, per_model
from weft.methods.registry import method
from weft.methods.stats import Chain, Select, compared
from weft.methods.step import At, Pipeline, step
from weft.methods.ties import column, kept_count

Quantile = Annotated[float, Bounds(0.0, 0.5)]


def rescaled(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x clamped to [low, high] and scaled to [0, 1]; 1 where they are equal and x reaches them."""
    low, high = column(low, x).to(x.dtype), column(high, x).to(x.dtype)
    width = high - low
    inside = (x.clamp(low, high) - low) / torch.where(width > 0, width, 1.0)
    return torch.where(width > 0, inside, (x >= high).to(x.dtype))


def scores(x: Tensor, quantiles: Tensor) -> Tensor:
    """sᵢ, negative ones as 0. x: [k, *shape], quantiles: [k, 2] = (upper, lower)."""
    size = rescaled(compared(x).to(x.dtype), quantiles[:, 1], quantiles[:, 0])
    signed = x.sign() * size
    out = []
    for own, mine in zip(size, signed, strict=True):
        inter = torch.zeros_like(own)
        for other in signed:
            inter = inter + torch.tanh(mine * other)
        out.append((torch.exp(x.shape[0] * own**2) * inter).clamp(min=0))
    return torch.stack(out)


def _quantile_ranks(params: Mapping[str, Any], k: int, numel: int) -> list[list[int]]:
    cut = int(params["clip"] * numel)
    return [[min(1 + cut, numel), max(numel - cut, 1)]] * k


def _score_ranks(params: Mapping[str, Any], k: int, numel: int) -> list[list[int]]:
    return [[1, kept_count(params["density"], numel)]] * k


def _score(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    return scores(x, params["quantiles"])


@step(
    stat=Chain(Select("quantiles", _quantile_ranks), Select("best", _score_ranks, value=_score)),
    reduces=True,
)
def balance(
    x: Tensor,
    *,
    quantiles: Tensor,
    best: Tensor,
    weight: Weight = 1.0,
    density: Fraction = 0.1,
    clip: Quantile = 0.01,
    scope: Scope = "model",
) -> Tensor:
    """Mean of the task vectors weighted by balanced scores. best: [k, 2] = scores at ranks 1 and ⌊pn⌋."""
    # scores are compared as float32, as the order statistics are
    score = scores(x.detach(), quantiles).to(torch.float32).to(x.dtype)
    beta = torch.where(score > 0, rescaled(score, best[:, 1], best[:, 0]), 0.0)
    total, mass = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for xi, bi, wi in zip(x, beta, per_model(weight, x.shape[0]), strict=True):
        total, mass = total + wi * bi * xi, mass + bi
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.0)


@method(space="deltas", paper="Du et al., PCB-Merging, arXiv:2410.02396")
def pcb(
    *,
    weight: Weight = 1.0,
    density: Fraction = 0.1,
    clip: Quantile = 0.01,
    scope: Scope = "model",
    scale: float = 1.2,
) -> Pipeline:
    """Weigh every parameter by how much its task wants it and the others agree; drop the rest."""
    return balance(weight=weight, density=density, clip=clip, scope=scope) | scaled(scale=scale)
