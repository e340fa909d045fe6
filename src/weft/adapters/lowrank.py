"""Exact algebra of low-rank updates: sums, spectra, truncations and overlaps, without a dense matrix.

Stack the factors of k updates ΔWᵢ = BᵢAᵢ (R = Σ rᵢ), and take two thin QR decompositions:

    [B₁ … B_k] = Q [L₁ … L_k]        Q: [out, p], p = min(out, R)
    [A₁ᵀ … A_kᵀ] = P [R₁ᵀ … R_kᵀ]    P: [in, q],  q = min(in, R)
    ΔWᵢ = Q Mᵢ Pᵀ,  Mᵢ = LᵢRᵢ        the core, [p, q]

Q and P are orthonormal, so Σ wᵢΔWᵢ has the singular values of the small matrix Σ wᵢMᵢ, and what a truncation
loses is the tail of them: the error is known exactly. Everything is float64 and costs O((out + in) R²).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.adapters.factors import Factors
from weft.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Cores:
    """k updates of one weight in one pair of orthonormal bases: ΔWᵢ = Q (LᵢRᵢ) Pᵀ."""

    q: Tensor
    """[out, p]"""
    p: Tensor
    """[in, q]"""
    left: tuple[Tensor, ...]
    """Lᵢ = QᵀBᵢ, [p, rᵢ]"""
    right: tuple[Tensor, ...]
    """Rᵢ = AᵢP, [rᵢ, q]"""
    shape: tuple[int, ...]
    transposed: bool

    def core(self, i: int) -> Tensor:
        """Mᵢ, [p, q]."""
        return self.left[i] @ self.right[i]

    def total(self, weights: Sequence[float]) -> Tensor:
        """Σ wᵢMᵢ, [p, q]."""
        return torch.cat([w * b for w, b in zip(weights, self.left)], 1) @ torch.cat(self.right)

    def truncated(
        self, weights: Sequence[float], *, rank: int | None = None, energy: float | None = None
    ) -> Truncated:
        """The best approximation of Σ wᵢΔWᵢ; see the function `truncated`."""
        u, s, vh = torch.linalg.svd(self.total(weights), full_matrices=False)
        # what is below the rounding of the terms is nothing: opposite adapters add up to zero
        terms = sum(abs(w) * float(m.norm() * n.norm()) for w, m, n in zip(weights, self.left, self.right))
        s = torch.where(s > terms * max(self.p.shape[1], 1) * torch.finfo(s.dtype).eps, s, 0.0)
        r = kept_rank(s, rank=rank, energy=energy)
        root = s[:r].sqrt()
        b, a = self.q @ (u[:, :r] * root), (root[:, None] * vh[:r]) @ self.p.T
        return Truncated(Factors(b, a, self.shape, self.transposed), s)


@dataclass(frozen=True, slots=True)
class Truncated:
    """The best approximation of an update at a rank, and what it lost."""

    factors: Factors
    spectrum: Tensor
    """All singular values of the whole update, falling; [min(p, q)]."""

    @property
    def energy(self) -> float:
        """Share of ‖ΔW‖² that was kept; 1 for an update of zeros."""
        return 1.0 - self.error**2

    @property
    def error(self) -> float:
        """‖ΔW − BA‖ / ‖ΔW‖ in Frobenius norm, exactly: the tail of the spectrum over all of it."""
        whole = float(self.spectrum.norm())
        return float(self.spectrum[self.factors.rank :].norm()) / whole if whole else 0.0


def same_weight(factors: Sequence[Factors]) -> tuple[tuple[int, ...], bool]:
    """(shape, transposed) that all updates share. UsageError where they are not of one weight."""
    if not factors:
        raise UsageError("there are no updates to merge")
    kinds = {(f.b.shape[0], f.a.shape[1], f.shape, f.transposed) for f in factors}
    if len(kinds) > 1:
        shown = sorted({str(list(f.shape)) + (" transposed" if f.transposed else "") for f in factors})
        raise UsageError(f"updates of one weight must have one shape, got {', '.join(shown)}")
    return factors[0].shape, factors[0].transposed


def cores(factors: Sequence[Factors]) -> Cores:
    """The updates of one weight in a pair of bases common to all. Ranks may differ and may be 0."""
    shape, transposed = same_weight(factors)
    ranks = [f.rank for f in factors]
    q, left = torch.linalg.qr(torch.cat([f.b for f in factors], 1))  # [out, p], [p, R]
    p, right = torch.linalg.qr(torch.cat([f.a for f in factors]).T)  # [in, q], [q, R]
    return Cores(q, p, left.split(ranks, 1), right.T.split(ranks), shape, transposed)


def concat(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Σ wᵢΔWᵢ exactly, at rank Σ rᵢ: B = [w₁B₁ … w_kB_k], A = the Aᵢ below one another."""
    shape, transposed = same_weight(factors)
    b = torch.cat([w * f.b for w, f in zip(weights, factors, strict=True)], 1)
    return Factors(b, torch.cat([f.a for f in factors]), shape, transposed)


