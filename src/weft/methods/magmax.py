"""MagMax: of every parameter the largest change. Marczak et al. 2024, arXiv:2407.06322.

    τ[j] = τ_m[j],  m = argmaxᵢ |τᵢ[j]|            θ = θ0 + λτ,  λ = 0.5

Made for models fine-tuned one after the other, each τᵢ taken from θ0 and not from the model before it. The
later of equally large changes wins. Nothing is pruned.
"""

from __future__ import annotations

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.registry import method
from weft.methods.step import Pipeline, step


@step(reduces=True)
def largest(x: Tensor) -> Tensor:
    """The entry of largest magnitude over the models, x: [k, *shape] → [*shape]."""
    out = x[0]
    for xi in x[1:]:
        out = torch.where(xi.abs() >= out.abs(), xi, out)
    return out


@method(space="deltas", paper="Marczak et al., MagMax, arXiv:2407.06322")
def magmax(*, scale: float = 0.5) -> Pipeline:
    """Take every parameter's largest change."""
    return largest() | scaled(scale=scale)
