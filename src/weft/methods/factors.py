"""Singular triplets and polar factors of task vectors: exact, at the numerical rank, and no slower than need be.

    t ≈ U diag(s) Vᵀ                 `decompose`: the leading triplets, none below tol · s₁
    polar(C) = P Qᵀ, C = P S Qᵀ      `polar`: the nearest partial isometry, over the singular values above tol · s₁

Null vectors of a matrix are arbitrary, so none ever takes part: that is what makes experts of low rank, untouched,
identical and opposite ones come out right. Everything is float64, since both work on Gram matrices, which square
the spectrum. Routes, all to the same answer:

- low rank, as adapters leave it: a random range finder with one power iteration (Halko, Martinsson & Tropp,
  arXiv:0909.4061), accepted only where what it leaves has a spectral norm below tol · s₁; O(mnl) for a sketch of l;
- a quarter of the spectrum or less: eigenvectors of the Gram matrix in float32, then one float64 iteration and
  Rayleigh–Ritz step on a subspace half as large again, accepted by its residual;
- else eigenvectors of the Gram matrix in float64, unless a triplet below 1e-4 · s₁ is wanted, or the matrix is
  small: then LAPACK's SVD itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import frexp

from weft.late import Tensor, torch
from weft.methods.random import uniform_bits
from weft.methods.step import At

RANK_TOL = 1e-5
"""A singular value below this share of the largest is rounding (float32 weights leave about 1e-6)."""
POLAR_TOL = 1e-6
"""Directions of a stack of unit vectors that are shorter than this share of the longest are no directions."""
SMALL = 96
"""The shorter side up to which an SVD is as quick as anything else."""
_PRECISE = 1e-4
"""A Gram matrix gives a triplet to eps · (s₁/s)², so 1e-8 here."""
_SKETCH, _SPARE = 48, 8


@dataclass(frozen=True, slots=True)
class Triplets:
    """U diag(s) Vᵀ, singular values falling; orthonormal columns."""

    u: Tensor
    """[m, r]"""
    s: Tensor
    """[r]"""
    v: Tensor
    """[n, r]"""

    @property
    def rank(self) -> int:
        return int(self.s.shape[0])

    def first(self, rank: int) -> Triplets:
        """The leading `rank` of them (all, if there are no more)."""
        return Triplets(self.u[:, :rank], self.s[:rank], self.v[:, :rank])

    def dense(self) -> Tensor:
        """[m, n]"""
        return (self.u * self.s) @ self.v.T

    @property
    def turned(self) -> Triplets:
        """Those of the transpose."""
        return Triplets(self.v, self.s, self.u)


def largest(x: Tensor) -> float:
    """max |x|; 0 for an empty tensor."""
    if not x.numel():
        return 0.0
    low, high = x.detach().aminmax()
    return float(torch.maximum(-low, high))


def unit_scale(size: float) -> float:
    """A power of two c with c · size in [½, 1): multiplying by it rounds nothing. 1 for 0."""
    return 2.0 ** max(-frexp(size)[1], -1000) if size else 1.0


def decompose(t: Tensor, most: int | None = None, tol: float = RANK_TOL) -> Triplets:
    """The leading singular triplets of t [m, n], at most `most`, none below tol · s₁. No gradient.

    A matrix of zeros has none. The values should lie near 1 (see `unit_scale`): they are squared.
    """
    t = t.detach().double()
    m, n = t.shape
    if m > n:
        return decompose(t.T, most, tol).turned
    limit = m if most is None else min(most, m)
    if limit == 0 or not t.any():
        return Triplets(t[:, :0], t.new_zeros(0), t[:0].T)
    if m <= SMALL:
        return _by_svd(t, limit, tol)
    found = low_rank(t, tol)
    if found is None:
        found = _by_gram(t, limit, tol)
    return (found if found is not None else _by_svd(t, limit, tol)).first(limit)


def _kept(s: Tensor, limit: int, tol: float) -> int:
    return min(limit, int((s > tol * s[:1]).sum()))


def _by_svd(t: Tensor, limit: int, tol: float) -> Triplets:
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    return Triplets(u, s, vh.T).first(_kept(s, limit, tol))


def _by_gram(t: Tensor, limit: int, tol: float) -> Triplets | None:
    """By the Gram matrix t tᵀ; None where a wanted triplet is too small for it."""
    gram = t @ t.T
    top = _leading(gram, limit) if 4 * limit <= len(gram) else None
    if top is None:
        values, vectors = torch.linalg.eigh(gram)
        top = values.flip(0)[:limit], vectors.flip(1)[:, :limit]
    s, u = top[0].clamp_min(0).sqrt(), top[1]
    # noise of the Gram matrix hides whether what lies below is rounding, so that the SVD must tell
    if limit and float(s[-1]) < _PRECISE * float(s[0]):
        return None
    return Triplets(u, s, (t.T @ u) / s).first(_kept(s, limit, tol))


def _leading(gram: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """Leading eigenvalues and eigenvectors, found in float32 and mended in float64; None if that failed."""
    width = min(len(gram), rank + max(32, rank // 2))
    start = torch.linalg.eigh(gram.float())[1][:, -width:].double()
    basis = torch.linalg.qr(gram @ start)[0]
    image = gram @ basis
    values, turn = torch.linalg.eigh(basis.T @ image)
    values, turn = values.flip(0)[:rank], turn.flip(1)[:, :rank]
    vectors = basis @ turn
    residual = (image @ turn - vectors * values).norm(dim=0)
    return (values, vectors) if bool((residual <= 1e-6 * values[0]).all()) else None


def low_rank(t: Tensor, tol: float = RANK_TOL) -> Triplets | None:
    """All triplets of t [m, n] above tol, where they are at most a quarter of the shorter side (less a few)."""
    m, n = t.shape
    width = _SKETCH
    while 4 * width <= m:
        # a part of a matrix of low rank has low rank: cheap to refute
        part = t[:: max(1, m // (2 * width)), :: max(1, n // (2 * width))].float()
        if _visible(torch.linalg.svdvals(part)) <= width - _SPARE:
            made = _sketched(t, width, tol)
            if made is not None:
                return made
        width *= 4
    return None


def _visible(s: Tensor) -> int:
    return int((s > 1e-3 * s[:1]).sum())


def _sketched(t: Tensor, width: int, tol: float) -> Triplets | None:
    q, r = torch.linalg.qr(t @ _signs(t.shape[1], width).to(t))
    if _visible(torch.linalg.svdvals(r)) > width - _SPARE:
        return None
    # contiguous: thin products with a column-major factor are ten times slower in some BLAS
    q = torch.linalg.qr(t @ torch.linalg.qr(t.T @ q.contiguous())[0].contiguous())[0].contiguous()
    w, core = torch.linalg.qr(t.T @ q)  # tᵀq = w · core
    u, s, vh = torch.linalg.svd(core.T)
    found = Triplets(q @ u, s, w @ vh.T)
    if _left_over(t, found) > tol * float(s[0]):
        return None
    return found.first(_kept(s, width, tol))


def _left_over(t: Tensor, found: Triplets) -> float:
    """‖t − U diag(s) Vᵀ‖₂ by one power iteration on as many vectors as a sketch has, doubled; nearly a bound."""
    left, right = found.u * found.s, found.v
    y = _signs(t.shape[1], _SKETCH).to(t)
    q = torch.linalg.qr(t @ y - left @ (right.T @ y))[0].contiguous()
    return 2 * float(torch.linalg.svdvals(t.T @ q - right @ (left.T @ q))[0])


def _signs(rows: int, columns: int) -> Tensor:
    """±1 from weft's counter: the same for any thread, device and order."""
    return _cached_signs(rows, columns) if rows * columns <= 1 << 20 else _made_signs(rows, columns)


