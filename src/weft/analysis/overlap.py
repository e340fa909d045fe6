"""How much the subspaces of task vectors overlap, matrix by matrix, read from lazy checkpoints one at a time.

With Δᵢ = Uᵢ Σᵢ Vᵢᵀ the task matrix of model i, cut to the smallest rank r that keeps `energy` of ‖Δᵢ‖²:

    overlap(i, j) = ‖Uᵢᵀ Uⱼ‖²_F / min(rᵢ, rⱼ)      of the spaces written to; with V of those read from
    interference = ‖(Uᵀ U − I) Σ (Vᵀ V − I)‖₁ over the models' stacked U, Σ, V (task singular vectors,
    arXiv:2412.00081), as a share of Σ's sum

Random subspaces of dimension r in d overlap by r/d, which is given beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.similarity import Matrix, comparable
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import execution
from weft.checkpoints.limits import shown
from weft.errors import DataError, UsageError


@dataclass(frozen=True)
class MatrixOverlap:
    """One weight."""

    name: str
    ranks: tuple[int, ...]
    written: Matrix
    """Overlap of the column spaces, [k, k]."""
    read: Matrix
    chance: float
    """Overlap of random subspaces of the mean rank, of column spaces."""
    interference: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "ranks": list(self.ranks), "written": [list(r) for r in self.written],
                "read": [list(r) for r in self.read], "chance": self.chance,
                "interference": self.interference}  # fmt: skip


@dataclass(frozen=True)
class SubspaceOverlap(Finding):
    """All weights that are matrices, in the order of the data's flow."""

    names: tuple[str, ...]
    energy: float
    matrices: tuple[MatrixOverlap, ...]

    about: ClassVar[str] = (
        "Overlap of the leading singular subspaces of the models' task vectors, the mean over pairs: 1 is one "
        "space, the dotted line what random spaces of that rank have. Interference is that of arXiv:2412.00081."
    )

    @property
    def title(self) -> str:
        return "Subspace overlap"

    @property
    def headline(self) -> str:
        def mean(values: Sequence[float]) -> float:
            return sum(values) / len(values)

        return (f"mean overlap {mean([_pairs(m.written) for m in self.matrices]):.4f} of written and "
                f"{mean([_pairs(m.read) for m in self.matrices]):.4f} of read spaces (by chance "
                f"{mean([m.chance for m in self.matrices]):.4f}), mean interference "
                f"{mean([m.interference for m in self.matrices]):.4f}")  # fmt: skip

    def plot(self) -> Any:
        made = figure("", "mean over the pairs")
        x = [m.name for m in self.matrices]
        for label, values, dash in (
            ("written to", [_pairs(m.written) for m in self.matrices], "solid"),
            ("read from", [_pairs(m.read) for m in self.matrices], "solid"),
            ("by chance", [m.chance for m in self.matrices], "dot"),
            ("interference", [m.interference for m in self.matrices], "dash"),
        ):  # fmt: skip
            made.add_trace(
                graphs().Scatter(x=x, y=values, name=label, mode="lines+markers", line={"dash": dash})
            )
        made.update_xaxes(type="category")
        return made


def subspace_overlap(
    models: Sequence[Checkpoint],
    base: Checkpoint,
    *,
    energy: float = 0.9,
    names: Sequence[str] | None = None,
) -> SubspaceOverlap:
    """Overlaps of all matrices (convolutions as [out, in·kh·kw]); one weight of every model is in memory at a time.

    Raises UsageError for fewer than two models, an energy outside (0, 1] or models without matrices, DataError for
    values that are not finite, DataProblems where names or shapes differ.
    """
    if len(models) < 2 or not 0 < energy <= 1:
        raise UsageError(f"overlap needs two models and 0 < energy ≤ 1, not {len(models)} and {energy}")
    wide = [n for n in comparable(models, base) if _is_matrix(models[0].info(n).shape)]
    if not wide:
        raise UsageError("the models hold no matrices, so there are no subspaces to compare")
    found = execution().map(lambda n: _of(models, base, n, energy), wide)
    labels = tuple(names) if names is not None else tuple(m.origin for m in models)
    return SubspaceOverlap(labels, energy, tuple(f for f in found if f is not None))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) >= 2 and min(shape[0], prod(shape[1:])) > 1


def _of(models: Sequence[Checkpoint], base: Checkpoint, name: str, energy: float) -> MatrixOverlap:
    start = base.tensor(name).double().flatten(1)
    us, ss, vs = [], [], []
    for model in models:
        delta = model.tensor(name).double().flatten(1) - start
        if not bool(delta.isfinite().all()):
            raise DataError(f"{shown(name)} holds NaN or infinite values in {model.origin} or the base")
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        r = effective_rank(s, energy)
        us.append(u[:, :r])
        ss.append(s[:r])
        vs.append(vh[:r].T)
    ranks = tuple(u.shape[1] for u in us)
    chance = sum(ranks) / len(ranks) / start.shape[0]
    return MatrixOverlap(
        name, ranks, _overlaps(us), _overlaps(vs), min(chance, 1.0), _interference(us, ss, vs)
    )


def effective_rank(singular: Tensor, energy: float) -> int:
    """The smallest r with Σ_{i≤r} σᵢ² ≥ energy · Σ σ²; 0 for a matrix of zeros."""
    squares = singular.double().square()
    total = squares.sum()
    if float(total) == 0:
        return 0
    reached = squares.cumsum(0) >= energy * total * (1 - 1e-12)
    return int(reached.double().argmax()) + 1


def _overlaps(bases: Sequence[Tensor]) -> Matrix:
    def one(a: Tensor, b: Tensor) -> float:
        r = min(a.shape[1], b.shape[1])
        return min(1.0, float((a.T @ b).square().sum()) / r) if r else 0.0

    return tuple(tuple(one(a, b) for b in bases) for a in bases)


def _interference(us: Sequence[Tensor], ss: Sequence[Tensor], vs: Sequence[Tensor]) -> float:
    u, s, v = torch.cat(list(us), 1), torch.cat(list(ss)), torch.cat(list(vs), 1)
    if not s.numel():
        return 0.0
    eye = torch.eye(len(s), dtype=s.dtype)
    return float(((u.T @ u - eye) @ (s[:, None] * (v.T @ v - eye))).abs().sum() / s.sum())


def _pairs(matrix: Matrix) -> float:
    values = [matrix[i][j] or 0.0 for i in range(len(matrix)) for j in range(i)]
    return sum(values) / len(values)
