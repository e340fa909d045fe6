"""MaTS: merging by matching models in their task parameter subspaces. Tam et al. 2024, arXiv:2312.04339.

    solve  Σ wᵢ Cᵢ (θ − θᵢ) = 0                      Cᵢ = Bᵢ ⊗ Aᵢ:   Σ wᵢ Bᵢ (D − τᵢ) Aᵢ = 0

for every linear map, D and τ being changes of the base [out, in]: A the second moment of its inputs, B that of the
gradients at its outputs (`curvature="kfac"`), or B = 1 (`"gram"`, whose exact solution is RegMean's). Conjugate
gradients from D = λ Σ wᵢτᵢ never form a Kronecker product; both sides are divided by the largest ‖A‖‖B‖. Directions
without curvature keep what they began with, so stopping early regularises: `iterations` is a parameter to choose.
Tensors without factors (biases, norms, embeddings) are averaged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from weft.late import Tensor, torch
from weft.methods.averages import weighted_sum
from weft.methods.measured import maps, unmatrices
from weft.methods.params import Bounds, Fraction, NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.step import At, Pipeline, step

Count = Annotated[int, Bounds(0)]


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], rhs: Tensor, start: Tensor, iterations: int, tol: float
) -> Tensor:
    """Solve apply(x) = rhs for a positive semi-definite linear map of [..., o, i], each matrix by itself.

    Stops after `iterations`, or where every residual is below `tol` of its right-hand side.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((-2, -1), keepdim=True)

    x, r = start, rhs - apply(start)
    p, rr, limit = r, dot(r, r), dot(rhs, rhs).detach() * tol**2
    for _ in range(iterations):
        if bool((rr.detach() <= limit).all()):
            break
        ap = apply(p)
        bend = dot(p, ap)
        # a direction without curvature is one without a residual, but for rounding
        going = (bend > 0) & (rr > limit)
        alpha = torch.where(going, rr / torch.where(going, bend, 1.0), 0.0)
        x, r = x + alpha * p, r - alpha * ap
        before, rr = rr, dot(r, r)
        p = r + torch.where(going, rr / torch.where(going, before, 1.0), 0.0) * p
    return x


def off_diagonals(c: Tensor, keep: float) -> Tensor:
    """α C + (1 − α) diag C over the last two axes."""
    alone: Tensor = torch.diag_embed(c.diagonal(dim1=-2, dim2=-1))
    return c if keep == 1 else c * keep + alone * (1 - keep)


def _largest(factors: Tensor) -> Tensor:
    """max ‖C‖ over the models' factors [k, …], in float64."""
    return torch.stack([f.double().norm() for f in factors]).max()


def matched(
    x: Tensor, a: Tensor, b: Tensor | None, at: At, weight: Weight, scale: float, iterations: int, tol: float
) -> Tensor:
    """The solution for task vectors x [k, *shape], A [k, (n,) in, in] and B [k, (n,) out, out] or the identity."""
    k = x.shape[0]
    w = per_model(weight, k)
    tau = maps(x.double(), a, at.transposed)  # [k, n, out, in]
    ins = a.reshape(k, -1, *a.shape[-2:])  # widened one by one, each time: little beside the products
    outs = None if b is None else b.reshape(k, -1, *b.shape[-2:])
    size: Tensor = _largest(ins) if outs is None else _largest(ins) * _largest(outs)
    if not bool(size > 0):
        return weighted_sum.fn(x, weight=weight, normalize=True)

    def term(i: int, d: Tensor) -> Tensor:
        right: Tensor = d @ ins[i].double()
        if outs is not None:
            right = outs[i].double() @ right
        return right * w[i] / size

    def total(d: Tensor) -> Tensor:
        return torch.stack([term(i, d) for i in range(k)]).sum(0)

    rhs = torch.stack([term(i, tau[i]) for i in range(k)]).sum(0)
    start = weighted_sum.fn(tau, weight=weight) * scale
    found = conjugate_gradients(total, rhs, start, iterations, tol)
    return unmatrices(found, at.shape, at.transposed).to(x.dtype)


@step(grain="tensor", needs=("kfac_a", "kfac_g"), reduces=True)
def match_kfac(
    x: Tensor,
    *,
    kfac_a: Tensor | None,
    kfac_g: Tensor | None,
    at: At,
    weight: Weight = 1.0,
    scale: float = 0.3,
    iterations: Count = 100,
    off_diagonal: Fraction = 1.0,
    tol: NonNegative = 1e-14,
) -> Tensor:
    """Match task vectors in the metric B ⊗ A, x: [k, *shape] → [*shape]."""
    if kfac_a is None or kfac_g is None or kfac_a.dim() < 3:
        return weighted_sum.fn(x, weight=weight, normalize=True)
    a, b = off_diagonals(kfac_a, off_diagonal), off_diagonals(kfac_g, off_diagonal)
    return matched(x, a, b, at, weight, scale, iterations, tol)


@step(grain="tensor", needs=("gram",), reduces=True)
def match_inputs(
    x: Tensor,
    *,
    gram: Tensor | None,
    at: At,
    weight: Weight = 1.0,
    scale: float = 0.3,
    iterations: Count = 100,
    off_diagonal: Fraction = 1.0,
    tol: NonNegative = 1e-14,
) -> Tensor:
    """Match task vectors in the metric A of their inputs, x: [k, *shape] → [*shape]."""
    if gram is None or gram.dim() < 3:
        return weighted_sum.fn(x, weight=weight, normalize=True)
    return matched(x, off_diagonals(gram, off_diagonal), None, at, weight, scale, iterations, tol)


@method(
    space="deltas",
    paper="Tam et al., Merging by matching models in task parameter subspaces, arXiv:2312.04339",
    needs=("kfac_a", "kfac_g", "gram"),
)
def mats(
    *,
    weight: Weight = 1.0,
    curvature: Literal["kfac", "gram"] = "kfac",
    scale: float = 0.3,
    iterations: Count = 100,
    off_diagonal: Fraction = 1.0,
    tol: NonNegative = 1e-14,
) -> Pipeline:
    """Solve for the model whose linear maps match all models' where each has curvature.

    Needs `weft measure --what kfac` (or `gram`) of every model. `scale` is that of the task arithmetic to
    start from, `off_diagonal` scales the factors' entries beside their diagonals.
    """
    made = match_kfac if curvature == "kfac" else match_inputs
    return made(weight=weight, scale=scale, iterations=iterations, off_diagonal=off_diagonal, tol=tol)
