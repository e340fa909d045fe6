"""R g(C): what the Gram solver multiplies residuals with, for C [n, n] positive semi-definite.

    C = V diag(λ) Vᵀ,  R g(C) = R V diag(f(λ) / λ) Vᵀ

    exact      f = 1                       C⁺, the least squares themselves
    ridge      f = λ / (λ + ρ λ̄)           ρ relative to the mean eigenvalue λ̄
    flow       f = 1 − e^(−tλ)             gradient flow on the least squares, stopped at time t
    + share, participation, noise          f = 0 but for leading eigenvalues

Directions with λ below the numerical rank never take part: a feature that was always zero, fewer samples than
inputs, experts of low rank. Their residual is nothing but rounding, which 1/λ would blow up to anything. They keep
what the solver started from. `unit` solves in inputs scaled to one size (C with a diagonal of ones), so that
features a thousand times larger than others, as language models have, do not drown them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Literal

from weft.late import Tensor, torch
from weft.methods.factors import RANK_TOL
from weft.methods.random import uniform_bits
from weft.methods.spectral import noise_floor
from weft.methods.step import At

Filter = Literal["exact", "ridge", "flow"]
Cut = Literal["numerical", "participation", "noise"]
EIGEN_TOL = RANK_TOL**2
"""Eigenvalues of a Gram matrix below this share of the largest are rounding: singular values, squared."""
STORED_TOL = 1e-6
"""The same for measured Gram matrices, which are stored in float32: their entries are right to 6e-8."""


@dataclass(frozen=True)
class Inverse:
    """How C is inverted; see the module's docstring."""

    filter: Filter = "exact"
    ridge: float = 0.0
    time: float = 1300.0
    share: float = 1.0
    cut: Cut = "numerical"
    unit: bool = False

    @property
    def whole(self) -> bool:
        """Whether all directions take part, so that no eigenvectors are needed where C has full rank."""
        return self.filter != "flow" and self.share >= 1 and self.cut == "numerical"


def applied(r: Tensor, c: Tensor, how: Inverse, n: int, rows: int, tol: float = EIGEN_TOL) -> Tensor:
    """R g(C), r [m, d], c [d, d] float64; `ridge`, `share` and `noise` count the n inputs that d directions are of.

    `rows` is how many rows the matrix had whose Gram matrix C is, for the noise it must show. C and R are used up.
    """
    size = c.diagonal().clamp_min(0)
    live = size > 0
    if not bool(live.all()):  # inputs never seen; a positive semi-definite C has nothing beside them
        out = torch.zeros_like(r)
        if bool(live.any()):
            out[:, live] = applied(r[:, live], c[live][:, live], how, n, rows, tol)
        return out
    if how.unit:
        s = size.rsqrt()
        c.mul_(s).mul_(s[:, None])
        found = _applied(r * s if r.requires_grad else r.mul_(s), c, how, n, rows, tol)
        return found * s if found.requires_grad else found.mul_(s)
    return _applied(r, c, how, n, rows, tol)


def _applied(r: Tensor, c: Tensor, how: Inverse, n: int, rows: int, tol: float) -> Tensor:
    mean = float(c.diagonal().sum()) / n
    shift = how.ridge * mean if how.filter == "ridge" else 0.0
    if how.whole:
        if shift:
            c.diagonal().add_(shift)
        solved = _by_cholesky(r, c, tol)
        if solved is not None:
            return solved
        if shift:
            c.diagonal().sub_(shift)
    values, vectors = torch.linalg.eigh(c)
    del c
    g = gains(values, how, shift, n, rows, tol)
    turned = r @ vectors
    turned = turned * g if turned.requires_grad else turned.mul_(g)
    found: Tensor = turned @ vectors.T
    return found


def gains(values: Tensor, how: Inverse, shift: float, n: int, rows: int, tol: float) -> Tensor:
    """f(λ) / λ for rising eigenvalues λ [d]; 0 for directions that take no part."""
    kept = values > tol * values[-1:]
    most = leading(values.clamp_min(0), how, n, rows)
    kept[: max(0, len(values) - most)] = False
    safe = torch.where(kept, values, 1.0)
    if how.filter == "flow":
        g = -torch.expm1(-how.time * safe) / safe
    else:
        g = 1 / (safe + shift)
    return torch.where(kept, g, 0.0)


def leading(values: Tensor, how: Inverse, n: int, rows: int) -> int:
    """How many of the largest eigenvalues take part: a share of the n inputs, what they amount to, or what shows.

    participation: ⌈(Σ√λ)² / Σλ⌉, as many directions as would carry Σ√λ at equal size. noise: √λ above what white
    noise in a matrix [rows, n] reaches (Gavish & Donoho, arXiv:1305.5870); one at least.
    """
    most = ceil(how.share * n - 1e-9 * n)
    s = values.sqrt()
    if how.cut == "participation" and bool(values.any()):
        most = min(most, ceil(float(s.sum().square() / values.sum()) - 1e-9))
    elif how.cut == "noise":
        most = min(most, int((s > noise_floor(s.flip(0)[: min(rows, n)], rows, n)).sum()))
    return max(1, most)


def _by_cholesky(r: Tensor, c: Tensor, tol: float) -> Tensor | None:
    """R C⁻¹ where C is surely of full rank; else None. A ninth of what eigenvectors cost."""
    factor, failed = torch.linalg.cholesky_ex(c)
    if bool(failed):
        return None

    def inverse(y: Tensor) -> Tensor:
        return torch.cholesky_solve(y, factor)

    largest = _power(lambda y: c @ y, c)
    if not 1 / _power(inverse, c) > 4 * tol * largest:
        return None
    return inverse(r.T).T


def _power(apply: Callable[[Tensor], Tensor], like: Tensor, rounds: int = 4) -> float:
    """The largest eigenvalue of a positive map on R^n, from below, by a few steps of subspace iteration."""
    bits = uniform_bits(At("power iteration"), 0, len(like) * 4)
    y = ((bits & 1) * 2 - 1).to(like).reshape(len(like), 4)
    size = 0.0
    for _ in range(rounds):
        q = torch.linalg.qr(y)[0]
        y = apply(q)
        size = float(torch.linalg.matrix_norm(y, 2))
        if not 0 < size < float("inf"):
            return float("inf")
    return size


def descent(r: Tensor, c: Tensor, steps: int, rate: float, eps: float) -> Tensor:
    """X after some steps of Adam from 0 on the least squares with gradient 2(XC − R): WUDI's own way.

    Steps are divided by a constant of the gradient.
    """
    x, m, v = torch.zeros_like(r), torch.zeros_like(r), torch.zeros_like(r)
    for t in range(1, steps + 1):
        g = (x @ c - r) * 2
        m = m * 0.9 + g * 0.1
        v.mul_(0.999).addcmul_(g.detach(), g.detach(), value=0.001)
        step = (v / (1 - 0.999**t)).sqrt_().add_(eps)
        x = x - m / step * (rate / (1 - 0.9**t))
    return x
