"""Merge in a basis that all tasks share: KnOTS, Core Space, on dense task vectors.

    [τ₁ … τ_T] = U diag(s) [V₁ … V_T]ᵀ          side by side: [m, T n];  V likewise of them below one another
    KnOTS        θ = θ0 + λ U merge(Uᵀτ₁, …, Uᵀτ_T),  Uᵀτᵢ = diag(s) Vᵢᵀ            arXiv:2410.19735
    Core Space   θ = θ0 + λ U merge(Uᵀτ₁V, …, Uᵀτ_TV) Vᵀ                           arXiv:2509.17786

Signs elected and entries trimmed in such coordinates mean the same direction for every task, which those of the
weights themselves need not. Nothing is lost but by the inner method. U and V are those of the numerical rank, from
the small Gram matrix Σ τᵢτᵢᵀ and not the wide one. Core Space is defined on adapters' factors, whose bases depend
on how each update is split into B and A; here they do not. Adapters are merged this way without a dense matrix by
weft.adapters (its ways "knots", "core_space"). Vectors are merged as they are.
"""

from __future__ import annotations

from typing import Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.factors import decompose, largest, unit_scale
from weft.methods.params import Density, Weight
from weft.methods.registry import METHODS, method
from weft.methods.spectral import is_spectral, matrixwise
from weft.methods.step import At, Pipeline, step

Within = Literal["ties", "task_arithmetic", "dare", "dare_ties", "tsv", "iso_c"]
Sides = Literal["left", "both"]


def joint_basis(tasks: list[Tensor]) -> Tensor:
    """Left singular vectors of [τ₁ … τ_T] at its numerical rank; τᵢ [m, n] → [m, r]."""
    wide = torch.cat(tasks, 1)
    return decompose(wide * unit_scale(largest(wide))).u


@step(grain="tensor", reduces=True)
def in_joint_basis(
    x: Tensor,
    *,
    at: At,
    weight: Weight = 1.0,
    within: Within = "ties",
    density: Density = 0.2,
    sides: Sides = "left",
) -> Tensor:
    """Another method in the singular basis of all task vectors, of rows or of both. x: [k, *shape] → [*shape]."""
    params = {"density": density} if "density" in METHODS[within].params else {}
    inner = METHODS[within].pipeline(weight=weight, **params)
    if not is_spectral(at, "spectral"):
        return inner(x, at=at)

    def merged(tasks: list[Tensor]) -> Tensor:
        tasks = [t.double() for t in tasks]
        u = joint_basis(tasks)
        if not u.shape[1]:
            return tasks[0] * 0
        coordinates = [u.T @ t for t in tasks]
        if sides == "left":
            return u @ inner(torch.stack(coordinates), at=at)
        v = joint_basis([c.T for c in coordinates])
        return u @ inner(torch.stack([c @ v for c in coordinates]), at=at) @ v.T

    return matrixwise(x, at, merged)


@method(space="deltas", paper="Stoica et al., KnOTS, arXiv:2410.19735")
def knots(
    *, weight: Weight = 1.0, within: Within = "ties", density: Density = 0.2, scale: float = 1.0
) -> Pipeline:
    """Merge by TIES (or another method) in the singular basis common to all task vectors.

    `density` is the share of coordinates that is kept, by magnitude or, for DARE, at random.
    """
    return in_joint_basis(weight=weight, within=within, density=density) | scaled(scale=scale)


@method(space="deltas", paper="Panariello et al., Core Space Merging, arXiv:2509.17786")
def core_space(
    *, weight: Weight = 1.0, within: Within = "ties", density: Density = 0.2, scale: float = 1.0
) -> Pipeline:
    """Merge by TIES (or another method) in the row and column spaces common to all task vectors.

    Where the experts are adapters underneath, the coordinates are small and dense; full-rank ones fill the matrix.
    """
    merged = in_joint_basis(weight=weight, within=within, density=density, sides="both")
    return merged | scaled(scale=scale)
