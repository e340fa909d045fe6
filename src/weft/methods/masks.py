"""One vector and a mask a task: TALL masks, Consensus merging, EMR-Merging.

tall_masks   τ = Σ wᵢτᵢ                 mₜ = 1[|τₜ| ≥ ℓ |τ − τₜ|]            θ = θ0 + mₜ ⊙ τ
consensus    c = Σₜ mₜ                  θ = θ0 + λ 1[c ≥ m] ⊙ τ            Wang et al. 2024, arXiv:2405.07813
emr          γ = sign Σ τᵢ              ε = max over {i: sign τᵢ = γ} of |τᵢ|      τ = γ ⊙ ε
             mₜ = 1[τₜ ⊙ τ > 0]          λₜ = Σ_tensors mean |τₜ| / Σ_tensors mean |mₜ ⊙ τ|
             θ = θ0 + λₜ mₜ ⊙ τ         Huang et al. 2024, arXiv:2405.17461

tall_masks and emr give one model a task (`task`: its index): storing τ, one bit a parameter and task, and
λₜ is enough to make all of them. emr without a task gives θ0 + τ. Consensus gives one model: m = 2 drops the
parameters that no task needs (catastrophic) or only one (selfish); of="ties" masks the TIES vector.

EMR elects minus where the sum is zero. Its rescaler is a ratio of sums over tensors of per-tensor means,
not of L1 norms of the whole model (`scope="tensor"` takes each tensor's own ratio); where a mask is empty
it is 1. FusionBench compares with θ0 in place of τₜ for TALL masks, which gives other masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.averages import scaled, weighted_sum
from weft.methods.params import Bounds, Density, NonNegative, Scope, Weight
from weft.methods.registry import method
from weft.methods.stats import Sums
from weft.methods.step import At, Pipeline, step
from weft.methods.ties import Tie, disjoint_mean, elect_sign, trim

Task = Annotated[int, Bounds(0)]


def of_task(x: Tensor, task: int) -> Tensor:
    """The task's own vector, x: [k, *shape] → [*shape]."""
    if task >= x.shape[0]:
        raise UsageError(f"there is no task {task}: the {x.shape[0]} models are tasks 0 to {x.shape[0] - 1}")
    return x[task]


# -- TALL masks and consensus -------------------------------------------------------------------------


def tall_mask(x: Tensor, merged: Tensor, threshold: float) -> Tensor:
    """mₜ of each task vector in x, given the multi-task vector: bool, shape of x."""
    return x.detach().abs() >= threshold * (merged.detach() - x.detach()).abs()


@step(reduces=True)
def localize(x: Tensor, *, task: Task, threshold: NonNegative = 0.4, weight: Weight = 1.0) -> Tensor:
    """The multi-task vector Σ wᵢτᵢ where it serves this task, zero elsewhere."""
    merged = weighted_sum.fn(x, weight=weight)
    return torch.where(tall_mask(of_task(x, task), merged, threshold), merged, 0.0)


@step(reduces=True)
def agreed(x: Tensor, *, threshold: NonNegative = 0.4, min_tasks: Task = 2, weight: Weight = 1.0) -> Tensor:
    """Σ wᵢτᵢ where at least `min_tasks` tasks need it."""
    merged = weighted_sum.fn(x, weight=weight)
    return torch.where(tall_mask(x, merged, threshold).sum(0) >= min_tasks, merged, 0.0)


@step(stat=trim.stat, reduces=True)
def agreed_ties(
    x: Tensor,
    *,
    threshold: Tensor,
    mask_threshold: NonNegative = 0.4,
    min_tasks: Task = 2,
    weight: Weight = 1.0,
    density: Density = 0.2,
    scope: Scope = "model",
    tie: Tie = "none",
) -> Tensor:
    """The TIES vector where at least `min_tasks` tasks need it. `threshold` is the trim's, [k, 1]."""
    trimmed = trim.fn(x, threshold=threshold, density=density, scope=scope)
    merged = disjoint_mean.fn(elect_sign.fn(trimmed, weight=weight, tie=tie), weight=weight)
    return torch.where(tall_mask(x, merged, mask_threshold).sum(0) >= min_tasks, merged, 0.0)


