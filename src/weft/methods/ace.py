"""ACE-Merging: covariances of the task vectors' rows in place of inputs. CVPR 2026, arXiv:2603.02945.

    Σᵢ = (τᵢ − 1μᵢᵀ)ᵀ(τᵢ − 1μᵢᵀ) + εI                                         μᵢ the mean row of τᵢ
    Σᵢ / tr Σᵢ  in matrices whose tasks differ: Var log ‖τᵢ‖² > γ (mean log ‖τᵢ‖²)²
    M = (Σ wᵢτᵢΣᵢ)(Σ wᵢΣᵢ + 1c̄ᵀ)⁻¹                     c̄ the column means of Σ wᵢΣᵢ without ε: a shared prior
    M + s̄ U_k V_kᵀ    in these matrices: the leading k = ⌊0.3 p⌋ directions of M + Σ τᵢ(Σᵢ − Σ̄), at their mean value

The Gram solver (least_squares.py) with centred Gram matrices, a prior of rank one (by the formula of Sherman and
Morrison) and a spectrum flattened afterwards. Constants are those of the released code (ε = 0.01, γ = 0.3, 30 %),
which differs in two places: it takes the mean row off τᵢ in the product, too, and so loses it; and it counts
experts that did not change a matrix. Sizes are absolute: ε is large beside the changes of most fine-tuned matrices,
so that the result is near the mean, tilted towards directions that a task is sure of. With ε = 0 and no prior it is
RegMean on centred changes. Vectors get the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.factors import decompose, largest, unit_scale
from weft.methods.gram import to_simpler, workspace
from weft.methods.inverse import EIGEN_TOL, Inverse, applied
from weft.methods.least_squares import Weights, averaged, blocks_of, some, stacked
from weft.methods.measured import unmatrices
from weft.methods.params import Fraction, NonNegative
from weft.methods.registry import method
from weft.methods.spectral import Outside, fused, is_spectral
from weft.methods.step import At, Pipeline, Shapes, row_length, step


def centred(t: Tensor) -> Tensor:
    """The covariance of the rows of t [m, n], not divided by m."""
    d = t - t.mean(0, keepdim=True)
    return d.T @ d


def differ(logs: Sequence[float], limit: float) -> bool:
    """Whether squared norms, given by their logarithms, are of very different order."""
    if len(logs) < 2:
        return False
    mean = sum(logs) / len(logs)
    return sum((v - mean) ** 2 for v in logs) / (len(logs) - 1) > limit * mean * mean


@dataclass(frozen=True)
class Settings:
    """The constants; see the module's docstring."""

    epsilon: float
    limit: float
    share: float
    prior: bool


def fitted(x: Sequence[Tensor], weight: Sequence[float], how: Settings) -> Tensor:
    """One matrix merged: k of [m, n] → [m, n], float64."""
    most = [largest(t) for t in x]
    taking = [i for i, wi in enumerate(weight) if wi and most[i]]
    if not taking:
        return torch.zeros_like(x[0])
    unit = unit_scale(max(most))
    t, w = [x[i] * unit for i in taking], [weight[i] for i in taking]
    norms = [float(ti.detach().square().sum()) for ti in t]
    spread = differ([log(s) - 2 * log(unit) for s in norms], how.limit)
    start = torch.stack([ti * wi for ti, wi in zip(t, w, strict=True)]).sum(0) / sum(w)
    c, r, eps = torch.zeros(1).to(start), torch.zeros_like(start), 0.0
    for ti, wi in zip(t, w, strict=True):
        g = centred(ti.detach())
        size = float(g.diagonal().sum()) if spread else 1.0
        by = wi / size if size > 0 else 0.0
        shift = how.epsilon * unit**2 * by
        c, r, eps = c + g * by, r + (ti - start) @ g * by + (ti - start) * shift, eps + shift
    column = c.mean(0) / (sum(norms) / len(norms) / unit**2 if spread else 1.0)
    c.diagonal().add_(eps)
    n = c.shape[0]
    merged = start + applied(r, c.clone(), Inverse(), n, n, EIGEN_TOL)
    if how.prior:
        merged = with_prior(merged, c, column)
    if spread and how.share:
        merged = merged + flattened(t, merged.detach(), c / sum(w), how.share)
    return merged / unit


def with_prior(x: Tensor, c: Tensor, column: Tensor) -> Tensor:
    """X C (C + 1c̄ᵀ)⁻¹ = X − (X1)(c̄ᵀC⁻¹) / (1 + c̄ᵀC⁻¹1)."""
    row = applied(column[None], c.clone(), Inverse(), len(c), len(c), EIGEN_TOL)
    return x - x.sum(1, keepdim=True) * (row / (1 + row.sum()))


def flattened(t: Sequence[Tensor], merged: Tensor, mean: Tensor, share: float) -> Tensor:
    """The leading directions of the merge and of what each task adds to the mean covariance, all of one size."""
    rest = merged.clone()
    for ti in t:
        g = centred(ti.detach())
        size = float(g.diagonal().sum())
        rest += ti.detach() @ (g / size - mean) if size > 0 else 0.0
    found = decompose(rest, int(share * min(rest.shape)))
    return found.s.mean() * (found.u @ found.v.T) if found.rank else torch.zeros_like(merged)


def _workspace(params: Mapping[str, Any], at: At, k: int, known: Shapes) -> int:
    """The solver's, one more sum, and what is decomposed at the end."""
    return workspace(params, at, k, known) + 8 * (6 * at.numel + 2 * row_length(at.shape) ** 2)


@step(grain="tensor", reduces=True, simpler=to_simpler, workspace=_workspace)
def fit_covariances(
    x: Tensor,
    *,
    at: At,
    weight: Weights = 1.0,
    epsilon: NonNegative = 0.01,
    limit: NonNegative = 0.3,
    share: Fraction = 0.3,
    prior: bool = True,
    outside: Outside = "spectral",
) -> Tensor:
    """Merge by the covariances of the rows of each change, x: [k, *shape] → [*shape]."""
    if not is_spectral(at, outside):
        return averaged(x, weight)
    w, b = some(weight, x.shape[0]), fused(at)
    turned = at.transposed and len(at.shape) == 2 + (b > 1)
    d = at.shape[-2] if turned else row_length(at.shape) if b > 1 else at.numel // at.shape[0]
    stack = blocks_of(x, d, b, turned).double()
    how = Settings(epsilon, limit, share, prior)
    made = [fitted([s[i] for s in stack], w, how) for i in range(b)]
    return unmatrices(stacked(made), at.shape, turned).to(x.dtype)


@method(
    space="deltas", paper="ACE-Merging: data-free merging by adaptive covariance estimation, arXiv:2603.02945"
)
def ace(
    *,
    weight: Weights = 1.0,
    epsilon: NonNegative = 0.01,
    limit: NonNegative = 0.3,
    share: Fraction = 0.3,
    prior: bool = True,
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """The change nearest to all in the metric of each task's own covariance, with a prior all tasks share.

    `epsilon` is added to each covariance, in absolute size. `limit` says from which spread of squared norms on
    tasks are brought to one size and the result's leading `share` of directions is flattened. `prior` is the shared
    one.
    """
    made = fit_covariances(
        weight=weight, epsilon=epsilon, limit=limit, share=share, prior=prior, outside=outside
    )
    return made | scaled(scale=scale)
