"""Merging by the task vectors' own rows, in place of inputs: WUDI, SWUDI, SWUDI-A, ACTMat.

    Gᵢ = τᵢᵀτᵢ,  wᵢ = 1/‖τᵢ‖²,  C = Σ wᵢGᵢ = V diag(λ) Vᵀ,  D = Σ wᵢτᵢGᵢ,  M₀ = Σ τᵢ

    WUDI      Adam from M₀ on Σ wᵢ‖(M − τᵢ)τᵢᵀ‖², 300 steps at 1e-5               arXiv:2503.08099, ICML 2025
    SWUDI     M₀ + (D − M₀C) V f/λ Vᵀ,  f = (1 − e^(−λt)) [λ among the ⌈Kn⌉ largest]     arXiv:2606.07289
    SWUDI-A   f = [λ among the (Σ√λ)²/Σλ largest], nothing to choose
    ACTMat    (Σ τᵢGᵢ)(Σ Gᵢ)⁺, no weights, nothing kept                              arXiv:2604.01329

Gradients of a linear map are sums of δxᵀ, so the rows of τᵢ lie in the span of the inputs that trained it, and
stand for them. Stopping early is what regularises WUDI: its exact optimum is worse. SWUDI does the same without
steps, by gradient flow up to a time and a cut of the spectrum; SWUDI-A cuts by itself, `cut="noise"` by Gavish &
Donoho's threshold instead, which its authors prefer for language models, with `keep="mean"`. All are the Gram
solver (least_squares.py). A matrix that no expert changed gives 0, where WUDI's code gives NaN; an expert that left
it alone changes nothing. Vectors get the mean. ACTMat's ridge could not be verified: `ridge` is 0 here, and
directions below the numerical rank are left out, which is the limit of a small one.
"""

from __future__ import annotations

from typing import Annotated, Literal

from weft.methods.averages import scaled
from weft.methods.gram import fit_changes
from weft.methods.least_squares import Keep, Weights
from weft.methods.params import Bounds, NonNegative, Positive
from weft.methods.registry import method
from weft.methods.spectral import Outside, Share
from weft.methods.step import Pipeline


@method(space="deltas", paper="Whoever started the interference should end it (WUDI), arXiv:2503.08099")
def wudi(
    *,
    weight: Weights = 1.0,
    steps: Annotated[int, Bounds(1)] = 300,
    rate: Positive = 1e-5,
    keep: Keep = "sum",
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """Adam on what each task vector is disturbed by on its own rows, from the sum, stopped early.

    `rate` is absolute: with changes much smaller or larger than CLIP's, it and `steps` must be chosen. SWUDI has no
    such scale. `keep` is where the steps begin (`mean` for language models).
    """
    made = fit_changes(weight=weight, steps=steps, rate=rate, keep=keep, outside=outside)
    return made | scaled(scale=scale)


@method(space="deltas", paper="Spectral WUDI merging, arXiv:2606.07289")
def swudi(
    *,
    weight: Weights = 1.0,
    time: Positive = 1300.0,
    share: Share = 0.65,
    keep: Keep = "sum",
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """WUDI in closed form: gradient flow up to a time, on the leading directions of all task vectors' rows.

    The authors take time 1300 and a share of 0.65 for CLIP, 300 and 0.85 for language models, these with
    `keep="mean"` or a scale of about 1/T.
    """
    made = fit_changes(weight=weight, time=time, share=share, keep=keep, outside=outside)
    return made | scaled(scale=scale)


@method(space="deltas", paper="Spectral WUDI merging, arXiv:2606.07289")
def swudi_a(
    *,
    weight: Weights = 1.0,
    cut: Literal["participation", "noise"] = "participation",
    keep: Keep = "sum",
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """SWUDI that needs no settings: exact on as many leading directions as the spectrum itself amounts to."""
    made = fit_changes(weight=weight, filter="exact", cut=cut, keep=keep, outside=outside)
    return made | scaled(scale=scale)


@method(
    space="deltas", paper="Data-free covariance estimation (ACTMat), arXiv:2604.01329", aliases=("actmerge",)
)
def actmat(
    *, weight: Weights = 1.0, ridge: NonNegative = 0.0, outside: Outside = "spectral", scale: float = 1.0
) -> Pipeline:
    """RegMean with τᵀτ in place of each model's inputs: the sum over tasks of τG, by the pseudo-inverse of ΣG.

    `ridge` is relative to the mean eigenvalue.
    """
    kind: Literal["ridge", "exact"] = "ridge" if ridge else "exact"
    made = fit_changes(
        weight=weight, normalize="none", filter=kind, ridge=ridge, keep="zero", outside=outside
    )
    return made | scaled(scale=scale)
