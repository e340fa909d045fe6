"""LiNeS: scale task vectors by depth. Wang et al. 2025, arXiv:2410.17146.

    s_l = α + β · l / (L − 1)          block l of L; tensors outside the blocks (embeddings, head) get α
    θ   = θ0 + s_l Σ wᵢτᵢ

Shallow blocks are general and keep the base's features, deep ones are the task's. The paper takes α = 1/k
for a sum of k task vectors (the default) and chooses β on validation data; for one model α = s, β = 1 − s.
After another merger than the sum, `scale_by_depth` is a step of its own: … | scale_by_depth(alpha, beta).
"""

from __future__ import annotations

from weft.late import Tensor
from weft.methods.averages import weighted_sum
from weft.methods.params import Weight
from weft.methods.registry import method
from weft.methods.step import At, Pipeline, step


def depth_factor(at: At, alpha: float, beta: float) -> float:
    """s_l of the tensor; a model of one block has no depth and gets α."""
    if at.layer is None or at.layers < 2:
        return alpha
    return alpha + beta * at.layer / (at.layers - 1)


@step()
def scale_by_depth(x: Tensor, *, at: At, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """s_l x."""
    return x * depth_factor(at, alpha, beta)


@step(reduces=True)
def sum_by_depth(
    x: Tensor, *, at: At, weight: Weight = 1.0, alpha: float | None = None, beta: float = 0.5
) -> Tensor:
    """s_l Σ wᵢxᵢ, with α = 1/k where none is given."""
    factor = depth_factor(at, 1 / x.shape[0] if alpha is None else alpha, beta)
    return weighted_sum.fn(x, weight=weight) * factor


@method(space="deltas", paper="Wang et al., LiNeS, arXiv:2410.17146")
def lines(*, weight: Weight = 1.0, alpha: float | None = None, beta: float = 0.5) -> Pipeline:
    """Add up task vectors, deeper blocks with larger coefficients."""
    return sum_by_depth(weight=weight, alpha=alpha, beta=beta)
