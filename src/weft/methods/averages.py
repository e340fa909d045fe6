"""Weighted averages and sums: the one arithmetic primitive, θ = θa + Σ cᵢ (θᵢ − θa).

linear              Σ wᵢθᵢ / Σ wᵢ                  Utans 1996; Wortsman et al. 2022, "Model soups"
task_arithmetic     θ0 + λ Σ wᵢ(θᵢ − θ0)           Ilharco et al. 2023, arXiv:2212.04089
expo                θ0 + (1+α) τ                   Zheng et al. 2024, arXiv:2404.16792 (θ0 = SFT)
wise_ft             (1−α) θ0 + α θ1                Wortsman et al. 2022, arXiv:2109.01903
passthrough         s · θ
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.errors import UsageError
from weft.late import Tensor
from weft.methods.params import Fraction, NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.step import Pipeline, anything_goes, step


def coefficients(params: Mapping[str, Any], k: int) -> list[float]:
    """The weights of k models, divided by their sum when `normalize`."""
    w = per_model(params["weight"], k)
    if not params["normalize"]:
        return w
    total = sum(w)
    if total == 0:
        raise UsageError(f"weights {w} sum to zero: set normalize: false, or change a weight")
    return [v / total for v in w]


def _refuses(params: Mapping[str, Any], k: int) -> None:
    coefficients(params, k)


@step(reduces=True, refuses=_refuses)
def weighted_sum(x: Tensor, *, weight: Weight = 1.0, normalize: bool = False) -> Tensor:
    """Σ wᵢxᵢ, divided by Σ wᵢ when `normalize`. x: [k, *shape] → [*shape]."""
    w = coefficients({"weight": weight, "normalize": normalize}, x.shape[0])
    # model by model, so that the order of the additions (and the result) is fixed
    out = x[0] * w[0]
    for xi, wi in zip(x[1:], w[1:], strict=True):
        out = out + xi * wi
    return out


@step(refuses=anything_goes)
def scaled(x: Tensor, *, scale: float = 1.0) -> Tensor:
    """λx."""
    return x * scale


@method(space="weights", paper="Utans 1996; Wortsman et al., Model soups, arXiv:2203.05482")
def linear(*, weight: Weight = 1.0, normalize: bool = True) -> Pipeline:
    """Weighted mean of the models: Σ wᵢθᵢ / Σ wᵢ.

    With `normalize=False` the plain weighted sum. Negative weights are allowed; weights that sum to zero
    cannot be normalised and are an error.
    """
    return weighted_sum(weight=weight, normalize=normalize)


@method(space="deltas", paper="Ilharco et al., Task arithmetic, arXiv:2212.04089")
def task_arithmetic(*, weight: Weight = 1.0, scale: float = 1.0, normalize: bool = False) -> Pipeline:
    """Add up task vectors: θ0 + λ Σ wᵢτᵢ.

    A negative weight forgets a task, weights (1, 1, −1) make an analogy, and one model with scale > 1
    extrapolates (`expo` writes 1 + α).
    """
    return weighted_sum(weight=weight, normalize=normalize) | scaled(scale=scale)


@method(space="deltas", models=(1, 1), paper="Zheng et al., ExPO, arXiv:2404.16792")
def expo(*, alpha: NonNegative = 0.3) -> Pipeline:
    """Extrapolate alignment: θ_SFT + (1+α)(θ_aligned − θ_SFT), the base being the SFT model."""
    return weighted_sum() | scaled(scale=1.0 + alpha)


@method(space="deltas", models=(1, 1), paper="Wortsman et al., WiSE-FT, arXiv:2109.01903")
def wise_ft(*, alpha: Fraction = 0.5) -> Pipeline:
    """Interpolate between the zero-shot base and one fine-tuned model: (1−α)θ0 + αθ1."""
    return weighted_sum() | scaled(scale=alpha)


@method(space="weights", models=(1, 1), paper="")
def passthrough(*, scale: Weight = 1.0) -> Pipeline:
    """Take one model's tensors as they are, times `scale`."""
    return weighted_sum(weight=scale)
