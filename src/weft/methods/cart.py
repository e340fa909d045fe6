"""CART: task vectors from the average, at a low rank. Choi et al., arXiv:2412.12153.

    θ = θ̄ + λ Σ wᵢ SVD_r(θᵢ − θ̄),   θ̄ = Σ θᵢ / k,   r = ⌊share · min(m, n)⌋

No base is needed. Differences from the average add up to zero, so that the full rank gives the average again: it is
the truncation (8 % by default; 8 to 50 % are reported) that keeps what each task is known by. Vectors are averaged.
"""

from __future__ import annotations

from weft.late import Tensor
from weft.methods.params import Weight, per_model
from weft.methods.registry import method
from weft.methods.spectral import Choices, Clip, Share, added, is_spectral, matrixwise, mean_of, solve
from weft.methods.step import At, Pipeline, step


@step(grain="tensor", reduces=True)
def around_mean(
    x: Tensor,
    *,
    at: At,
    weight: Weight = 1.0,
    share: Share = 0.08,
    clip: Clip = "numerical",
    scale: float = 1.0,
) -> Tensor:
    """The mean of the models plus their truncated differences from it. x: [k, *shape] → [*shape]."""
    w, even = per_model(weight, x.shape[0]), [1.0] * x.shape[0]
    if not is_spectral(at, "spectral"):
        return mean_of(x, even)

    def merged(models: list[Tensor]) -> Tensor:
        centre = added(models, [1 / len(models)] * len(models)).double()
        # models that differ by no more than rounding are one model
        least = 1e-12 * max(float(m.detach().norm()) for m in models)
        apart = [m.double() - centre for m in models]
        apart = [d if float(d.detach().norm()) > least else d * 0 for d in apart]
        return centre + scale * solve(apart, w, Choices(share=share, clip=clip))

    return matrixwise(x, at, merged)


@method(space="weights", paper="Choi et al., Revisiting weight averaging, arXiv:2412.12153")
def cart(
    *, weight: Weight = 1.0, share: Share = 0.08, clip: Clip = "numerical", scale: float = 1.0
) -> Pipeline:
    """The average of the models plus the leading directions in which each differs from it. Needs no base."""
    return around_mean(weight=weight, share=share, clip=clip, scale=scale)
