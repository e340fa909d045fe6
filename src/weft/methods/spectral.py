"""One spectral solver: factorise task vectors, truncate, choose bases, combine a core, shape the spectrum, lift.

    τᵢ (or Σ wᵢτᵢ, or both) → Uᵢ diag(sᵢ) Vᵢᵀ       factor, share, nuclear, clip: which triplets take part
    sᵢ ← smoothed or restored                      smooth
    Ū = [U₁ … U_T], V̄ = [V₁ … V_T], or their polar factors                                            basis
    M = diag([s₁ … s_T]), or the TIES mean of ŪᵀΔᵢV̄ in T diagonal blocks                              core
    s ← s, its mean, or raised to a floor                                                          spectrum
    Δ = Ū M V̄ᵀ

TSV, Iso-C, Iso-CTS, DC-Merge, STAR, CART and Subspace Boosting are settings of it, a file a family. A weight wᵢ
multiplies the singular values of its task.

T counts the experts that changed the matrix (and have a weight), so that an untouched one changes nothing.
Directions below the numerical rank never take part, and dependent ones span what they span (methods/factors.py):
identical experts give the expert, opposite ones nothing, where the published codes add arbitrary directions. A
task keeps one triplet at least, also where T exceeds the rank.

A matrix is [out, in]; kernels are flattened to [out, in·kh·kw]; fused experts [E, out, in] are E matrices (told
from 1-d convolutions by a last axis of 16 and more, as rows are). Vectors and scalars have no spectrum and get the
mean Σ wᵢτᵢ / k, as in the published codes; `outside="mean"` gives it to all tensors outside the blocks too
(embeddings, heads). Bases and ranks are constants of the gradient, as masks are in other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from weft.late import Tensor, torch
from weft.methods.factors import RANK_TOL, Triplets, decompose, largest, polar, unit_scale
from weft.methods.measured import matrices, unmatrices
from weft.methods.params import Bounds, Fraction, Weight, per_model
from weft.methods.step import At, row_length, step
from weft.methods.ties import disjoint_mean, elect_sign

Factor = Literal["task", "sum", "both"]
Clip = Literal["numerical", "noise"]
Smooth = Literal["none", "mean", "linear", "restore"]
Basis = Literal["own", "polar"]
Core = Literal["diagonal", "ties"]
Spectrum = Literal["keep", "mean", "boost"]
Outside = Literal["spectral", "mean"]
Share = Annotated[float, Bounds(0.0, 1.0, open_low=True)]
AtLeastOne = Annotated[float, Bounds(1.0)]


@dataclass(frozen=True)
class Part:
    """Triplets of one matrix; s carries the matrix's gradient."""

    u: Tensor
    s: Tensor
    v: Tensor


@dataclass(frozen=True)
class Choices:
    """The plug-ins of the solver; see the step `spectral` for what they mean."""

    factor: Factor = "task"
    share: float | None = None
    nuclear: float = 1.0
    common: float = 0.8
    clip: Clip = "numerical"
    smooth: Smooth = "none"
    ratio: float = 5.0
    basis: Basis = "own"
    core: Core = "diagonal"
    density: float = 0.001
    spectrum: Spectrum = "keep"
    boost: float = 0.02


# -- factorise and truncate -------------------------------------------------------------------------------


def noise_floor(s: Tensor, m: int, n: int) -> float:
    """ω(β) · median(s) over all min(m, n) values: what white noise reaches (Gavish & Donoho, arXiv:1305.5870)."""
    p, q = sorted((m, n))
    beta = p / q
    whole = torch.cat([s, s.new_zeros(p - len(s))])
    return (0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43) * float(whole.median())


def kept_triplets(
    t: Tensor, rank: int, clip: Clip = "numerical", nuclear: float = 1.0, rest_of: Tensor | None = None
) -> Triplets:
    """Leading triplets of t [m, n]: at most `rank`, as many as hold a share `nuclear` of Σs.

    Of a matrix that is all noise by its floor one is kept all the same. `rest_of` is the matrix that t is left of,
    whose noise floor counts; then none may be.
    """
    if clip == "numerical" and nuclear >= 1:
        return decompose(t, rank)
    found = decompose(t)
    if clip == "noise":
        floor = noise_floor((found if rest_of is None else decompose(rest_of)).s, *t.shape)
        found = found.first(max(int(rest_of is None), int((found.s > floor).sum())))
    if nuclear < 1 and found.rank:
        mass = found.s.cumsum(0)
        rank = min(rank, 1 + int((mass < nuclear * mass[-1] * (1 - 1e-12)).sum()))
    return found.first(rank)


def part_of(t: Tensor, found: Triplets, weight: float = 1.0) -> Part:
    """The triplets of t with values uᵀtv, which carry its gradient, times the weight."""
    s = ((t.T @ found.u) * found.v).sum(0) if t.requires_grad else found.s
    return Part(found.u, s * weight, found.v)


