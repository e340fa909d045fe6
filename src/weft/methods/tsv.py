"""Task singular vectors: TSV-M merges, TSV-C compresses. Gargiulo et al., CVPR 2025, arXiv:2412.00081.

    τᵢ ≈ Uᵢ diag(sᵢ) Vᵢᵀ        its ⌊p/T⌋ leading triplets, p = min(m, n)
    TSV-M   θ = θ0 + α polar([U₁ … U_T]) diag([s₁ … s_T]) polar([V₁ … V_T])ᵀ
    TSV-C   θ = θ0 + α Uₜ diag(sₜ) Vₜᵀ                    for the task at hand: T of them fit where one τ did

The polar factors are the nearest orthonormal directions, so that tasks no longer disturb one another. They are
partial isometries here (methods/factors.py): with identical experts the published code adds an arbitrary matrix
of the expert's own norm, with opposite ones it is all there is. Vectors: the mean (TSV-M), the task's own (TSV-C).
"""

from __future__ import annotations

from weft.late import Tensor
from weft.methods.averages import scaled
from weft.methods.masks import Task, of_task
from weft.methods.params import Weight
from weft.methods.registry import method
from weft.methods.spectral import (
    Choices,
    Clip,
    Outside,
    Share,
    is_spectral,
    matrixwise,
    shares,
    solve,
    spectral,
)
from weft.methods.step import At, Pipeline, step


@method(space="deltas", paper="Gargiulo et al., Task Singular Vectors, arXiv:2412.00081", aliases=("tsv_m",))
def tsv(
    *,
    weight: Weight = 1.0,
    share: Share | None = None,
    clip: Clip = "numerical",
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """TSV-M: leading singular directions of every task, made orthogonal to those of the others, added up.

    `share` is the fraction of directions a task keeps, 1/T by default. For experts stored in 16 bits that are
    adapters underneath, `clip="noise"` tells their rank from the rounding.
    """
    merged = spectral(weight=weight, share=share, clip=clip, basis="polar", outside=outside)
    return merged | scaled(scale=scale)


@step(grain="tensor", reduces=True)
def one_truncated(
    x: Tensor, *, at: At, task: Task, share: Share | None = None, clip: Clip = "numerical"
) -> Tensor:
    """One task vector at a share of its triplets, 1/T by default; T counts the experts that changed the matrix."""
    own = of_task(x, task)
    if not is_spectral(at, "spectral"):
        return own.clone()

    def best(tasks: list[Tensor]) -> Tensor:
        count = sum(bool(t.any()) for t in tasks)
        part = shares(min(tasks[0].shape), share, max(count, 1)) / min(tasks[0].shape)
        return solve([tasks[task]], [1.0], Choices(share=part, clip=clip))

    return matrixwise(x, at, best)


@method(space="deltas", paper="Gargiulo et al., Task Singular Vectors, arXiv:2412.00081", per_task=True)
def tsv_c(
    *, task: Task, share: Share | None = None, clip: Clip = "numerical", scale: float = 1.0
) -> Pipeline:
    """TSV-C: one task's model from the leading singular directions of its task vector alone.

    All T tasks together take about twice the base. For what adapters know, `share` may be far below 1/T.
    """
    return one_truncated(task=task, share=share, clip=clip) | scaled(scale=scale)
