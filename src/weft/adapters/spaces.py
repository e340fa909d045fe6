"""Bases in which several low-rank updates of a weight may be merged: KnOTS's, Core Space's.

Sign elections, trims and masks act on coordinates, so it matters in which basis the coordinates are. The two
bases here are common to all updates and hold every one of them exactly, so that nothing is lost but by the
merging method itself; any method of weft for task vectors can run in them.

KnOTS (Stoica et al., ICLR 2025, arXiv:2410.19735): the SVD of the updates side by side,

    [ΔW₁ … ΔW_k] = U [ΣV₁ᵀ … ΣV_kᵀ],     coordinates ΣVᵢᵀ: [p, in],     lift M ↦ U M

Here without a dense matrix: with B = Q[L₁ … L_k] and Aᵢᵀ = PᵢTᵢ, the SVD of the small [L₁T₁ᵀ … L_kT_kᵀ] gives
U = Q u and ΣVᵢᵀ = (σvᵀ)ᵢ Pᵢᵀ.

Core Space (Panariello et al., NeurIPS 2025, arXiv:2509.17786): the left singular basis U of [B₁ … B_k], the
right one V of the Aᵢ below one another,

    Mᵢ = UᵀBᵢAᵢV: [p, q],     lift M ↦ U M Vᵀ
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters.factors import Factors
from weft.adapters.lowrank import same_weight
from weft.methods.registry import METHODS
from weft.methods.step import At

Space = Literal["knots", "core_space"]


@dataclass(frozen=True, slots=True)
class Coordinates:
    """k updates as coordinates in one basis, and the way back."""

    values: Tensor
    """[k, m, n]"""
    lift: Callable[[Tensor], Factors]
    """Merged coordinates [m, n] → factors."""


def knots_basis(factors: Sequence[Factors]) -> Coordinates:
    """ΣVᵢᵀ of every update, [k, p, in] with p = min(out, Σ rᵢ). Directions of no energy have coordinates 0."""
    shape, transposed = same_weight(factors)
    ranks = [f.rank for f in factors]
    q, left = torch.linalg.qr(torch.cat([f.b for f in factors], 1))  # [out, p], [p, R]
    sides = [torch.linalg.qr(f.a.T) for f in factors]  # [in, rᵢ], [rᵢ, rᵢ]
    small = torch.cat([b @ t.T for b, (_, t) in zip(left.split(ranks, 1), sides)], 1)  # [p, R]
    u, s, vh = torch.linalg.svd(small, full_matrices=False)
    widths = [t.shape[0] for _, t in sides]
    values = [v @ p.T for v, (p, _) in zip((s[:, None] * vh).split(widths, 1), sides)]
    basis = q @ u
    return Coordinates(torch.stack(values), lambda merged: Factors(basis, merged, shape, transposed))


def core_basis(factors: Sequence[Factors]) -> Coordinates:
    """UᵀΔWᵢV of every update, [k, p, q] with p = min(out, Σ rᵢ), q = min(in, Σ rᵢ)."""
    shape, transposed = same_weight(factors)
    u = torch.linalg.svd(torch.cat([f.b for f in factors], 1), full_matrices=False).U
    vh = torch.linalg.svd(torch.cat([f.a for f in factors]), full_matrices=False).Vh
    values = torch.stack([(u.T @ f.b) @ (f.a @ vh.T) for f in factors])
    return Coordinates(values, lambda merged: Factors(u, merged @ vh, shape, transposed))


BASES: dict[Space, Callable[[Sequence[Factors]], Coordinates]] = {
    "knots": knots_basis, "core_space": core_basis,
}  # fmt: skip


def coordinate_shape(space: Space, out: int, into: int, ranks: Sequence[int]) -> tuple[int, int]:
    """Shape of one update's coordinates, from ranks alone."""
    total = sum(ranks)
    return min(out, total), (into if space == "knots" else min(into, total))


def _in_basis(
    space: Space, factors: Sequence[Factors], weights: Sequence[float], method: str, at: At, params: Any
) -> Factors:
    made = BASES[space](factors)
    return made.lift(METHODS[method](made.values, at=at, weight=list(weights), **params))


def knots(
    factors: Sequence[Factors], weights: Sequence[float], *, method: str = "ties", name: str = "",
    seed: int = 0, **params: Any,
) -> Factors:  # fmt: skip
    """One weight merged by `method` in KnOTS's basis. Masks see this weight alone; rank min(out, Σ rᵢ)."""
    return _in_basis("knots", factors, weights, method, At(name, seed=seed), params)


def core_space(
    factors: Sequence[Factors], weights: Sequence[float], *, method: str = "ties", name: str = "",
    seed: int = 0, **params: Any,
) -> Factors:  # fmt: skip
    """One weight merged by `method` in Core Space. Masks see this weight alone; rank min(out, Σ rᵢ)."""
    return _in_basis("core_space", factors, weights, method, At(name, seed=seed), params)
