"""Interpolation and means on the sphere: SLERP, NuSLERP, Karcher mean, multi-SLERP.

slerp       sin((1−t)φ)/sin φ · θ1 + sin(tφ)/sin φ · θ2,  cos φ = ⟨θ1, θ2⟩/‖θ1‖‖θ2‖      Shoemake 1985
nuslerp     the same with t = w2/(w1 + w2); of task vectors when a base is given          MergeKit
karcher     m = argmin over the sphere of Σ wᵢ φ(m, uᵢ)², uᵢ = θᵢ/‖θᵢ‖; times Σ wᵢ‖θᵢ‖    Grove & Karcher 1973
multislerp  the first `steps` steps of that, from the normalised weighted mean of the uᵢ

Everything lies in the span of the models, so all of it is a rule from the Gram matrix [..., k, k] to
coefficients [..., k], in float64; the tensors are only read for the Gram matrix and for Σ cᵢθᵢ. With
`row_wise` each row (see step.row_length) has its own Gram matrix and its own angle.

Where the geometry gives no answer: a zero tensor has no direction, so SLERP is linear and the means leave it
out of the direction, while its zero norm counts in the mean norm. Between antiparallel tensors no great
circle is shortest, and where the weighted directions cancel no mean is nearest: the linear interpolation or
mean of the tensors themselves is returned. Small angles need no exception: sin tφ/sin φ is a ratio of sincs.

MergeKit interpolates linearly where |cos φ| > 0.9995 (most fine-tunes of one base: `linear_above`); its
multislerp sums projections instead of logarithms, which cancel exactly, and is our steps=0; its karcher has
no weights; its nuslerp calls columns rows (`column_wise` goes along them).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from weft.checkpoints.bits import Array
from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.params import Bounds, Fraction, NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.stats import Gram, fold, gram_of, namespace
from weft.methods.step import Pipeline, anything_goes, step

Count = Annotated[int, Bounds(0)]
# sines and squared lengths below this are rounding errors of a float64 Gram matrix
SMALL = 1e-7


def squares(gram: Any) -> Any:
    """The diagonal: squared lengths, gram: [..., k, k] → [..., k]."""
    each = list(range(gram.shape[-1]))
    return gram[..., each, each]


def slerp_coefficients(gram: Array | Tensor, t: float, linear_above: float = 1.0) -> Any:
    """Coefficients of SLERP, gram: [..., 2, 2] → [..., 2]."""
    xp, square = namespace(gram), squares(gram)
    directed = (square > 0).all(-1)[..., None]
    # the roots before the product, which would underflow for small tensors
    norms = xp.sqrt(xp.where(directed, square, 1.0))
    cos = gram[..., 0, 1] / norms[..., 0] / norms[..., 1]
    cos = xp.clip(xp.where(directed[..., 0], cos, 1.0), -1, 1)
    # the clip keeps the root's derivative finite where the tensors are parallel
    sin = xp.sqrt(xp.clip((1 - cos) * (1 + cos), 1e-30, None))
    angle = xp.arctan2(sin, cos)
    linear = ((cos < 0) & (sin < SMALL)) | (abs(cos) > linear_above)
    angle = xp.where(linear, 0.0, angle) / math.pi
    return xp.stack([(s * xp.sinc(s * angle) / xp.sinc(angle)) for s in (1 - t, t)], -1)


def _shares(weight: Weight, k: int) -> list[float]:
    w = per_model(weight, k)
    if sum(w) == 0:
        raise UsageError(f"weights {w} sum to zero: a mean on the sphere needs another sum")
    return [v / sum(w) for v in w]


def _refuses(params: Mapping[str, Any], k: int) -> None:
    _shares(params["weight"], k)


def mean_coefficients(gram: Array | Tensor, weight: Weight, max_iter: int, tol: float) -> Any:
    """Coefficients of the Riemannian mean times the mean norm, gram: [..., k, k] → [..., k].

    At most `max_iter` steps m ← exp_m(Σ wᵢ log_m uᵢ), until one would be no longer than `tol`.
    """
    xp, k = namespace(gram), gram.shape[-1]
    w = xp.asarray(_shares(weight, k), dtype=xp.float64)
    square = squares(gram)  # [..., k]
    directed = square > 0
    norm = xp.where(directed, xp.sqrt(xp.where(directed, square, 1.0)), 0.0)
    inverse = xp.where(directed, 1.0 / xp.where(directed, norm, 1.0), 0.0)
    unit = gram * inverse[..., :, None] * inverse[..., None, :]
    share = w * directed
    total = share.sum(-1)[..., None]
    share = share / xp.where(total != 0, total, 1.0)

    def times(matrix: Any, a: Any) -> Any:
        return fold(matrix * a[..., None, :])

    def length(a: Any) -> Any:
        return xp.sqrt(xp.clip(fold(a * times(unit, a)), 1e-30, None))[..., None]

    start = length(share)  # of the weighted mean direction
    cancelled = start <= SMALL * abs(share).sum(-1)[..., None]
    done = cancelled
    m = share / xp.where(cancelled, 1.0, start)
    eye = xp.eye(k, dtype=xp.float64)
    for _ in range(max_iter):
        cos = xp.clip(times(unit, m), -1, 1)  # ⟨uᵢ, m⟩
        sin = xp.sqrt(xp.clip((1 - cos) * (1 + cos), 1e-30, None))
        # φ/sin φ; a direction opposite to m pulls nowhere in particular
        pull = xp.where((cos < 0) & (sin < SMALL), 0.0, 1 / xp.sinc(xp.arctan2(sin, cos) / math.pi))
        pulled = (share * pull)[..., None] * (eye - cos[..., None] * m[..., None, :])
        tangent = fold(xp.swapaxes(pulled, -1, -2))
        angle = length(tangent)
        # each row stops by itself, so that no row depends on its neighbours
        done = done | (angle <= tol)
        if bool(done.all()):
            break
        moved = m * xp.cos(angle) + tangent * xp.sinc(angle / math.pi)
        m = xp.where(done, m, moved / xp.where(done, 1.0, length(moved)))
    return xp.where(cancelled, xp.broadcast_to(w, m.shape), m * inverse * (w * norm).sum(-1)[..., None])


def combination(x: Tensor, coefficients: Array | Tensor) -> Tensor:
    """Σ cᵢxᵢ, x: [k, *shape], coefficients: [..., k] with one value a leading index of the shape."""
    c = torch.as_tensor(coefficients).to(x)
    c = c.reshape(*c.shape[:-1], *[1] * (x.ndim - c.ndim), c.shape[-1])
    out = x[0] * c[..., 0]
    for i in range(1, x.shape[0]):
        out = out + x[i] * c[..., i]
    return out


@step(stat=Gram(), reduces=True, refuses=anything_goes)
def turn(x: Tensor, *, gram: Array | Tensor, t: float = 0.5, linear_above: Fraction = 1.0) -> Tensor:
    """Turn the first of two tensors towards the second by a fraction t of the angle between them."""
    return combination(x, slerp_coefficients(gram, t, linear_above))


@step(grain="row", reduces=True)
def turn_rows(x: Tensor, *, t: float = 0.5, linear_above: Fraction = 1.0) -> Tensor:
    """`turn`, every row by its own angle. x: [2, rows, n] → [rows, n]."""
    return combination(x, slerp_coefficients(gram_of(x).cpu(), t, linear_above))


@step(grain="tensor", reduces=True)
def turn_columns(x: Tensor, *, t: float = 0.5, linear_above: Fraction = 1.0) -> Tensor:
    """`turn`, every column by its own angle; a vector is one column. x: [2, …, rows, n] → [rows, n]."""
    columns = x if x.ndim == 2 else x.mT
    turned = combination(columns, slerp_coefficients(gram_of(columns).cpu(), t, linear_above))
    return turned if x.ndim == 2 else turned.mT


@step(stat=Gram(), reduces=True, refuses=_refuses)
def mean_direction(
    x: Tensor, *, gram: Array | Tensor, weight: Weight = 1.0, max_iter: Count = 100, tol: NonNegative = 1e-9
) -> Tensor:
    """Weighted Riemannian mean of the directions, times the weighted mean norm."""
    return combination(x, mean_coefficients(gram, weight, max_iter, tol))


@step(grain="row", reduces=True)
def mean_direction_rows(
    x: Tensor, *, weight: Weight = 1.0, max_iter: Count = 100, tol: NonNegative = 1e-9
) -> Tensor:
    """`mean_direction` of every row by itself. x: [k, rows, n] → [rows, n]."""
    return combination(x, mean_coefficients(gram_of(x).cpu(), weight, max_iter, tol))


def _mean(weight: Weight, max_iter: int, tol: float, row_wise: bool) -> Pipeline:
    mean = mean_direction_rows if row_wise else mean_direction
    return mean(weight=weight, max_iter=max_iter, tol=tol)


@method(
    space="weights",
    models=(2, 2),
    paper="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    compat={"mergekit": {"linear_above": 0.9995}},
)
def slerp(*, t: Fraction = 0.5, row_wise: bool = False, linear_above: Fraction = 1.0) -> Pipeline:
    """Spherical interpolation from the first model (t = 0) to the second (t = 1).

    `linear_above` is the |cosine| beyond which to interpolate linearly; the formula needs none.
    """
    return (turn_rows if row_wise else turn)(t=t, linear_above=linear_above)


@method(space="weights", models=(2, 2), base="optional", paper="Goddard et al., MergeKit, arXiv:2403.13257")
def nuslerp(*, weight: Weight = 1.0, row_wise: bool = False, column_wise: bool = False) -> Pipeline:
    """Spherical interpolation of two models, or of their task vectors, by their weights."""
    if row_wise and column_wise:
        raise UsageError("row_wise and column_wise exclude each other")
    first, second = per_model(weight, 2)
    if first + second == 0:
        raise UsageError(f"weights {[first, second]} sum to zero: nuslerp goes to the second by its share")
    how = turn_rows if row_wise else turn_columns if column_wise else turn
    return how(t=second / (first + second))


@method(
    space="weights",
    base="optional",
    paper="Grove & Karcher, Math. Z. 132, 1973; Goddard et al., MergeKit, arXiv:2403.13257",
    compat={"mergekit": {"max_iter": 10, "tol": 1e-5}},
)
def karcher(
    *, weight: Weight = 1.0, max_iter: Count = 100, tol: NonNegative = 1e-9, row_wise: bool = False
) -> Pipeline:
    """Weighted Riemannian mean of the models' directions, times their weighted mean norm."""
    return _mean(weight, max_iter, tol, row_wise)


@method(
    space="weights",
    base="optional",
    paper="Goddard et al., MergeKit, arXiv:2403.13257",
    compat={"mergekit": {"steps": 0}},
)
def multislerp(*, weight: Weight = 1.0, steps: Count = 1, row_wise: bool = False) -> Pipeline:
    """Barycentre of directions in the tangent space of their mean, times the mean norm.

    The tangent space is that of the normalised weighted mean of the directions, renewed `steps` times;
    none leaves that mean as it is.
    """
    return _mean(weight, steps, 0.0, row_wise)
