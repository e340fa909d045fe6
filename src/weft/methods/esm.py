"""ESM: merge in the essential subspaces of what the experts' outputs changed by. CVPR 2026.

    Oᵢ = Xᵢτᵢᵀ,  OᵢᵀOᵢ = τᵢ Gᵢ τᵢᵀ = Pᵢ diag(eᵢ) Pᵢᵀ         how τᵢ shifts activations; Gᵢ = XᵢᵀXᵢ of its inputs
    Uᵢ = Pᵢ[:, :⌊p/T⌋],  Vᵢ = Uᵢᵀτᵢ                          τᵢ along the directions that shift most
    Uᵢ, Vᵢ × (eᵢ/ēᵢ)^γ;  then every row v of Vᵢ × (‖v‖ / mean)²
    U = [U₁ … U_T],  V = the Vᵢ below one another, every column v × (‖v‖ / mean)²
    θ = θ0 + α · 2 s̄_U s̄_V polar(U) polar(V)                 s̄: the mean singular value

A basis of the spectral family that a few unlabelled inputs choose (32 a task are reported to do), with Iso's
spectrum on both sides. Means and polar factors are over the numerical rank; a task whose change its inputs never
see takes no part. Matrices without a Gram matrix are merged by TSV-M, as the released code does with some; vectors
get the mean. The paper's last factor, each layer's norm over the mean of its kind, squared, is left out: it needs
all merged layers of a model at once; `scale` by pattern can say it.
"""

from __future__ import annotations

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.factors import RANK_TOL, Triplets, decompose, largest, polar, unit_scale
from weft.methods.measured import maps, unmatrices
from weft.methods.params import NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.spectral import Share, shares, spectral
from weft.methods.step import At, Pipeline, step


def shift(t: Tensor, gram: Tensor, rank: int) -> Triplets:
    """Leading directions of the outputs' change t G^½: u = P [m, r], s = √e; v is not used. No gradient."""
    t = t.detach()
    if t.shape[0] > t.shape[1]:
        values, vectors = torch.linalg.eigh(gram)
        return decompose(t @ (vectors * values.clamp_min(0).sqrt()), rank)
    energy, p = torch.linalg.eigh(t @ gram @ t.T)
    s = energy.flip(0)[:rank].clamp_min(0).sqrt()
    kept = int((s > RANK_TOL * s[:1]).sum())
    return Triplets(p.flip(1)[:, :kept], s[:kept], t.T[:, :0])


def raised(x: Tensor, along: int) -> Tensor:
    """Rows (along = 1) or columns (0) times (their norm over the mean norm)²."""
    size: Tensor = x.norm(dim=along, keepdim=True)
    return x * (size / size.mean()).square()


def isotropic(x: Tensor) -> Tensor:
    """The polar factor times the mean singular value, over the numerical rank."""
    p = polar(x)
    mean: Tensor = (p * x).sum() / p.square().sum()  # ⟨polar x, x⟩ = Σs, ‖polar x‖² = rank
    return p * mean


def essential(
    x: list[Tensor], grams: list[Tensor], weight: list[float], share: float | None, power: float
) -> Tensor:
    """One matrix merged: x k of [m, n], Gram matrices k of [n, n] → [m, n], float64."""
    sizes = [largest(t) for t in x]
    c = unit_scale(max(sizes))
    taking = [i for i, wi in enumerate(weight) if wi and sizes[i]]
    rank = shares(min(x[0].shape), share, max(1, len(taking)))
    lefts, rights = [], []
    for i in taking:
        t, g = x[i].double() * c, grams[i].double()
        found = shift(t, g * unit_scale(largest(g)), rank)
        if found.rank:
            spread = (found.s.square() / found.s.square().mean()) ** power
            lefts.append(found.u * spread)
            rights.append(raised((found.u.T @ t) * spread[:, None], 1) * weight[i])
    if not lefts:
        return (x[0] * 0).double()
    return 2 * isotropic(torch.cat(lefts, 1)) @ isotropic(raised(torch.cat(rights), 0)) / c


@step(grain="tensor", needs=("gram",), reduces=True)
def in_essential_subspaces(
    x: Tensor,
    *,
    gram: Tensor | None,
    at: At,
    weight: Weight = 1.0,
    share: Share | None = None,
    power: NonNegative = 0.15,
) -> Tensor:
    """Merge along the directions in which outputs change, x: [k, *shape], gram: [k, (b,) in, in] → [*shape]."""
    if gram is None or gram.dim() < 3 or at.numel == 0 or not gram.any():
        return spectral.fn(x, at=at, weight=weight, share=share, basis="polar")
    k = x.shape[0]
    w = per_model(weight, k)
    tau = maps(x, gram, at.transposed).contiguous()  # since a library's product rounds by layout
    grams = gram.reshape(k, -1, *gram.shape[-2:])
    made = [
        essential([t[b] for t in tau], [g[b] for g in grams], w, share, power) for b in range(tau.shape[1])
    ]
    return unmatrices(torch.stack(made), at.shape, at.transposed).to(x.dtype)


@method(space="deltas", paper="Essential Subspace Merging, CVPR 2026", needs=("gram",))
def esm(
    *, weight: Weight = 1.0, share: Share | None = None, power: NonNegative = 0.15, scale: float = 1.0
) -> Pipeline:
    """Merge in the directions in which each task's outputs change most on its own inputs.

    Needs `weft measure --what gram` of every model. `share` is the fraction of directions a task keeps, 1/T by
    default; `power` is the paper's exponent of their energies.
    """
    return in_essential_subspaces(weight=weight, share=share, power=power) | scaled(scale=scale)
