"""`survey_values`: what the numbers of a checkpoint look like, tensor by tensor, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.analysis.sums import as_numbers, exact_sum
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import execution, ranges
from weft.methods.stats import tile_sums


@dataclass(frozen=True)
class Values:
    """Sums and extremes of some elements; NaN and infinite ones are counted and left out of the rest."""

    numel: int = 0
    sum: float = 0.0
    squares: float = 0.0
    low: float = math.inf
    high: float = -math.inf
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    @classmethod
    def total(cls, parts: Iterable[Values]) -> Values:
        """Over the elements of all parts."""
        every = list(parts)
        return cls(
            sum(p.numel for p in every), exact_sum(p.sum for p in every), exact_sum(p.squares for p in every),
            min((p.low for p in every), default=math.inf), max((p.high for p in every), default=-math.inf),
            sum(p.zeros for p in every), sum(p.nan for p in every), sum(p.inf for p in every),
        )  # fmt: skip

    @property
    def finite(self) -> int:
        return self.numel - self.nan - self.inf

    @property
    def norm(self) -> float:
        return math.sqrt(self.squares)

    @property
    def mean(self) -> float | None:
        return self.sum / self.finite if self.finite else None

    @property
    def rms(self) -> float | None:
        """√mean(x²): the norm that does not grow with the tensor."""
        return math.sqrt(self.squares / self.finite) if self.finite else None

    @property
    def min(self) -> float | None:
        return self.low if self.finite else None

    @property
    def max(self) -> float | None:
        return self.high if self.finite else None

    @property
    def zero_fraction(self) -> float:
        return self.zeros / self.numel if self.numel else 0.0

    def to_json(self) -> dict[str, Any]:
        names = ("norm", "rms", "mean", "min", "max", "zero_fraction")
        found = {n: getattr(self, n) for n in names}
        told = {n: v if v is not None and math.isfinite(v) else None for n, v in found.items()}
        return {"numel": self.numel, **told, "nan": self.nan, "inf": self.inf}


def survey_values(checkpoint: Checkpoint) -> dict[str, Values]:
    """The values of every tensor, read once; complex numbers count as their two parts."""
    names = list(checkpoint)
    return dict(zip(names, execution().map(lambda n: _of(checkpoint, n), names), strict=True))


def _of(checkpoint: Checkpoint, name: str) -> Values:
    how = execution()
    checkpoint.ready(name)

    def one(cut: tuple[int, int]) -> tuple[Tensor, Values]:
        return _piece(as_numbers(checkpoint.read(name, *cut)))

    cuts = ranges(checkpoint.info(name).numel, checkpoint.grain(name), how.chunk)
    parts = how.map(one, cuts)
    if not parts:
        return Values()
    found = Values.total(v for _, v in parts)
    sums, squares = (exact_sum(t) for t in torch.cat([tiles for tiles, _ in parts]).T.tolist())
    return Values(found.numel, sums, squares, found.low, found.high, found.zeros, found.nan, found.inf)


def _piece(x: Tensor) -> tuple[Tensor, Values]:
    """Tile sums of x and x², and what else there is to know, of one range."""
    finite, numel, zeros = x.isfinite(), x.numel(), int((x == 0).sum())
    count = int(finite.sum())
    nan = int(x.isnan().sum()) if count < numel else 0
    kept = x if count == numel else x[finite]
    low, high = (float(kept.min()), float(kept.max())) if count else (math.inf, -math.inf)
    x = x if count == numel else torch.where(finite, x, 0.0)
    tiles = tile_sums(torch.stack([x, x * x]))
    return tiles, Values(numel, 0.0, 0.0, low, high, zeros, nan, numel - count - nan)
