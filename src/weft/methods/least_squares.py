"""One Gram solver: least squares on the inputs of every linear map, whichever the source of their Gram matrices.

    min over M of Σ wᵢ ‖(M − τᵢ) Gᵢ^½‖²
    C = Σ wᵢGᵢ,  R = Σ wᵢ(τᵢ − M₀)Gᵢ,  M = M₀ + R V diag(f(λ)/λ) Vᵀ            C = V diag(λ) Vᵀ

    Gᵢ    its source: measured inputs XᵢᵀXᵢ/n (weft measure --what gram); the change τᵢᵀτᵢ itself, since gradients
          are sums of δxᵀ, so that rows of τᵢ lie where its inputs did; or a mixture of both
    wᵢ    a weight, over nothing, over tr Gᵢ, or over the energy of the outputs tr(WᵢGᵢWᵢᵀ)
    f     how C is inverted: inverse.py
    M₀    what directions keep that no input takes: 0, the mean of τᵢ, their sum, or TSV-M's merge, times a scale

RegMean, LOT, WUDI, SWUDI, ACTMat, ACE and IterIS are settings of it, a file a family.

Where C has full rank this is the papers' closed form. Where it has not, their codes fail or give NaN, and here M₀
is kept: for a dead feature, an empty Gram matrix, fewer samples than inputs, a matrix that no expert changed. With
Gᵢ = τᵢᵀτᵢ, experts that did not change a matrix take no part in it, and all is computed in the span of the others'
rows where that is small, as adapters leave it.

A matrix is [out, in]; kernels are [out, in·kh·kw]; blocks (fused experts, groups) are matrices each by itself.
Vectors and what was not measured get the mean Σ wᵢτᵢ / Σ wᵢ. Gram matrices are constants of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Literal, Protocol

from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.averages import weighted_sum
from weft.methods.factors import largest, low_rank, unit_scale
from weft.methods.inverse import EIGEN_TOL, STORED_TOL, Inverse, applied, descent
from weft.methods.measured import unmatrices
from weft.methods.params import Bounds, PerModel, per_model
from weft.methods.spectral import Choices, Outside, fused, is_spectral
from weft.methods.spectral import solve as spectral_merge
from weft.methods.step import At, row_length

Weights = Annotated[PerModel, Bounds(0.0, per_model=True)]
"""One weight a model; least squares with a negative one have no least."""
Keep = Literal["zero", "mean", "sum", "tsv"]
Normalize = Literal["none", "trace", "outputs"]


class Grams(Protocol):
    """Gram matrices [k, (b,) n, n], read one by one: a stack, or what measured.py reads when asked."""

    @property
    def shape(self) -> Sequence[int]: ...
    def __getitem__(self, at: int | tuple[int, int], /) -> Tensor: ...


@dataclass(frozen=True)
class Settings:
    """What the solver does; see the module's docstring."""

    prior: float = 0.0
    """The share of τᵢᵀτᵢ/‖τᵢ‖² in Gᵢ, beside that of the measured matrix over its trace; 0 measured alone."""
    off_diagonal: float = 1.0
    normalize: Normalize = "none"
    keep: Keep = "mean"
    keep_scale: float = 1.0
    inverse: Inverse = field(default_factory=Inverse)
    steps: int = 0
    """Steps of Adam instead of an inverse."""
    rate: float = 1e-5


def change(t: Tensor) -> Tensor:
    """τᵀτ [n, n]."""
    return t.T @ t


def of_change(t: Tensor) -> Moments:
    return Moments(change(t))


def trace(g: Tensor) -> float:
    return float(g.diagonal().sum())


@dataclass(frozen=True)
class Moments:
    """Second moments of a task's inputs, [n, n] float64."""

    g: Tensor
    """Of the inputs x̃ that the merged map is to be good on; may be written to."""
    cross: Tensor | None = None
    """Σ x x̃ᵀ, where the task's outputs were those of other inputs x: the target is τᵢ Σ x x̃ᵀ, not τᵢ Gᵢ."""
    own: Tensor | None = None
    """Of these x."""


@dataclass(frozen=True)
class Task:
    """One expert's part in one matrix."""

    t: Tensor
    """[m, n], float64."""
    weight: float
    moments: Callable[[], Moments]
    whole: Tensor | None = None
    """The weights Wᵢ themselves, where outputs are to be weighed."""


