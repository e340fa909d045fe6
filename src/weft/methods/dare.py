"""DARE: drop entries at random, rescale the rest. Yu et al. 2024, arXiv:2311.03099.

    mᵢ ~ Bernoulli(p)           p: density, the fraction kept (the paper's drop rate is 1 − p)
    τ̂ᵢ = mᵢ ⊙ τᵢ / p            so that E[τ̂ᵢ] = τᵢ
    θ  = θ0 + λ Σ wᵢτ̂ᵢ          or the TIES election over τ̂ᵢ (dare_ties)

Only the draw is random, and it depends on (seed, model, tensor name, position) alone: see random.py.
MergeKit doesn't divide by p: it restores the L1 norm of each tensor (`rescale="l1"`), which differs from
the paper by the luck of the draw, most on small tensors. No single density is the paper's (drop rates of
0.1 to 0.99); 0.5 is FusionBench's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.params import Density, Weight, per_model
from weft.methods.random import threshold, uniform_bits
from weft.methods.registry import method
from weft.methods.stats import Sums, T, namespace
from weft.methods.step import At, Pipeline, anything_goes, step
from weft.methods.ties import Elect, Tie, column, disjoint_mean, elect_sign

Rescale = Literal["inverse", "l1", "none"]
"""What makes up for the dropped entries: division by the density, the tensor's L1 norm restored, nothing."""


def keep_mask(x: Tensor, density: Density, at: At) -> Tensor:
    """Which entries survive, x: [k, *range] → bool, same shape."""
    n, shape = x[0].numel(), x.shape[1:]
    kept = [
        (uniform_bits(at, i, n, x.device) < threshold(p)).reshape(shape)
        for i, p in enumerate(per_model(density, x.shape[0], "density"))
    ]
    return torch.stack(kept)


@step(refuses=anything_goes)
def drop(x: Tensor, *, at: At, density: Density = 0.5, rescale: bool = True) -> Tensor:
    """Keep each entry with probability p, divided by p when `rescale`; zero the rest."""
    kept = torch.where(keep_mask(x, density, at), x, 0.0)
    if not rescale:
        return kept
    p = torch.tensor(per_model(density, x.shape[0], "density"), dtype=x.dtype)
    return kept / column(torch.where(p > 0, p, 1.0), x)


def _masses(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    kept = torch.where(keep_mask(x, params["density"], at), x, 0.0)
    return torch.cat([x.abs(), kept.abs()])  # [2k, n]


def ratios(masses: T) -> T:
    """What makes up for the lost mass, masses: [2k] = L1 norms before, after → [k]."""
    xp = namespace(masses)
    before, after = masses.reshape(2, -1)
    made: T = xp.where(after > 0, before / xp.where(after > 0, after, 1.0), 1.0)
    return made


def restore(kept: Tensor, masses: Tensor) -> Tensor:
    """Scale each tensor so that its L1 norm is what it was."""
    return kept * column(ratios(masses).to(kept.dtype), kept)


@step(stat=Sums("masses", _masses), refuses=anything_goes)
def drop_keep_l1(x: Tensor, *, at: At, masses: Tensor, density: Density = 0.5) -> Tensor:
    """Keep each entry with probability p, then restore each tensor's L1 norm."""
    return restore(torch.where(keep_mask(x, density, at), x, 0.0), masses)


def dropped(density: Density, rescale: Rescale) -> Pipeline:
    """The dropping step for a way of rescaling; only "l1" costs a pass over the data."""
    if rescale == "l1":
        return drop_keep_l1(density=density)
    return drop(density=density, rescale=rescale == "inverse")


@method(
    space="deltas",
    paper="Yu et al., DARE, arXiv:2311.03099",
    aliases=("dare_linear",),
    compat={"mergekit": {"density": 1.0, "rescale": "l1"}},
)
def dare(
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    rescale: Rescale = "inverse",
    normalize: bool = False,
    scale: float = 1.0,
) -> Pipeline:
    """Drop entries at random, rescale the rest, add up."""
    return dropped(density, rescale) | weighted_sum(weight=weight, normalize=normalize) | scaled(scale=scale)


@method(
    space="deltas",
    paper="Yu et al., DARE, arXiv:2311.03099",
    compat={"mergekit": {"density": 1.0, "rescale": "l1", "tie": "plus", "normalize": False}},
)
def dare_ties(
    *,
    weight: Weight = 1.0,
    density: Density = 0.5,
    rescale: Rescale = "inverse",
    elect: Elect = "mass",
    tie: Tie = "none",
    normalize: bool = True,
    scale: float = 1.0,
) -> Pipeline:
    """Drop entries at random, rescale the rest, then elect signs and average as TIES does."""
    return (
        dropped(density, rescale)
        | elect_sign(weight=weight, elect=elect, tie=tie)
        | disjoint_mean(weight=weight, normalize=normalize)
        | scaled(scale=scale)
    )
