"""Sums that any grouping of elements may be added to, and what `compare` says from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def as_numbers(x: Tensor) -> Tensor:
    """Any stored dtype in float64; complex numbers as their two parts."""
    return torch.view_as_real(x.resolve_conj()).reshape(-1).double() if x.is_complex() else x.double()


def exact_sum(values: Iterable[float]) -> float:
    """The sum rounded once, so that order does not matter; what overflows is infinite or NaN."""
    every = list(values)
    return math.fsum(every) if all(map(math.isfinite, every)) else sum(every)


@dataclass(frozen=True)
class Difference:
    """The sums over some elements, and what follows from them; see `weft.analysis.diff`."""

    numel: int = 0
    squares_a: float = 0.0
    squares_b: float = 0.0
    product: float = 0.0
    squares_difference: float = 0.0
    conflicts: int = 0
    changes: int = 0
    nonfinite: int = 0
    max_abs: float = 0.0

    @classmethod
    def total(cls, parts: Iterable[Difference]) -> Difference:
        """The difference over the elements of all parts; in any order of them the same."""
        every = list(parts)

        def each(name: str) -> list[Any]:
            return [getattr(p, name) for p in every]

        return cls(
            sum(each("numel")), exact_sum(each("squares_a")), exact_sum(each("squares_b")),
            exact_sum(each("product")), exact_sum(each("squares_difference")), sum(each("conflicts")),
            sum(each("changes")), sum(each("nonfinite")), max(each("max_abs"), default=0.0),
        )  # fmt: skip

    @property
    def norm_a(self) -> float:
        return math.sqrt(self.squares_a)

    @property
    def norm_b(self) -> float:
        return math.sqrt(self.squares_b)

    @property
    def norm_difference(self) -> float:
        return math.sqrt(self.squares_difference)

    @property
    def relative(self) -> float | None:
        """‖b − a‖ / ‖a‖; None where a is zero and b is not."""
        if self.squares_difference == 0:
            return 0.0
        return self.norm_difference / self.norm_a if self.squares_a else None

    @property
    def cosine(self) -> float | None:
        if not (self.squares_a and self.squares_b):
            return None
        if self.squares_difference == 0:
            return 1.0  # exactly, whatever the rounding of the norms
        return max(-1.0, min(1.0, self.product / (self.norm_a * self.norm_b)))

    @property
    def sign_conflict(self) -> float:
        return self.conflicts / self.numel if self.numel else 0.0

    @property
    def changed(self) -> float:
        return self.changes / self.numel if self.numel else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data; a figure that is not finite is null."""
        names = ("norm_a", "norm_b", "norm_difference", "relative", "cosine", "sign_conflict", "changed",
                 "max_abs")  # fmt: skip
        found = {n: getattr(self, n) for n in names}
        told = {n: v if v is not None and math.isfinite(v) else None for n, v in found.items()}
        return {"numel": self.numel, **told, "nonfinite": self.nonfinite}
