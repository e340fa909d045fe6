"""What can be told of checkpoints before they are merged, from headers and a sample of their rows.

At most TENSORS matrices, spread over the depth, and of each the first rows up to SAMPLE elements are read from
every model: some megabytes a model, however large it is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from weft.api import Model
from weft.checkpoints.adapted import Adapted
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.load import load
from weft.errors import DataError, UsageError
from weft.methods.layers import block_of

TENSORS = 16
SAMPLE = 1 << 18
UNCHANGED = 1e-7
"""Differences below this share of a tensor's largest weight count as none."""


@dataclass(frozen=True)
class Look:
    """Facts about k models, all of them measured or read off the headers."""

    models: tuple[str, ...]
    base: str | None
    parameters: int
    bytes: int
    """Stored bytes of one model."""
    blocks: int
    kind: str
    """model_type of the config, or an empty string."""
    adapters: int
    """How many of the models are an adapter on their base."""
    batchnorm: bool
    shapes_differ: tuple[str, ...]
    """Tensors that not all have in one shape."""
    sampled: tuple[str, ...]
    likeness: float
    """Mean cosine of the weights over pairs: near 1 for fine-tunes of one base, 0 for independent starts."""
    norms: tuple[float, ...] = ()
    """‖τ‖ / ‖θ0‖ of each model."""
    cosine: float | None = None
    """Mean cosine of task vectors over pairs."""
    conflict: float | None = None
    """Share of the entries that at least two models change in which their signs differ."""
    changed: tuple[float, ...] = ()
    """Share of the entries that each model changes at all."""
    ranks: tuple[float, ...] = ()
    """Mean share of a sampled matrix's rank that holds 99 % of the task vector's energy, of each model."""
    twins: tuple[tuple[str, str], ...] = ()
    """Models that are the same, or are the base."""

    @property
    def count(self) -> int:
        return len(self.models)

    def to_json(self) -> dict[str, Any]:
        """The facts as plain data."""
        return asdict(self)


def look(models: Sequence[Model], base: Model | None = None) -> Look:
    """Look at models (and the base, if it is known). UsageError for fewer than two, DataError for NaN."""
    if isinstance(models, str) or len(models) < 2:
        raise UsageError("give at least two models to merge")
    found = [load(m) for m in models]
    adapters = [_adapted(m) for m in found]
    anchor = load(base) if base is not None else _their_base(adapters)
    every = [*found, *([anchor] if anchor is not None else [])]
    common = [n for n in found[0] if all(n in m for m in every)]
    differ = tuple(sorted(
        {n for m in every for n in m if not all(n in o for o in every)}
        | {n for n in common if len({m.info(n).shape for m in every}) > 1}
    ))  # fmt: skip
    usable = [
        n for n in common
        if n not in differ and is_mergeable(found[0].info(n).dtype) and len(found[0].info(n).shape) >= 2
    ]  # fmt: skip
    sampled = _spread(usable)
    if not sampled:
        raise DataError("the models share no matrix of one shape: they cannot be merged by weight")
    sums = _Sums(len(found), anchor is not None)
    for m in every:
        m.survey()
    for name in sampled:
        sums.add(name, [_rows(m, name) for m in found], None if anchor is None else _rows(anchor, name))
    config = found[0].config or {}
    return Look(
        tuple(m.origin for m in found), None if anchor is None else anchor.origin,
        sum(i.numel for i in found[0].tensors.values()), sum(i.nbytes for i in found[0].tensors.values()),
        len({b for n in found[0] if (b := block_of(n)) is not None}), str(config.get("model_type") or ""),
        sum(a is not None for a in adapters), any(re.search(r"running_var$", n) for n in found[0]), differ,
        tuple(sampled), **sums.facts([m.origin for m in found]),
    )  # fmt: skip


def _adapted(model: Checkpoint) -> Adapted | None:
    if isinstance(model, Adapted):
        return model
    return next((a for m in model.inputs if (a := _adapted(m)) is not None), None)


def _their_base(adapters: Sequence[Adapted | None]) -> Checkpoint | None:
    """The base that all of them are adapters of."""
    bases = {a.base.origin: a.base for a in adapters if a is not None}
    return next(iter(bases.values())) if len(bases) == 1 and all(adapters) else None


