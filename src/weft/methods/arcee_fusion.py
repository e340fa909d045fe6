"""Fusion of the most important changes, after MergeKit's arcee_fusion.

    Pᵢ, Qᵢ     softmax of row i of θ1 and of θ0
    sᵢⱼ        = |τᵢⱼ| · KL(Pᵢ ‖ Qᵢ),  KL = Σⱼ Pᵢⱼ (log Pᵢⱼ − log Qᵢⱼ)
    threshold  = q(½) + factor · (q(¾) − q(¼)) of all sᵢⱼ of the tensor
    θ          = θ0 + τ where s ≥ threshold, else θ0

so that a change counts for its size and for how far its row's distribution has moved. A softmax of weights
has no probabilistic meaning; with `importance="magnitude"` s is |τ| alone. Quantiles are exact, linearly
interpolated between neighbouring entries, or with `quartiles="lower"` the lower of these. MergeKit takes the
lower, and on large tensors estimates them from an unseeded sample.
"""

from __future__ import annotations

import math
from typing import Literal

from weft.late import Tensor, torch
from weft.methods.averages import weighted_sum
from weft.methods.params import NonNegative
from weft.methods.registry import method
from weft.methods.step import Pipeline, row_length, step

Importance = Literal["divergence", "magnitude"]
Quartiles = Literal["linear", "lower"]


def quantile(values: Tensor, q: float, between: Quartiles = "linear") -> Tensor:
    """Exact quantile of any number of values (torch.quantile takes at most 2²⁴)."""
    place = q * (values.numel() - 1)
    low = values.kthvalue(math.floor(place) + 1).values
    if between == "lower":
        return low
    high = values.kthvalue(math.ceil(place) + 1).values
    return low + (high - low) * (place - math.floor(place))


@step(grain="tensor")
def keep_important(
    x: Tensor,
    *,
    base: Tensor | None = None,
    factor: NonNegative = 1.5,
    importance: Importance = "divergence",
    quartiles: Quartiles = "linear",
) -> Tensor:
    """Zero the changes whose importance is below median + factor · interquartile range."""
    out = []
    for xi in x.detach():
        score = xi.abs()
        if importance == "divergence":
            rows = (-1, row_length(xi.shape))
            anchor = (torch.zeros_like(xi) if base is None else base.detach()).reshape(rows)
            p, q = (anchor + xi.reshape(rows)).log_softmax(-1), anchor.log_softmax(-1)
            moved = (p.exp() * (p - q)).sum(-1, keepdim=True).clamp(min=0)
            score = (score.reshape(rows) * moved).reshape(xi.shape)
        flat = score.reshape(-1)
        if not flat.numel():
            out.append(score >= 0)
            continue
        low, middle, high = (quantile(flat, q, quartiles) for q in (0.25, 0.5, 0.75))
        out.append(score >= middle + factor * (high - low))
    return torch.where(torch.stack(out), x, 0.0)


@method(
    space="deltas",
    models=(1, 1),
    paper="Goddard et al., MergeKit, arXiv:2403.13257 (arcee_fusion)",
    compat={"mergekit": {"quartiles": "lower"}},
)
def arcee_fusion(
    *, factor: NonNegative = 1.5, importance: Importance = "divergence", quartiles: Quartiles = "linear"
) -> Pipeline:
    """Take over the most important changes of one model, leave the rest at the base."""
    return keep_important(factor=factor, importance=importance, quartiles=quartiles) | weighted_sum()