def normalised(task: Task, has: Moments, how: Settings) -> float:
    """wᵢ over what `normalize` says; 0 where that is zero, since such a task has no inputs."""
    if how.normalize == "none":
        return task.weight
    if how.normalize == "trace" or task.whole is None:
        size = trace(has.g)
    else:
        size = float(((task.whole @ (has.g if has.own is None else has.own)) * task.whole).sum())
    return task.weight / size if size > 0 else 0.0


def kept(tasks: Sequence[Task], how: Settings) -> Tensor:
    """M₀ [m, n]."""
    t, w = [task.t for task in tasks], [task.weight for task in tasks]
    if how.keep == "zero" or how.keep_scale == 0:
        return torch.zeros_like(t[0])
    if how.keep == "tsv":
        return spectral_merge(t, w, Choices(basis="polar")) * how.keep_scale
    total = t[0] * w[0]
    for ti, wi in zip(t[1:], w[1:], strict=True):
        total = total.add(ti, alpha=wi)
    return total * (how.keep_scale / (sum(w) if how.keep == "mean" else 1.0))


def solve(tasks: Sequence[Task], how: Settings, n: int, rows: int, tol: float, eps: float = 1e-8) -> Tensor:
    """One matrix merged: M [m, n], for tasks with a weight; `n` and `rows` as in inverse.py."""
    start = kept(tasks, how)
    fresh = any(task.t.requires_grad for task in tasks)  # autograd keeps each Gram matrix as it was
    c = r = None
    for task in tasks:
        has = task.moments()
        w, g = normalised(task, has, how), has.g
        if w:
            g.mul_(w)
            term = (task.t - start) @ g if has.cross is None else task.t @ (has.cross * w) - start @ g
            if c is None or r is None:
                c, r = g.clone() if fresh else g, term
            else:
                c, r = c.add_(g), r + term if fresh else r.add_(term)
        del has, g  # before the next one is read
    if c is None or r is None:
        return start
    if how.steps:
        return start + descent(r, c, how.steps, how.rate, eps)
    found = applied(r, c, how.inverse, n, rows, tol)
    return start + found if fresh else found.add_(start)


# -- sources ------------------------------------------------------------------------------------------------


def from_changes(t: Sequence[Tensor], w: Sequence[float], how: Settings) -> Tensor:
    """M [m, n] with Gᵢ = τᵢᵀτᵢ of the experts that changed the matrix, in the span of their rows if small."""
    sizes = [largest(x) for x in t]
    taking = [i for i, wi in enumerate(w) if wi and sizes[i]]
    if not taking:
        return torch.zeros_like(t[0])
    c = unit_scale(max(sizes))
    c = 1.0 if 2**-20 < c < 2**20 else c  # squares are safe as they are: spare the copies
    own = [t[i] if c == 1 else t[i] * c for i in taking]
    # Adam goes by coordinates, so a turned basis would be another descent
    basis = None if how.steps else row_space([x.detach() for x in own])
    parts = own if basis is None else [x @ basis for x in own]
    tasks = [Task(x, w[i], partial(of_change, x.detach())) for x, i in zip(parts, taking, strict=True)]
    how = replace(how, rate=how.rate * c)
    rows = sum(len(x) for x in own)
    made = solve(tasks, how, t[0].shape[1], rows, EIGEN_TOL, 1e-8 * c)
    return (made if basis is None else made @ basis.T) / c


def row_space(t: Sequence[Tensor]) -> Tensor | None:
    """An orthonormal basis [n, r] of what the rows of all t span, where r is at most n/2 and cheap to find."""
    m, n = t[0].shape
    spans = []
    for x in t:
        found = low_rank(x) if len(t) * m > n // 2 else None
        spans.append(x.T / x.norm() if found is None else found.v)
        if sum(s.shape[1] for s in spans) > n // 2:
            return None
    basis: Tensor = torch.linalg.qr(torch.cat(spans, 1))[0]
    return basis