def _spread(names: Sequence[str]) -> list[str]:
    """TENSORS names, evenly over their order."""
    if len(names) <= TENSORS:
        return list(names)
    return [names[round(i * (len(names) - 1) / (TENSORS - 1))] for i in range(TENSORS)]


def _rows(model: Checkpoint, name: str) -> Tensor:
    """The first rows [r, columns], float32, SAMPLE elements of them at most (more where rows are longer)."""
    info = model.info(name)
    columns = math.prod(info.shape[1:])
    grain = model.grain(name)
    step = max(columns, grain) if grain % columns == 0 or columns % max(grain, 1) == 0 else info.numel
    stop = min(info.numel, max(step, SAMPLE // step * step))
    model.ready(name)
    x = model.read(name, 0, stop, dtype=torch.float32)
    if not bool(x.isfinite().all()):
        raise DataError(f"{model.origin}: {name} holds NaN or infinity")
    return x[: stop // columns * columns].reshape(-1, columns)


class _Sums:
    """Inner products over the sampled rows, summed in float64."""

    def __init__(self, k: int, based: bool) -> None:
        self.k = k
        self.weights = torch.zeros(k, k, dtype=torch.float64)
        self.deltas = torch.zeros(k, k, dtype=torch.float64)
        self.base, self.based, self.count = 0.0, based, 0
        self.moved = torch.zeros(k, dtype=torch.float64)
        self.shared, self.opposed = 0, 0
        self.ranks: list[list[float]] = []

    def add(self, name: str, rows: Sequence[Tensor], base: Tensor | None) -> None:
        flat = torch.stack([r.flatten() for r in rows]).double()
        self.weights += flat @ flat.T
        if base is None:
            return
        anchor = base.flatten().double()
        tau = flat - anchor
        self.deltas += tau @ tau.T
        self.base += float(anchor @ anchor)
        self.count += tau.shape[1]
        moved = tau.abs() > UNCHANGED * max(1e-30, float(anchor.abs().max()))
        self.moved += moved.sum(1)
        up, down = (moved & (tau > 0)).sum(0), (moved & (tau < 0)).sum(0)
        several = up + down >= 2
        self.shared += int(several.sum())
        self.opposed += int((several & (up > 0) & (down > 0)).sum())
        self.ranks.append([_rank(t.reshape(base.shape)) for t in tau])

    def facts(self, names: Sequence[str]) -> dict[str, Any]:
        lengths = self.deltas.diag().sqrt()
        found: dict[str, Any] = {"likeness": _mean_cosine(self.weights)}
        same = [
            (names[i], names[j])
            for i in range(self.k)
            for j in range(i)
            if float((self.weights[i, i] + self.weights[j, j] - 2 * self.weights[i, j]).abs())
            <= 1e-12 * float(self.weights[i, i])
        ]
        if self.based:
            same += [(n, "the base") for n, size in zip(names, lengths.tolist(), strict=True) if size == 0]
            columns = list(zip(*self.ranks, strict=True))
            found |= {
                "norms": tuple((lengths / max(self.base, 1e-300) ** 0.5).tolist()),
                "cosine": _mean_cosine(self.deltas),
                "conflict": self.opposed / self.shared if self.shared else 0.0,
                "changed": tuple((self.moved / max(1, self.count)).tolist()),
                "ranks": tuple(sum(c) / len(c) for c in columns),
            }
        return found | {"twins": tuple(same)}


def _mean_cosine(products: Tensor) -> float:
    size = products.diag().sqrt()
    if bool((size == 0).any()):
        kept = size > 0
        products, size = products[kept][:, kept], size[kept]
    k = len(size)
    if k < 2:
        return 0.0
    cosines = products / size[:, None] / size[None]
    return float((cosines.sum() - cosines.diag().sum()) / (k * (k - 1)))


def _rank(t: Tensor) -> float:
    """The share of min(m, n) singular values that hold 99 % of ‖t‖²; rows beyond 256 are left out."""
    t = t[:256]
    small = t @ t.T if t.shape[0] <= t.shape[1] else t.T @ t
    values = torch.linalg.eigvalsh(small).flip(0).clamp_min(0)
    total = float(values.sum())
    if total == 0:
        return 0.0
    return float((values.cumsum(0) < 0.99 * total).sum() + 1) / len(values)
