"""Rows for tokens that a model does not know, from another model's embedding and the tokens both know.

A way is a function of an `Unknown`: it gives either which of the model's rows to combine and how (`Terms`), or
the rows themselves `[n, width]`. All of them leave the known tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from weft.checkpoints.rowmap import Floats, Ints
from weft.llm.tokens.omp import omp
from weft.methods.random import uniform_bits
from weft.methods.step import At


@dataclass(frozen=True)
class Unknown:
    """One table of a transplant: what is known, and what is to be found."""

    name: str
    theirs: Tensor
    """`[rows, d]`: the donor's table."""
    ours: Tensor
    """`[rows, width]`: the model's."""
    wanted: Ints
    """`[n]`: rows of `theirs` to find rows for."""
    shared: Ints
    """`[2, m]`: rows of `theirs` and of `ours` that mean the same token."""
    pieces: list[list[int]] = field(default_factory=list)
    """For each of `wanted`: rows of `ours` of the pieces that the model would write it in."""
    k: int = 64
    seed: int = 0

    @property
    def targets(self) -> Tensor:
        return self.theirs[torch.from_numpy(self.wanted)]

    @property
    def landmarks(self) -> Tensor:
        """The donor's rows of the tokens that both know."""
        return self.theirs[torch.from_numpy(self.shared[0])]


@dataclass(frozen=True)
class Terms:
    """Combinations of the model's rows: the term t adds `coefficient[t]` · `ours[row[t]]` to the row `out[t]`."""

    out: Ints
    row: Ints
    coefficient: Floats
    error: float | None = None
    """Mean relative error with which the same combination of the donor's rows gives the donor's row."""


def by_omp(u: Unknown) -> Terms:
    """Orthogonal matching pursuit (arXiv:2506.06607): e_donor(t) ≈ Σ_j c_j e_donor(j) over at most k shared tokens
    j gives e(t) = Σ_j c_j e(j)."""
    found = omp(u.targets, u.landmarks, u.k)
    return _terms(found.index, found.coefficient, u, float(found.error.mean()) if len(found.error) else 0.0)


def by_neighbours(u: Unknown) -> Terms:
    """Mean of the k shared tokens nearest in the donor's space, each weighted by 1/distance."""
    atoms = u.landmarks
    parts = [
        torch.cdist(b, atoms).topk(min(u.k, len(atoms)), largest=False) for b in torch.split(u.targets, 1024)
    ]
    if not parts:
        return Terms(*_none())
    distance, index = torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
    # a token at no distance is the only one that counts
    weight = 1 / distance.double().clamp(min=1e-12)
    return _terms(index, weight / weight.sum(dim=1, keepdim=True), u)


def by_pieces(u: Unknown) -> Terms:
    """Mean of the pieces in which the model's own vocabulary writes the token's bytes."""
    out = np.repeat(np.arange(len(u.pieces)), [len(p) for p in u.pieces])
    row = np.array([r for p in u.pieces for r in p], np.int64)
    counts = np.array([len(p) for p in u.pieces], np.float64)
    return Terms(out, row, 1 / counts[out])


def by_zero(u: Unknown) -> Terms:
    """Zero."""
    return Terms(*_none())


def by_random(u: Unknown) -> Tensor:
    """μ + σ·z with the mean and deviation of every column of the model's table; z from a counter."""
    known = u.ours.double()
    drawn: Tensor = known.mean(0) + known.std(0) * _normal(u, known.shape[1])
    return drawn


def by_gaussian(u: Unknown) -> Tensor:
    """A draw from the normal distribution fitted to the model's rows, N(μ, Σ) (Hewitt, 2021)."""
    known = u.ours.double()
    centred = known - known.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / max(1, len(known) - 1))
    root = vectors * values.clamp(min=0).sqrt()
    drawn: Tensor = known.mean(0) + _normal(u, known.shape[1]) @ root.T
    return drawn


def by_procrustes(u: Unknown) -> Tensor:
    """The donor's space turned onto the model's: μ' + s·(b − μ) W.

    W is the semi-orthogonal map and s the scale that bring the shared tokens (rows of D and M, less their
    means μ and μ') nearest to each other: UΣVᵀ = DᵀM, W = UVᵀ, s = tr Σ / ‖D W‖².
    """
    theirs, ours = u.landmarks.double(), u.ours[torch.from_numpy(u.shared[1])].double()
    d, m = theirs - theirs.mean(0), ours - ours.mean(0)
    left, sigma, right = torch.linalg.svd(d.T @ m, full_matrices=False)
    w = left @ right
    scale = sigma.sum() / (d @ w).square().sum().clamp(min=torch.finfo(torch.float64).tiny)
    turned: Tensor = ours.mean(0) + scale * ((u.targets.double() - theirs.mean(0)) @ w)
    return turned


WAYS: dict[str, Callable[[Unknown], Terms | Tensor]] = {
    "omp": by_omp, "neighbours": by_neighbours, "pieces": by_pieces, "zero": by_zero, "random": by_random,
    "gaussian": by_gaussian, "procrustes": by_procrustes,
}  # fmt: skip
"""By name; besides these there is `mean`, which needs no table."""
NEED_SHARED = {"omp", "neighbours", "procrustes", "mean"}
NEED_DONOR = {"omp", "neighbours", "procrustes"}


def _terms(index: Tensor, coefficient: Tensor, u: Unknown, error: float | None = None) -> Terms:
    """Columns of atoms as rows of the model, without those unused."""
    used = index.numpy() >= 0
    out = np.nonzero(used)[0].astype(np.int64)
    return Terms(out, u.shared[1][index.numpy()[used]], coefficient.double().numpy()[used], error)


def _none() -> tuple[Ints, Ints, Floats]:
    return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)


def _normal(u: Unknown, width: int) -> Tensor:
    """`[n, width]` standard normal, by Box and Muller from two streams of the counter, the same for a seed."""
    n = len(u.wanted) * width
    at = At(u.name, (len(u.wanted), width), 0, u.seed)
    one, two = ((uniform_bits(at, stream, n).double() + 0.5) / 2**32 for stream in (0, 1))
    return ((-2 * one.log()).sqrt() * (2 * torch.pi * two).cos()).reshape(len(u.wanted), width)