def truncated(factors: Sequence[Factors], weights: Sequence[float] | None = None, *, rank: int | None = None,
              energy: float | None = None) -> Truncated:  # fmt: skip
    """The best approximation of Σ wᵢΔWᵢ (Eckart–Young) at a rank, or at the least that keeps an energy.

    `energy` is a share of ‖ΔW‖² in (0, 1]; with both, `rank` is the most that it may take. The singular
    values are shared evenly: B = Q U √S, A = √S Vᵀ Pᵀ. Never less than one rank, which may be zeros.
    """
    return cores(factors).truncated(weights or [1.0] * len(factors), rank=rank, energy=energy)


def kept_rank(spectrum: Tensor, *, rank: int | None = None, energy: float | None = None) -> int:
    """How many of the (falling) singular values to keep; one at least, all of them by default."""
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, not {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy is a share of the squared norm in (0, 1], not {energy}")
    r = len(spectrum) if rank is None else min(rank, len(spectrum))
    if energy is not None:
        mass = spectrum.square()
        tail = mass.flip(0).cumsum(0).flip(0)  # tail[r]: what is lost at rank r, summed from the small end
        allowed = (1 - energy) * float(mass.sum())
        r = min(r, int((tail > allowed).sum()))
    return max(r, 1)


def norm(factors: Factors) -> float:
    """‖BA‖ in Frobenius norm, from the two r×r Gram matrices."""
    return float(((factors.b.T @ factors.b) * (factors.a @ factors.a.T)).sum().clamp_min(0).sqrt())


def difference(a: Factors, b: Factors) -> float:
    """‖ΔW_a − ΔW_b‖ / ‖ΔW_b‖ in Frobenius norm (the norm of the difference where ΔW_b is zero)."""
    made = cores([a, b])
    lost, whole = float(made.total([1.0, -1.0]).norm()), float(made.core(1).norm())
    return lost / whole if whole else lost


def angles(factors: Sequence[Factors], i: int, j: int, side: str = "a") -> Tensor:
    """Cosines of the principal angles between the row spaces of Aᵢ and Aⱼ (or column spaces of B), falling.

    [min of the two numerical ranks]; all 1 where one space holds the other, all 0 where they are orthogonal.
    """
    made = cores(factors)
    parts = [m.T for m in made.right] if side == "a" else list(made.left)
    found: Tensor = torch.linalg.svdvals(_basis(parts[i]).T @ _basis(parts[j]))
    return found.clamp(0, 1)


def overlaps(made: Cores) -> Tensor:
    """Mean cos² of the principal angles between the row spaces of every two A, [k, k].

    1 for adapters that started from one random A and hardly moved it, about r/in for independent ones. Where
    it is small, adding A's to A's and B's to B's (`linear`, LoraHub) makes mostly cross-terms.
    """
    bases = [_basis(m.T) for m in made.right]
    found = torch.eye(len(bases), dtype=torch.float64)
    for i, a in enumerate(bases):
        for j, b in enumerate(bases[:i]):
            size = min(a.shape[1], b.shape[1])
            found[i, j] = found[j, i] = (a.T @ b).square().sum() / size if size else 0.0
    return found


def _basis(m: Tensor) -> Tensor:
    """An orthonormal basis of the column space of m, [n, r] → [n, numerical rank]."""
    u, s, _ = torch.linalg.svd(m, full_matrices=False)
    floor = s[:1].sum() * max(m.shape) * torch.finfo(m.dtype).eps
    basis: Tensor = u[:, s > floor]
    return basis


def finite(factors: Factors, name: str, origin: str) -> Factors:
    """The factors themselves; DataError where one holds NaN or infinity."""
    if not (torch.isfinite(factors.a).all() and torch.isfinite(factors.b).all()):
        raise DataError(
            f"{origin}: the update of {name!r} has NaN or infinite values, which would spread through the "
            f"merge: mend that adapter or leave it out"
        )
    return factors
