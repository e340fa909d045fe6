"""Orthogonal matching pursuit, many targets at once (arXiv:2506.06607 uses it for vocabularies).

For each target b, k times: take the atom of largest |⟨r, a⟩| for the residual r, and project b on the span of
all taken so far. An orthonormal basis Q of the span is kept (Gram–Schmidt, twice for precision), so that a step
costs one product with all atoms; the coefficients come from R c = Qᵀ b at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WORKING = 1 << 28
"""Bytes of one batch of targets."""


@dataclass(frozen=True)
class Sparse:
    """Σ_j coefficient[i, j] · atom[index[i, j]] for each target i."""

    index: Tensor
    """`[n, k]` int64; −1 where a target needed fewer atoms."""
    coefficient: Tensor
    """`[n, k]`, zero there."""
    error: Tensor
    """`[n]`: ‖residual‖ / ‖target‖."""


def omp(targets: Tensor, atoms: Tensor, k: int, tolerance: float = 1e-6) -> Sparse:
    """Approximate each row of `targets` `[n, d]` by at most k rows of `atoms` `[m, d]`.

    A target is done when its residual is below `tolerance` of its length, or no atom is left that is not in the
    span. Computed in the dtype and on the device of `atoms`; of equal atoms the first is taken.
    """
    n, d = targets.shape
    k = min(k, len(atoms), d)
    batch = max(1, WORKING // (atoms.element_size() * (k * d + 2 * len(atoms) + 4 * d)))
    parts = [_batch(targets[i : i + batch].to(atoms), atoms, k, tolerance) for i in range(0, n, batch)]
    if not parts:
        parts = [_batch(targets.to(atoms), atoms, k, tolerance)]
    return Sparse(*(torch.cat([p[j] for p in parts]).cpu() for j in range(3)))


def _batch(b: Tensor, atoms: Tensor, k: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    n, d = b.shape
    q, r = b.new_zeros(n, k, d), b.new_zeros(n, k, k)
    y, index = b.new_zeros(n, k), torch.full((n, k), -1, dtype=torch.int64, device=b.device)
    residual, length = b.clone(), b.norm(dim=1)
    alive = length > 0
    lengths = atoms.norm(dim=1)
    for j in range(k):
        alive = alive & (residual.norm(dim=1) > tolerance * length)
        if not alive.any():
            break
        match = (residual @ atoms.T).abs_()
        if j:
            match.scatter_(1, index[:, :j].clamp(min=0), -1.0)
        best = match.argmax(dim=1)
        v = atoms[best]
        for _ in range(2):
            h = torch.einsum("nkd,nd->nk", q[:, :j], v)
            v = v - torch.einsum("nk,nkd->nd", h, q[:, :j])
            r[:, :j, j] += h
        norm = v.norm(dim=1)
        # an atom in the span of those taken has nothing to add, and no other matches the residual better
        alive = alive & (norm > 1e3 * torch.finfo(b.dtype).eps * lengths[best])
        v = torch.where(alive[:, None], v / norm.clamp(min=torch.finfo(b.dtype).tiny)[:, None], 0)
        q[:, j], r[:, j, j] = v, norm
        y[:, j] = (v * residual).sum(dim=1)
        residual = residual - y[:, j, None] * v
        index[:, j] = torch.where(alive, best, -1)
    unused = index < 0
    r = torch.where(unused[:, None, :], 0, r) + torch.diag_embed(unused.to(r))
    c = torch.linalg.solve_triangular(r, y[:, :, None], upper=True)[:, :, 0]
    error = residual.norm(dim=1) / length.clamp(min=torch.finfo(b.dtype).tiny)
    return index, torch.where(unused, 0, c), error