@method(space="deltas", paper="Wang et al., TALL-masks, arXiv:2405.07813", per_task=True)
def tall_masks(*, task: Task, threshold: NonNegative = 0.4, weight: Weight = 1.0) -> Pipeline:
    """One task's model out of the multi-task vector and that task's mask.

    The authors choose `threshold` for each task on validation data, among 0.2 to 0.6.
    """
    return localize(task=task, threshold=threshold, weight=weight)


@method(space="deltas", paper="Wang et al., Consensus Merging, arXiv:2405.07813")
def consensus(
    *,
    weight: Weight = 1.0,
    threshold: NonNegative = 0.4,
    min_tasks: Task = 2,
    of: Literal["sum", "ties"] = "sum",
    density: Density = 0.2,
    scope: Scope = "model",
    tie: Tie = "none",
    scale: float = 0.3,
) -> Pipeline:
    """Keep of the multi-task vector what at least two tasks need.

    `of="ties"` masks the TIES vector; `density`, `scope` and `tie` are its parameters.
    """
    if of == "sum":
        merged = agreed(threshold=threshold, min_tasks=min_tasks, weight=weight)
    else:
        merged = agreed_ties(
            mask_threshold=threshold, min_tasks=min_tasks, weight=weight,
            density=density, scope=scope, tie=tie,
        )  # fmt: skip
    return merged | scaled(scale=scale)


# -- EMR ----------------------------------------------------------------------------------------------


def unify(x: Tensor) -> Tensor:
    """EMR's elected vector γ ⊙ ε, x: [k, *shape] → [*shape]."""
    total = weighted_sum.fn(x.detach())
    sign = torch.where(total > 0, 1.0, -1.0).to(x.dtype)
    largest = torch.zeros_like(x[0])
    for xi in x:
        largest = torch.maximum(largest, xi * sign)  # |xᵢ| where the sign agrees, else below zero
    return sign * largest


def emr_masks(x: Tensor, unified: Tensor) -> Tensor:
    """mₜ of each task vector in x: bool, shape of x."""
    return x.detach() * unified.detach() > 0


def _ratio(masses: Tensor) -> Tensor:
    """masses: [2, …] = (of the task vector, of the masked unified vector) → λ."""
    own, kept = masses
    return torch.where(kept > 0, own / torch.where(kept > 0, kept, 1.0), 1.0)


def emr_rescalers(stacks: Iterable[Tensor]) -> Tensor:
    """λₜ of every task, [k], from the stacks [k, *shape] of all tensors of a model."""
    masses: Tensor | float = 0.0
    for x in stacks:
        unified = unify(x)
        kept = torch.where(emr_masks(x, unified), unified, 0.0)
        means = torch.stack([v.reshape(x.shape[0], -1).abs().double().mean(1) for v in (x, kept)])
        masses = masses + means.nan_to_num()  # an empty tensor has no mean
    if isinstance(masses, float):
        raise UsageError("EMR's rescalers need at least one tensor")
    return _ratio(masses)


def _masses(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    own, unified = of_task(x, params["task"]), unify(x)
    kept = torch.where(emr_masks(own, unified), unified, 0.0)
    return torch.stack([own.abs(), kept.abs()]).double() / max(at.numel, 1)  # [2, n]


@step(reduces=True)
def elect_largest(x: Tensor) -> Tensor:
    """EMR's unified vector: the elected sign with the largest magnitude that has it."""
    return unify(x)


@step(stat=Sums("masses", _masses, scope="model"), reduces=True)
def modulate(x: Tensor, *, masses: Tensor, task: Task, scope: Scope = "model") -> Tensor:
    """The unified vector, masked and rescaled for one task. masses: [2]."""
    unified = unify(x)
    kept = torch.where(emr_masks(of_task(x, task), unified), unified, 0.0)
    return kept * _ratio(masses).to(kept)


@method(space="deltas", paper="Huang et al., EMR-Merging, arXiv:2405.17461", per_task=True)
def emr(*, task: Task | None = None, scope: Scope = "model") -> Pipeline:
    """Elect one vector, then mask and rescale it for a task.

    Without `task`, the unified vector itself, which serves every task a little.
    """
    return elect_largest() if task is None else modulate(task=task, scope=scope)