def mixed(read: Callable[[], Tensor], t: Tensor, how: Settings) -> Moments:
    """(1 − ρ) G / tr G + ρ τᵀτ / ‖τ‖², or the measured G with its off-diagonals shrunk."""
    g, alpha = read().detach(), how.off_diagonal
    if g.shape[-1] == 2 * t.shape[-1]:  # of x and x̃ side by side
        n = t.shape[-1]
        p = g.to(torch.float64, copy=True)
        return Moments(p[n:, n:], p[:n, n:], p[:n, :n])
    g = g.to(torch.float64, copy=True)
    if alpha < 1:
        diagonal = g.diagonal().clone()
        g.mul_(alpha).diagonal().copy_(diagonal)
    if not how.prior:
        return Moments(g)
    own = change(t)
    size, norm = trace(g), trace(own)
    g.mul_((1 - how.prior) / size if size > 0 else 0.0)
    return Moments(g.add_(own, alpha=how.prior / norm) if norm > 0 else g)


def from_inputs(
    t: Sequence[Tensor], grams: Sequence[Callable[[], Tensor]], w: Sequence[float], how: Settings,
    base: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """M [m, n] with measured Gᵢ, mixed with τᵢᵀτᵢ as `prior` says. `base` makes Wᵢ = base + τᵢ, else Wᵢ = τᵢ."""
    outputs = how.normalize == "outputs"
    tasks = [
        Task(x, wi, partial(mixed, g, x.detach(), how),
             None if not outputs else x.detach() if base is None else base + x.detach())
        for x, g, wi in zip(t, grams, w, strict=True) if wi
    ]  # fmt: skip
    n = t[0].shape[1]
    return solve(tasks, how, n, n, STORED_TOL)


# -- tensors ------------------------------------------------------------------------------------------------


def some(weight: PerModel, k: int) -> list[float]:
    """The weights of k models; UsageError where no model has one."""
    w = per_model(weight, k)
    if not any(w):
        raise UsageError(f"weights {w} sum to zero: change a weight")
    return w


def averaged(x: Tensor, weight: PerModel) -> Tensor:
    """Σ wᵢxᵢ / Σ wᵢ, for what has no Gram matrix."""
    return weighted_sum.fn(x, weight=weight, normalize=True)


def blocks_of(x: Tensor, d: int, blocks: int, transposed: bool) -> Tensor:
    """Weights x [k, *shape] as b maps of d inputs each: [k, b, out, d], rows side by side in memory."""
    if transposed:
        return x.reshape(x.shape[0], blocks, d, -1).transpose(-1, -2).contiguous()
    return x.reshape(x.shape[0], blocks, -1, d).contiguous()


def stacked(made: Sequence[Tensor]) -> Tensor:
    """[b, m, n], without a copy of the only one."""
    return made[0][None] if len(made) == 1 else torch.stack(list(made))


def by_changes(x: Tensor, at: At, weight: PerModel, outside: Outside, how: Settings) -> Tensor:
    """Every matrix that x [k, *shape] holds merged by the Gram matrices of its changes → [*shape]."""
    if not is_spectral(at, outside):
        return averaged(x, weight)
    w, b = some(weight, x.shape[0]), fused(at)
    turned = at.transposed and len(at.shape) == 2 + (b > 1)
    d = at.shape[-2] if turned else row_length(at.shape) if b > 1 else at.numel // at.shape[0]
    stack = blocks_of(x, d, b, turned).double()
    made = [from_changes([s[i] for s in stack], w, how) for i in range(b)]
    return unmatrices(stacked(made), at.shape, turned).to(x.dtype)


def by_inputs(
    x: Tensor, gram: Grams, at: At, weight: PerModel, how: Settings, base: Tensor | None = None,
    paired: bool = False,
) -> Tensor:  # fmt: skip
    """Every map that x [k, *shape] holds merged by the Gram matrices of its inputs [k, (b,) d, d] → [*shape].

    Where `paired` they are [k, (b,) 2d, 2d], of the models' own inputs and the merged model's side by side.
    """
    k, b = x.shape[0], gram.shape[1] if len(gram.shape) == 4 else 1
    d = gram.shape[-1] // (2 if paired else 1)
    w = some(weight, k)
    stack = blocks_of(x, d, b, at.transposed).double()
    own = None if base is None else blocks_of(base[None], d, b, at.transposed).double()[0]

    def reader(i: int, block: int) -> Callable[[], Tensor]:
        return lambda: gram[i, block] if len(gram.shape) == 4 else gram[i]

    made = [
        from_inputs(
            [s[j] for s in stack], [reader(i, j) for i in range(k)], w, how, None if own is None else own[j]
        )
        for j in range(b)
    ]
    return unmatrices(stacked(made), at.shape, at.transposed).to(x.dtype)
