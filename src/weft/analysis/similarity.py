"""How alike several models are, from their weights alone, in bounded memory: cosines, kinship, sign conflicts.

With δᵢ the task vectors (θᵢ − base), or the weights themselves without a base:

    cosine ⟨δᵢ, δⱼ⟩ / ‖δᵢ‖‖δⱼ‖      distance ‖δᵢ − δⱼ‖
    correlation: the cosine of the centred vectors      kinship: the mean over the pairs (arXiv:2410.12613)
    conflict: the share of the entries that both change in which they change to opposite signs

All come from sums over ranges, so no more than a range of every model is in memory. Signs are kept: opposite task
vectors have cosine −1. Sums are taken by tile and added in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, matrix_figure
from weft.analysis.groups import group_of, in_order
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.execution import execution, ranges
from weft.checkpoints.limits import shown
from weft.errors import DataProblems, UsageError
from weft.methods.stats import pairs, tile_sums

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Sums:
    """Over some elements: inner products [k, k], sums [k], opposite and jointly nonzero counts [k, k], elements."""

    gram: Tensor
    totals: Tensor
    opposite: Tensor
    joint: Tensor
    numel: int

    @staticmethod
    def added(parts: Sequence[Sums]) -> Sums:
        """Over the elements of all parts, the real sums rounded once."""

        def exactly(tensors: Sequence[Tensor]) -> Tensor:
            every = torch.stack(list(tensors)).flatten(1).T.tolist()
            return torch.tensor([math.fsum(v) for v in every], dtype=torch.float64).reshape(tensors[0].shape)

        return Sums(
            exactly([p.gram for p in parts]), exactly([p.totals for p in parts]),
            torch.stack([p.opposite for p in parts]).sum(0), torch.stack([p.joint for p in parts]).sum(0),
            sum(p.numel for p in parts),
        )  # fmt: skip

    @property
    def cosine(self) -> Matrix:
        return _normalised(self.gram)

    @property
    def correlation(self) -> Matrix:
        return _normalised(self.gram - torch.outer(self.totals, self.totals) / max(self.numel, 1))

    @property
    def conflict(self) -> Matrix:
        ratio = self.opposite.double() / self.joint.clamp(min=1)
        return tuple(tuple(row) for row in ratio.tolist())

    @property
    def distance(self) -> Matrix:
        d = self.gram.diagonal()
        return tuple(tuple(row) for row in (d[:, None] + d - 2 * self.gram).clamp(min=0).sqrt().tolist())


@dataclass(frozen=True)
class Similarity(Finding):
    """Matrices over the models, for all weights and by layer."""

    names: tuple[str, ...]
    base: str | None
    norms: tuple[float, ...]
    cosine: Matrix
    """None where a vector is zero."""
    correlation: Matrix
    conflict: Matrix
    distance: Matrix
    layers: tuple[str, ...]
    layer_cosine: tuple[float | None, ...]
    """The mean cosine of the pairs, by layer."""
    layer_conflict: tuple[float, ...]

    about: ClassVar[str] = (
        "Cosines between the task vectors (or weights), and the share of entries changed to opposite signs. Near "
        "0 and with few conflicts, models learned different things and add up; the mean cosine is the kinship "
        "(arXiv:2410.12613)."
    )

    @property
    def title(self) -> str:
        return f"Similarity of {'task vectors' if self.base is not None else 'weights'}"

    @property
    def kinship(self) -> float | None:
        """The mean cosine over the pairs; None where a vector is zero."""
        return _mean_of_pairs(self.cosine)

    @property
    def headline(self) -> str:
        kinship = "none" if self.kinship is None else f"{self.kinship:.4f}"
        conflict = _mean_of_pairs(self.conflict)
        return f"mean cosine of the pairs (kinship) {kinship}, mean sign conflict {conflict:.4f}"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"kinship": self.kinship}

    def plot(self) -> Any:
        return matrix_figure(self.names, self.names, self.cosine, signed=True, label="cosine")

    def plot_conflicts(self) -> Any:
        """The matrix of sign conflicts."""
        return matrix_figure(self.names, self.names, self.conflict, label="conflict")

    def plot_layers(self) -> Any:
        """Mean cosine and conflict of the pairs along the network."""
        from weft.analysis.finding import figure, graphs

        made = figure("", "mean over the pairs")
        for label, values in (("cosine", self.layer_cosine), ("sign conflict", self.layer_conflict)):
            made.add_trace(graphs().Scatter(x=self.layers, y=values, name=label, mode="lines+markers"))
        made.update_xaxes(type="category")
        return made


def similarity(
    models: Sequence[Checkpoint],
    base: Checkpoint | None = None,
    *,
    group: Callable[[str], str] = group_of,
    names: Sequence[str] | None = None,
) -> Similarity:
    """Compare models by weights, streaming; work is shared as the execution in force says.

    Raises UsageError for fewer than two models, DataProblems where names or shapes differ or values are not finite.
    """
    if len(models) < 2:
        raise UsageError("similarity is between at least two models")
    weights = comparable(models, base)
    found = dict(zip(weights, execution().map(lambda n: _of(models, base, n), weights), strict=True))
    bad = [shown(n) for n, s in found.items() if not bool(s.gram.isfinite().all())]
    if bad:
        raise DataProblems("these tensors hold NaN or infinite values in one of the models", bad)
    layers: dict[str, list[Sums]] = {}
    for name in in_order(found):
        layers.setdefault(group(name), []).append(found[name])
    by_layer = {layer: Sums.added(parts) for layer, parts in layers.items()}
    total = Sums.added(list(found.values()))
    labels = tuple(names) if names is not None else tuple(m.origin for m in models)
    return Similarity(
        labels, None if base is None else base.origin, tuple(total.gram.diagonal().clamp(min=0).sqrt().tolist()),
        total.cosine, total.correlation, total.conflict, total.distance, tuple(by_layer),
        tuple(_mean_of_pairs(s.cosine) for s in by_layer.values()),
        tuple(_mean_of_pairs(s.conflict) or 0.0 for s in by_layer.values()),
    )  # fmt: skip


def comparable(models: Sequence[Checkpoint], base: Checkpoint | None) -> list[str]:
    """The floating tensors that all have, in the order of the data's flow; every mismatch at once."""
    first, problems = models[0], []
    for other in (*models[1:], *([base] if base is not None else [])):
        for n in dict.fromkeys([*first, *other]):
            stored = [source.aliases.get(n, n) for source in (first, other)]
            if stored[0] not in first or stored[1] not in other:
                problems.append(f"{shown(n)}: not in {(first if stored[0] not in first else other).origin}")
            elif first.info(stored[0]).shape != other.info(stored[1]).shape:
                shapes = [list(s.info(t).shape) for s, t in zip((first, other), stored, strict=True)]
                problems.append(
                    f"{shown(n)}: shape {shapes[0]} in {first.origin}, {shapes[1]} in {other.origin}"
                )
    if problems:
        raise DataProblems("these models cannot be compared: their tensors differ", problems)
    return [n for n in in_order(first) if is_mergeable(first.info(n).dtype)]