def _made_signs(rows: int, columns: int) -> Tensor:
    bits = uniform_bits(At("range finder"), 0, rows * columns)
    return ((bits & 1) * 2 - 1).to(torch.float32).reshape(rows, columns)


_cached_signs = lru_cache(maxsize=8)(_made_signs)


def polar(c: Tensor, tol: float = POLAR_TOL) -> Tensor:
    """The partial isometry nearest to c [m, r]: P Qᵀ over the singular values above tol · s₁. No gradient.

    Columns stay in their span: where they are dependent (identical experts, more columns than rows) the result has
    their rank, while an SVD of all of them would add arbitrary directions of full length.
    """
    c = c.detach().double()
    if c.shape[0] < c.shape[1]:
        return polar(c.T, tol).T
    if not c.shape[1]:
        return c
    if c.shape[1] > SMALL:
        values, vectors = torch.linalg.eigh(c.T @ c)
        # between the two floors the Gram matrix is too coarse; below the lower one are its zeros
        floor = float(values[-1]) * max(tol * tol, 1e-14)
        unsure = (values > floor) & (values < float(values[-1]) * _PRECISE**2)
        if not bool(unsure.any()):
            kept = values > floor
            half = vectors[:, kept]
            found: Tensor = (c @ (half * values[kept].rsqrt())) @ half.T
            return found
    p, s, qh = torch.linalg.svd(c, full_matrices=False)
    kept = s > tol * s[:1]
    found = p[:, kept] @ qh[kept]
    return found
