"""The Gram solver's steps, and the method that has all its settings: `gram`.

    fit_inputs     Gᵢ measured: RegMean, LOT
    fit_changes    Gᵢ = τᵢᵀτᵢ: WUDI, SWUDI, ACTMat
    fit_both       Gᵢ = (1 − ρ) XᵢᵀXᵢ/tr + ρ τᵢᵀτᵢ/‖τᵢ‖²
    fit_diagonal   one gᵢ a row of a table, or an entry of a scale

The solver itself, and what it does where Gram matrices are singular: least_squares.py. `gram` is no published
method; it is where the published ones meet, for searching between them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.inverse import Cut, Filter, Inverse
from weft.methods.least_squares import Keep, Normalize, Settings, Weights, averaged, by_changes, by_inputs
from weft.methods.params import Bounds, Fraction, NonNegative, Positive, per_model
from weft.methods.registry import method
from weft.methods.spectral import Outside, Share, is_spectral
from weft.methods.step import At, Bound, Pipeline, Shapes, row_length, step


def workspace(params: Mapping[str, Any], at: At, k: int, known: Shapes) -> int:
    """Bytes the solver holds beside the stack it is given: a few matrices [m, n] and [n, n] in float64.

    [n, n]: the sum and its eigenvectors, with as much again for LAPACK, or the sum and the one that is read.
    Changes are scaled or turned first, at most; TSV-M and Adam need more of [m, n].
    """
    held = known.get("gram", ())
    if len(held) < 3 and at.transposed:
        d = at.shape[-2]
    else:
        d = row_length(at.shape)
    if len(held) > 1:
        d = held[-1]
    few = 5 + (k + 1 if at.transposed else 0) + (k if len(held) < 2 else 0)
    few += 4 * k + 3 if params.get("keep") == "tsv" else 4 if params.get("steps") else 0
    return 8 * (at.numel * few + 4 * d * d)


def to_simpler(params: Mapping[str, Any], at: At, known: Shapes) -> Bound | None:
    """What the solver comes to without a Gram matrix: the mean, or one weight a row where its diagonal is known.

    Either goes element by element, so that a vocabulary need not fit into memory.
    """
    shape = known.get("gram", ())
    if at.numel and len(shape) > 1:
        return None
    if shape and params.get("diagonal"):
        return Bound(fit_diagonal, {"weight": params["weight"]})
    if not shape and "outside" in params and is_spectral(at, params["outside"]):
        return None
    return Bound(weighted_sum, {"weight": params["weight"], "normalize": True})


@step(needs=("gram",), reduces=True)
def fit_diagonal(x: Tensor, *, gram: Tensor | None, at: At, weight: Weights = 1.0) -> Tensor:
    """Σ wᵢgᵢxᵢ / Σ wᵢgᵢ with one gᵢ a row of a table, or an entry of a scale; the mean where none was used."""
    if gram is None:
        return averaged(x, weight)
    w = per_model(weight, x.shape[0])
    width = max(1, at.numel // max(1, gram.shape[1]))
    unit = torch.arange(at.start, at.start + x[0].numel(), device=x.device) // width
    g = [gi.to(x)[unit].reshape(x.shape[1:]) * wi for gi, wi in zip(gram, w, strict=True)]
    below, above = g[0], x[0] * g[0]
    for xi, gi in zip(x[1:], g[1:], strict=True):
        above, below = above + xi * gi, below + gi
    used = below > 0
    out = above / torch.where(used, below, 1.0)
    return out if bool(used.all()) else torch.where(used, out, averaged(x, weight))


@step(grain="tensor", needs=("gram",), reduces=True, one_by_one=True, simpler=to_simpler, workspace=workspace)
def fit_inputs(
    x: Tensor,
    *,
    gram: Any,
    at: At,
    base: Tensor | None,
    weight: Weights = 1.0,
    off_diagonal: Fraction = 1.0,
    normalize: Normalize = "none",
    ridge: NonNegative = 0.0,
    keep: Literal["zero", "mean"] = "mean",
    diagonal: bool = False,
) -> Tensor:
    """The map nearest to all x [k, *shape] on their own inputs, gram: [k, (b,) in, in] → [*shape].

    off_diagonal   what the entries beside the diagonals are multiplied with
    normalize      weights over the energy of the inputs ("trace") or of the outputs
    ridge          a pull towards what is kept, relative to the mean eigenvalue
    keep           what unused directions get: nothing, or the mean
    diagonal       tables and scales by their diagonal, rather than averaged
    """
    if gram is None or at.numel == 0 or len(gram.shape) < 3:
        return fit_diagonal.fn(x, gram=gram if diagonal else None, at=at, weight=weight)
    inverse = Inverse("ridge" if ridge else "exact", ridge=ridge, unit=True)
    how = Settings(off_diagonal=off_diagonal, normalize=normalize, keep=keep, inverse=inverse)
    return by_inputs(x, gram, at, weight, how, base)


@step(grain="tensor", reduces=True, simpler=to_simpler, workspace=workspace)
def fit_changes(
    x: Tensor,
    *,
    at: At,
    weight: Weights = 1.0,
    normalize: Literal["none", "trace"] = "trace",
    filter: Filter = "flow",
    ridge: NonNegative = 0.0,
    time: Positive = 1300.0,
    share: Share = 1.0,
    cut: Cut = "numerical",
    keep: Keep = "sum",
    keep_scale: float = 1.0,
    steps: Annotated[int, Bounds(0)] = 0,
    rate: Positive = 1e-5,
    outside: Outside = "spectral",
) -> Tensor:
    """The change nearest to all changes x [k, *shape] on the rows of each, which stand for its inputs → [*shape].

    `steps` of Adam at `rate` take the place of the inverse (`filter`, `share` and `cut`).
    """
    inverse = Inverse(filter, ridge, time, share, cut)
    how = Settings(
        normalize=normalize, keep=keep, keep_scale=keep_scale, inverse=inverse, steps=steps, rate=rate
    )
    return by_changes(x, at, weight, outside, how)


@step(
    grain="tensor", needs=("gram?",), reduces=True, one_by_one=True, simpler=to_simpler, workspace=workspace
)
def fit_both(
    x: Tensor,
    *,
    gram: Any,
    at: At,
    weight: Weights = 1.0,
    prior: Fraction = 0.1,
    off_diagonal: Fraction = 1.0,
    filter: Filter = "ridge",
    ridge: NonNegative = 0.01,
    time: Positive = 1300.0,
    share: Share = 1.0,
    cut: Cut = "numerical",
    unit: bool = False,
    keep: Keep = "sum",
    keep_scale: float = 1.0,
    diagonal: bool = False,
    outside: Outside = "spectral",
) -> Tensor:
    """Gram matrices of inputs and of changes in one, each over its trace; of changes where none were measured."""
    inverse = Inverse(filter, ridge, time, share, cut, unit)
    how = Settings(
        prior=prior, off_diagonal=off_diagonal, normalize="trace", keep=keep, keep_scale=keep_scale,
        inverse=inverse,
    )  # fmt: skip
    if gram is not None and len(gram.shape) < 3:
        return fit_diagonal.fn(x, gram=gram if diagonal else None, at=at, weight=weight)
    if gram is None or at.numel == 0:
        return by_changes(x, at, weight, outside, how)
    return by_inputs(x, gram, at, weight, how)


@method(space="deltas", paper="", needs=("gram?",))
def gram(
    *,
    weight: Weights = 1.0,
    prior: Fraction = 0.1,
    off_diagonal: Fraction = 1.0,
    filter: Filter = "ridge",
    ridge: NonNegative = 0.01,
    time: Positive = 1300.0,
    share: Share = 1.0,
    cut: Cut = "numerical",
    unit: bool = False,
    keep: Keep = "sum",
    keep_scale: float = 1.0,
    diagonal: bool = False,
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """The Gram solver with all its settings: measured inputs, changes as a prior, a filter, and what is kept.

    With statistics (`weft measure --what gram`) Gᵢ = (1 − prior) XᵢᵀXᵢ/tr + prior τᵢᵀτᵢ/‖τᵢ‖²; without, and for
    matrices that were not measured, τᵢᵀτᵢ/‖τᵢ‖² alone. `filter` inverts their sum exactly, with a `ridge` relative
    to the mean eigenvalue, or by gradient flow up to `time`; `share` and `cut` say which leading directions take
    part, `unit` in which units. Others get `keep_scale` times nothing, the mean, the sum, or TSV-M's merge.
    `diagonal` weighs rows of measured tables, and scales, too; `outside="mean"` averages unmeasured matrices that
    are in no block.
    """
    made = fit_both(
        weight=weight, prior=prior, off_diagonal=off_diagonal, filter=filter, ridge=ridge, time=time, share=share,
        cut=cut, unit=unit, keep=keep, keep_scale=keep_scale, diagonal=diagonal, outside=outside,
    )  # fmt: skip
    return made | scaled(scale=scale)