def _of(models: Sequence[Checkpoint], base: Checkpoint | None, name: str) -> Sums:
    """One tensor, range by range."""
    how, k = execution(), len(models)
    sources = [*models, *([base] if base is not None else [])]
    stored = [s.aliases.get(name, name) for s in sources]
    for source, n in zip(sources, stored, strict=True):
        source.ready(n)
    grain = math.lcm(*(s.grain(n) for s, n in zip(sources, stored, strict=True)))

    def one(cut: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x = torch.stack([s.read(n, *cut).double() for s, n in zip(sources, stored, strict=True)])
        if base is not None:
            x = x[:-1] - x[-1]
        sums = [tile_sums((x[i] * x[j])[None]) for i, j in pairs(k)] + [tile_sums(x)]
        signs = x.sign()
        counts = [
            (int((signs[i] * signs[j] < 0).sum()), int((signs[i] * signs[j] != 0).sum())) for i, j in pairs(k)
        ]
        return torch.cat(sums, 1), torch.tensor(counts)

    parts = how.map(one, ranges(models[0].info(stored[0]).numel, grain, how.chunk) or [(0, 0)])
    columns = torch.cat([p for p, _ in parts]).T.tolist()
    # fsum of NaN or infinities raises, and their tensor is told of by name later
    added = [math.fsum(c) if all(map(math.isfinite, c)) else math.nan for c in columns]
    entries = torch.tensor(added, dtype=torch.float64)
    counts = torch.stack([c for _, c in parts]).sum(0)
    square = [_square(v, k) for v in (entries[: len(pairs(k))], counts[:, 0], counts[:, 1])]
    return Sums(square[0], entries[len(pairs(k)) :], square[1], square[2], models[0].info(stored[0]).numel)


def _square(entries: Tensor, k: int) -> Tensor:
    made = torch.zeros(k, k, dtype=entries.dtype)
    for value, (i, j) in zip(entries, pairs(k), strict=True):
        made[i, j] = made[j, i] = value
    return made


def _normalised(gram: Tensor) -> Matrix:
    d = gram.diagonal().clamp(min=0).sqrt().tolist()
    k = len(d)
    return tuple(
        tuple(
            None
            if not (d[i] and d[j])
            else 1.0
            if i == j
            else max(-1.0, min(1.0, float(gram[i, j]) / (d[i] * d[j])))
            for j in range(k)
        )
        for i in range(k)
    )


def _mean_of_pairs(matrix: Matrix | Sequence[Sequence[float | None]]) -> float | None:
    every = [matrix[i][j] for i in range(len(matrix)) for j in range(i)]
    known = [v for v in every if v is not None]
    return sum(known) / len(known) if known and len(known) == len(every) else None
