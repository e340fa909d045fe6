"""Averages weighted by Fisher information. Matena & Raffel 2022, arXiv:2111.09832; Thennal et al. 2024.

fisher         θʲ = Σ λᵢ Fᵢʲ θᵢʲ / Σ λᵢ Fᵢʲ        Fᵢ = mean over examples of (∂ log p(y|x) / ∂θ)²
fisher_nodes   the same with one Fᵢ a unit: the Fisher information of a mask of ones on the unit's output

Fisher information differs between tasks by orders of magnitude, so each model's is divided by its L2 norm over all
merged tensors (`normalize="model"`) before a floor ε is put under it. With `favor="first"` only the first model has
the floor: entries that matter to no other model are then the first one's alone. The base counts as one more model,
of weight `prior`, where its own Fisher information is given (`base_statistics`) or, without it, with F = ε. Tensors
that were not measured, and entries that matter to nobody, are averaged: Σ λᵢθᵢ / Σ λᵢ.
"""

from __future__ import annotations

from typing import Literal

from weft.late import Tensor, torch
from weft.methods.averages import weighted_sum
from weft.methods.params import NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.step import At, Pipeline, step

Normalize = Literal["model", "none"]
Favor = Literal["all", "first"]


def normalised(f: Tensor, norm: Tensor | None, normalize: Normalize) -> Tensor:
    """F / ‖F‖, f: [k, …], norm: [k]; zero stays zero."""
    if normalize == "none" or norm is None:
        return f
    scale = norm.to(f).reshape(-1, *[1] * (f.dim() - 1))
    return f / torch.where(scale > 0, scale, 1.0)


def weighted_mean(x: Tensor, f: Tensor, weight: Weight, prior: Tensor | float = 0.0) -> Tensor:
    """Σ λᵢfᵢxᵢ / (Σ λᵢfᵢ + prior), and Σ λᵢxᵢ / Σ λᵢ where the denominator is zero. x, f: [k, *shape]."""
    w = per_model(weight, x.shape[0])
    above, below = x[0] * (f[0] * w[0]), f[0] * w[0] + prior
    for xi, fi, wi in zip(x[1:], f[1:], w[1:], strict=True):
        above = above + xi * (fi * wi)
        below = below + fi * wi
    out = above / torch.where(below != 0, below, 1.0)
    if bool((below == 0).any()):
        out = torch.where(below != 0, out, weighted_sum.fn(x, weight=weight, normalize=True))
    return out


@step(needs=("fisher", "fisher_norm", "base_fisher?", "base_fisher_norm?"), reduces=True)
def fisher_mean(
    x: Tensor,
    *,
    fisher: Tensor | None,
    fisher_norm: Tensor | None,
    base_fisher: Tensor | None,
    base_fisher_norm: Tensor | None,
    weight: Weight = 1.0,
    normalize: Normalize = "model",
    floor: NonNegative = 1e-6,
    favor: Favor = "all",
    prior: NonNegative = 0.0,
) -> Tensor:
    """Σ λᵢFᵢxᵢ / Σ λᵢFᵢ, x: [k, *shape] → [*shape]. With a base, x are task vectors, and the base's is zero."""
    if fisher is None:
        return weighted_sum.fn(x, weight=weight, normalize=True)
    f = normalised(fisher.to(x), fisher_norm, normalize)
    first = f[:1].clamp(min=floor)
    f = f.clamp(min=floor) if favor == "all" else torch.cat([first, f[1:]])
    if not prior:
        return weighted_mean(x, f, weight)
    own = torch.zeros_like(x[0]) if base_fisher is None else base_fisher.to(x)
    norm = None if base_fisher_norm is None else base_fisher_norm.reshape(1)
    return weighted_mean(x, f, weight, prior * normalised(own[None], norm, normalize)[0].clamp(min=floor))


@step(needs=("node", "node_norm"), reduces=True)
def node_mean(
    x: Tensor,
    *,
    node: Tensor | None,
    node_norm: Tensor | None,
    at: At,
    weight: Weight = 1.0,
    normalize: Normalize = "none",
) -> Tensor:
    """Σ λᵢFᵢxᵢ / Σ λᵢFᵢ with one F for every unit, rows (columns where transposed). node: [k, units]."""
    if node is None:
        return weighted_sum.fn(x, weight=weight, normalize=True)
    n = x[0].numel()
    unit = torch.arange(at.start, at.start + n, device=x.device)
    if at.transposed and len(at.shape) > 1:
        unit = unit % at.shape[-1] // (at.shape[-1] // node.shape[1])
    else:
        unit = unit // max(1, at.numel // node.shape[1])
    f = normalised(node.to(x), node_norm, normalize)[:, unit]
    return weighted_mean(x, f.reshape(x.shape), weight)


@method(
    space="weights",
    base="optional",
    paper="Matena & Raffel, Merging models with Fisher-weighted averaging, arXiv:2111.09832",
    needs=("fisher", "fisher_norm", "base_fisher?", "base_fisher_norm?"),
)
def fisher(
    *,
    weight: Weight = 1.0,
    normalize: Normalize = "model",
    floor: NonNegative = 1e-6,
    favor: Favor = "all",
    prior: NonNegative = 0.0,
) -> Pipeline:
    """Average each parameter with the models' Fisher information as weights.

    Needs `weft measure --what fisher` of every model. The authors choose `weight` on validation data.
    """
    return fisher_mean(weight=weight, normalize=normalize, floor=floor, favor=favor, prior=prior)


@method(
    space="weights",
    base="optional",
    paper="Thennal et al., Fisher mask nodes for language model merging, arXiv:2403.09891",
    needs=("node", "node_norm"),
)
def fisher_nodes(*, weight: Weight = 1.0, normalize: Normalize = "none") -> Pipeline:
    """Average each unit with the Fisher information of its mask as weight.

    Needs `weft measure --what node` of every model. Every output of a layer is a unit (attention heads by `units`);
    the paper masks the neurons of feed-forward layers and heads only, behind their activation.
    """
    return node_mean(weight=weight, normalize=normalize)
