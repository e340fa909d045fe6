"""Rules for the spectrum of what another method has merged: SVC, Subspace Boosting.

    Δ = U diag(s) Vᵀ                                                     the other method's task vector
    SVC: aᵢʳ = uᵣᵀτᵢ,  pᵢʳ = ⟨uᵣᵀΔ, aᵢʳ⟩ / ‖aᵢʳ‖²,  sᵣ ← sᵣ T / Σᵢ max(α, pᵢʳ)        ICML 2026, arXiv:2602.05536
    Boosting: sᵣ ← max(sᵣ, s at which Σs has reached a share β)                        arXiv:2506.16506

pᵢʳ says how often task i's part along uᵣ is contained in the merge: k times where k tasks share it, and the
calibration undoes that over-counting. A task with no part along uᵣ has no say in γᵣ (T and the sum leave it out),
where 0/0 would otherwise raise the directions of single tasks. α bounds the raise: 0.1 in the paper, 1 after TSV-M,
which are the defaults. The paper reports it after Iso-C too, which is no choice here: all singular values are equal
then, so that the directions uᵣ are arbitrary. Δ is multiplied by U diag(γ) Uᵀ, so V is never needed.

Subspace Boosting counts the share over singular values (not their squares); β is weft's choice, since the
papers' choice is by data. Both leave vectors as the other method gives them, and null directions alone.
"""

from __future__ import annotations

from typing import Any, Literal

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.factors import decompose, largest, unit_scale
from weft.methods.params import Fraction, NonNegative, Weight
from weft.methods.registry import METHODS, method
from weft.methods.spectral import is_spectral, matrixwise, spectral
from weft.methods.step import At, Pipeline, step

After = Literal["task_arithmetic", "mean", "ties", "tsv"]
ALPHA: dict[str, float] = {"tsv": 1.0}
"""The paper's least contribution after each method; 0.1 after the others."""


def gains(u: Tensor, merged: Tensor, tasks: list[Tensor], alpha: float) -> Tensor:
    """γᵣ = T / Σᵢ max(α, pᵢʳ) over the tasks that have a part along uᵣ; [r]."""
    along = u.T @ merged
    total, count = torch.zeros_like(along[:, 0]), torch.zeros_like(along[:, 0])
    for t in tasks:
        own = u.T @ t
        square = own.square().sum(1)
        there = square > 1e-10 * along.square().sum(1)
        p = (along * own).sum(1) / torch.where(there, square, 1.0)
        total, count = total + torch.where(there, p.clamp_min(alpha), 0.0), count + there.to(total.dtype)
    return torch.where(total > 0, count / torch.where(total > 0, total, 1.0), 1.0)


@step(grain="tensor", reduces=True)
def calibrated(
    x: Tensor, *, at: At, after: After = "task_arithmetic", weight: Weight = 1.0,
    alpha: NonNegative | None = None,
) -> Tensor:  # fmt: skip
    """Merge by another method, then calibrate the merged singular values. x: [k, *shape] → [*shape]."""
    params: dict[str, Any] = {"weight": weight}
    inner = METHODS["task_arithmetic" if after == "mean" else after].pipeline(**params)
    least = ALPHA.get(after, 0.1) if alpha is None else alpha
    merged = inner(x, at=at)
    if after == "mean":
        merged = merged / x.shape[0]
    if not is_spectral(at, "spectral"):
        return merged

    def calibrate(pair: list[Tensor]) -> Tensor:
        *tasks, delta = (t.double() for t in pair)
        c = unit_scale(max(map(largest, (*tasks, delta))))
        u = decompose(delta * c).u
        gamma = gains(u, delta.detach() * c, [t.detach() * c for t in tasks], least)
        return (u * gamma) @ (u.T @ delta)

    return matrixwise(torch.cat([x, merged[None]]), at, calibrate)


@method(space="deltas", paper="SVC, arXiv:2602.05536")
def svc(
    *,
    after: After = "task_arithmetic",
    weight: Weight = 1.0,
    alpha: NonNegative | None = None,
    scale: float = 1.0,
) -> Pipeline:
    """Undo the over-counting of directions that tasks share, after another method's merge.

    `after` is that method, with its defaults (TIES trims each tensor by itself).
    """
    return calibrated(after=after, weight=weight, alpha=alpha) | scaled(scale=scale)


@method(space="deltas", paper="Subspace Boosting, arXiv:2506.16506")
def subspace_boosting(*, weight: Weight = 1.0, beta: Fraction = 0.02, scale: float = 1.0) -> Pipeline:
    """Add up task vectors and raise the small singular values of the sum, against the collapse of its rank.

    Values below the one at which Σs has reached the share `beta` are raised to it; 0 makes all the largest.
    """
    merged = spectral(weight=weight, factor="sum", spectrum="boost", boost=beta)
    return merged | scaled(scale=scale)