def shares(p: int, share: float | None, t: int) -> int:
    """How many of p triplets a share is: ⌊share · p⌋, or ⌊p/T⌋ without one; one at least."""
    return max(1, int(p * share + 1e-9 * p) if share is not None else p // t)


def by_task(x: Sequence[Tensor], w: Sequence[float], how: Choices) -> list[Part]:
    """Every task vector by itself."""
    rank = shares(min(x[0].shape), how.share, len(x))
    parts = []
    for xi, wi in zip(x, w, strict=True):
        made = part_of(xi, kept_triplets(xi, rank, how.clip, how.nuclear), wi)
        parts.append(smoothed(made, xi, wi, how))
    return parts


def by_sum(x: Sequence[Tensor], w: Sequence[float], how: Choices) -> list[Part]:
    """The weighted sum."""
    total = added(x, w)
    rank = shares(min(total.shape), 1.0 if how.share is None else how.share, 1)
    return [part_of(total, kept_triplets(total, rank, how.clip, how.nuclear))]


def by_both(x: Sequence[Tensor], w: Sequence[float], how: Choices) -> list[Part]:
    """A common part of the sum, and of every task what lies outside its left space (Iso-CTS).

    The common part gives up as many directions as make the rest divisible by T.
    """
    total, p, t = added(x, w), min(x[0].shape), len(x)
    own = round((p - int(how.common * p)) / t)
    common = part_of(total, kept_triplets(total, max(0, p - own * t), how.clip))
    parts = [common]
    for xi, wi in zip(x, w, strict=True):
        rest = xi - common.u @ (common.u.T @ xi)
        # what rounding leaves of a task inside the common space is no residual
        inside = float(rest.detach().norm()) <= RANK_TOL * float(xi.detach().norm())
        parts.append(part_of(rest, kept_triplets(rest, 0 if inside else own, how.clip, rest_of=xi), wi))
    return parts


def added(x: Sequence[Tensor], w: Sequence[float]) -> Tensor:
    """Σ wᵢxᵢ; exactly zero where it is nothing but rounding."""
    total = x[0] * w[0]
    for xi, wi in zip(x[1:], w[1:], strict=True):
        total = total.add(xi, alpha=wi)
    terms = sum(abs(wi) * float(xi.detach().norm()) for xi, wi in zip(x, w, strict=True))
    return total * 0 if float(total.detach().norm()) <= 1e-12 * terms else total


FACTORS: dict[Factor, Callable[[Sequence[Tensor], Sequence[float], Choices], list[Part]]] = {
    "task": by_task, "sum": by_sum, "both": by_both,
}  # fmt: skip


# -- spectra ------------------------------------------------------------------------------------------------


def smoothed(part: Part, t: Tensor, weight: float, how: Choices) -> Part:
    """A task's kept values: all at their mean, on a line of at most `ratio`, or with the whole nuclear norm."""
    r = len(part.s)
    if how.smooth == "none" or not r:
        return part
    if how.smooth == "restore":
        whole, kept = decompose(t).s.sum(), float(part.s.detach().sum() / weight)
        return Part(part.u, part.s * (float(whole) / kept), part.v)
    if how.smooth == "mean":
        line = part.s.new_ones(r)
    else:
        steep = float((part.s[0] / part.s[-1]).detach()) > how.ratio
        if not steep:
            return part
        line = torch.linspace(how.ratio, 1.0, r, dtype=part.s.dtype, device=part.s.device)
    return Part(part.u, part.s.sum() * line / line.sum(), part.v)


def shaped(s: Tensor, rule: Spectrum, boost: float) -> Tensor:
    """The merged values: as they are, at their mean magnitude, or none below that where Σs reaches `boost`."""
    if rule == "keep" or not len(s):
        return s
    size = s.abs()
    if rule == "mean":
        return s.sign() * size.mean()
    order = size.detach().sort(descending=True)
    mass = order.values.cumsum(0)
    at = int((mass < boost * mass[-1]).sum())
    floor = size[order.indices[min(at, len(s) - 1)]]
    return s.sign() * torch.maximum(size, floor)


# -- core and lift ------------------------------------------------------------------------------------------


def lifted(parts: Sequence[Part], how: Choices) -> Tensor:
    """Ū M V̄ᵀ."""
    u, v = torch.cat([p.u for p in parts], 1), torch.cat([p.v for p in parts], 1)
    left, right = (polar(u), polar(v)) if how.basis == "polar" else (u, v)
    if how.core == "diagonal":
        s = shaped(torch.cat([p.s for p in parts]), how.spectrum, how.boost)
        return (left * s) @ right.T
    return left @ elected_core(parts, left, right, how.density) @ right.T


def elected_core(parts: Sequence[Part], left: Tensor, right: Tensor, density: float) -> Tensor:
    """The TIES mean of the tasks' cores [R, R], its T diagonal blocks only (DC-Merge).

    A core holds coordinates ūⱼᵀΔᵢv̄ₗ along directions of unit length: where bases are dependent the polar factors'
    columns are shorter, and identical experts would come out too small. Of each core the ⌊density · R²⌋ largest
    entries are kept, and those of its own triplets.
    """
    directions = [m / m.norm(dim=0).clamp_min(torch.finfo(m.dtype).tiny) for m in (left, right)]
    cores, mask = [], torch.zeros(left.shape[1], right.shape[1], dtype=torch.bool, device=left.device)
    start = 0
    for p in parts:
        core = (directions[0].T @ p.u * p.s) @ (p.v.T @ directions[1])
        size, stop = core.detach().abs(), start + len(p.s)
        kept = torch.zeros_like(mask)
        kept.diagonal()[start:stop] = True
        if count := int(density * core.numel()):
            # entries that should be equal differ in their last bits: all that tie with the last are kept
            kept |= size >= size.flatten().kthvalue(core.numel() - count + 1).values * (1 - 1e-9)
        cores.append(torch.where(kept, core, 0.0))
        mask[start:stop, start:stop] = True
        start = stop
    stack = torch.stack(cores)
    # sums of opposite cores are rounding, which has no sign
    balanced = stack.detach().sum(0).abs() <= 1e-9 * stack.detach().abs().sum(0)
    return torch.where(mask & ~balanced, disjoint_mean.fn(elect_sign.fn(stack)), 0.0)


# -- the solver ---------------------------------------------------------------------------------------------


def solve(x: Sequence[Tensor], weight: Sequence[float], how: Choices) -> Tensor:
    """One matrix merged: x k task matrices [m, n] → [m, n], float64."""
    sizes = [largest(xi) for xi in x]
    c = unit_scale(max(sizes))
    c = 1.0 if 2**-20 < c < 2**20 else c  # squares are safe as they are: spare the copies
    taking = [i for i, wi in enumerate(weight) if wi and sizes[i]]
    if not taking:
        return (x[0] * 0).double()
    scaled = [x[i].double() if c == 1 else x[i].double() * c for i in taking]
    return lifted(FACTORS[how.factor](scaled, [weight[i] for i in taking], how), how) / c


def is_spectral(at: At, outside: Outside) -> bool:
    """Whether the tensor is merged by its spectrum: a matrix with entries, in a block if only those are."""
    return len(at.shape) > 1 and at.numel > 0 and (outside == "spectral" or at.layer is not None)


def fused(at: At) -> int:
    """Matrices that the tensor holds: E for fused experts [E, out, in], else 1."""
    return at.shape[0] if len(at.shape) == 3 and row_length(at.shape) == at.shape[-1] else 1


def matrixwise(x: Tensor, at: At, merge: Callable[[list[Tensor]], Tensor]) -> Tensor:
    """`merge` of the k matrices [out, in] for every matrix that x [k, *shape] holds → [*shape], in x's dtype."""
    # contiguous, since a library's product rounds by layout
    stack = matrices(x, fused(at), at.transposed).contiguous()
    made = torch.stack([merge([s[b] for s in stack]) for b in range(stack.shape[1])])
    return unmatrices(made, at.shape, at.transposed).to(x.dtype)


def mean_of(x: Tensor, weight: Sequence[float]) -> Tensor:
    """Σ wᵢxᵢ / k, for what has no spectrum."""
    out = x[0] * weight[0]
    for xi, wi in zip(x[1:], weight[1:], strict=True):
        out = out + xi * wi
    return out / x.shape[0]


@step(grain="tensor", reduces=True)
def spectral(
    x: Tensor,
    *,
    at: At,
    weight: Weight = 1.0,
    average: bool = False,
    factor: Factor = "task",
    share: Share | None = None,
    nuclear: Share = 1.0,
    common: Fraction = 0.8,
    clip: Clip = "numerical",
    smooth: Smooth = "none",
    ratio: AtLeastOne = 5.0,
    basis: Basis = "own",
    core: Core = "diagonal",
    density: Fraction = 0.001,
    spectrum: Spectrum = "keep",
    boost: Fraction = 0.02,
    outside: Outside = "spectral",
) -> Tensor:
    """The solver, x: [k, *shape] → [*shape]; its methods are settings of it. See the page "Solvers".

    factor     decompose every task vector, their sum, or both (`common`: share of the sum's directions)
    share      triplets kept of min(m, n): ⌊p/T⌋ a task without it; all of a sum
    nuclear    fewest triplets that hold this share of Σs
    clip       leave out what is below the numerical rank, or below the noise floor of Gavish & Donoho
    smooth     a task's kept values: as they are, their mean, a line (s₁/sᵣ ≤ `ratio`), or scaled to all of Σs
    basis      the tasks' own directions side by side, or the nearest orthonormal ones (polar factors)
    core       diagonal, or the TIES mean of all tasks' cores (`density`: entries kept of each)
    spectrum   merged values as they are, their mean, or raised to where Σs reaches the share `boost`
    average    divide by k
    """
    k = x.shape[0]
    w = per_model(weight, k)
    if not is_spectral(at, outside):
        return mean_of(x, w)
    how = Choices(factor, share, nuclear, common, clip, smooth, ratio, basis, core, density, spectrum, boost)
    if average:
        w = [wi / k for wi in w]
    return matrixwise(x, at, lambda tasks: solve(tasks, w, how))
