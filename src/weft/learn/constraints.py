"""What values coefficients may take: maps from free numbers φ to a table λ `[k, *shape]` of coefficients.

Free      λ = φ
Box       low ≤ λ ≤ high: φ is moved into the box after every step (AdaMerging clamps so)
Simplex   λ ≥ 0, Σᵢ λᵢ = 1 over the models: λ = softmax(φ / temperature) (learned soups)
Affine    Σᵢ λᵢ = total, signs free: λ = φ − (Σ φ − total) / k
Span      λ = A φ: the columns of A are an orthonormal basis of what models span (TWA)
Scaled    λ = φ / size: steps of one length in weight space whatever the models' distance (MEHL-Soup)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from weft.errors import UsageError, did_you_mean


class Constraint(Protocol):
    """A map φ → λ of the table `key`, a φ for a start, and what brings φ back after a step.

    A start that does not obey is an error (Box) or brought to the nearest that does (Affine; Simplex by division).
    """

    def start(self, key: str, coefficients: Tensor) -> Tensor: ...

    def __call__(self, key: str, phi: Tensor) -> Tensor: ...

    def project(self, phi: Tensor) -> None: ...


class Free:
    """Any number."""

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        return coefficients

    def __call__(self, key: str, phi: Tensor) -> Tensor:
        return phi

    def project(self, phi: Tensor) -> None:
        """Nothing to bring back."""


@dataclass(frozen=True)
class Box(Free):
    """[low, high], by clamping."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise UsageError(f"a box needs low < high, not {self.low} and {self.high}")

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        if bool(((coefficients < self.low) | (coefficients > self.high)).any()):
            raise UsageError(f"the coefficients start outside their box [{self.low:g}, {self.high:g}]")
        return coefficients

    def project(self, phi: Tensor) -> None:
        phi.clamp_(self.low, self.high)


@dataclass(frozen=True)
class Simplex(Free):
    """Shares of the models, by softmax along the first axis."""

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UsageError(f"the temperature must be above 0, not {self.temperature}")

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        if bool((coefficients <= 0).any()):
            raise UsageError("coefficients on the simplex must start above 0: a softmax reaches 0 never")
        return self.temperature * (coefficients / coefficients.sum(0)).log()

    def __call__(self, key: str, phi: Tensor) -> Tensor:
        return (phi / self.temperature).softmax(0)


@dataclass(frozen=True)
class Affine(Free):
    """The models' coefficients sum to `total`; those that start elsewhere are shifted together."""

    total: float = 1.0

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        return self(key, coefficients)

    def __call__(self, key: str, phi: Tensor) -> Tensor:
        return phi - (phi.sum(0) - self.total) / len(phi)


@dataclass(frozen=True)
class Span(Free):
    """λ = A φ, φ: [r] the coordinates of the weights in an orthonormal basis, A: [k, r]; for parts="model" only.

    A gradient step on φ is one on the weights θ = Σᵢ λᵢ θᵢ with the gradient projected onto the span, and decay of
    φ is decay of θ. Where models depend on one another, the start's coefficients may change; its weights do not.
    """

    basis: Tensor
    gram: Tensor

    @classmethod
    def of(cls, gram: Tensor, tolerance: float = 1e-9) -> Span:
        """From the inner products [k, k] of the models: A with Aᵀ G A = 1, by Gram–Schmidt in coefficients.

        The basis vectors are Σᵢ A_ij θᵢ; models that depend on those before them (relative length below
        √tolerance) add none. The weights themselves are not needed.
        """
        found: list[Tensor] = []
        g = gram.double()
        for i in range(len(g)):
            v = torch.zeros(len(g), dtype=g.dtype)
            v[i] = 1.0
            for _ in range(2):  # twice is enough for orthogonality to rounding
                for b in found:
                    v = v - (b @ g @ v) * b
            square = float(v @ g @ v)
            if square > tolerance * float(g[i, i]):
                found.append(v / math.sqrt(square))
        if not found:
            raise UsageError("the models are all zero: they span nothing")
        return cls(torch.stack(found, 1), g)

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        if coefficients.ndim != 1:
            raise UsageError("a span of models is learned with parts='model'")
        return (self.basis.T @ self.gram @ coefficients.to(self.gram)).to(coefficients)

    def __call__(self, key: str, phi: Tensor) -> Tensor:
        return (self.basis.to(phi.device) @ phi.double()).to(phi)


@dataclass(frozen=True)
class Scaled(Free):
    """λ = φ / size; sizes by key, `[k]`, of what the coefficients multiply; models of size 0 stay at 0."""

    sizes: Mapping[str, Tensor]

    def _inverse(self, key: str, like: Tensor) -> Tensor:
        size = self.sizes[key].to(like).reshape(-1, *[1] * (like.ndim - 1))
        return torch.where(size > 0, 1 / size.clamp_min(1e-30), torch.zeros_like(size))

    def start(self, key: str, coefficients: Tensor) -> Tensor:
        return coefficients * self.sizes[key].to(coefficients).reshape(-1, *[1] * (coefficients.ndim - 1))

    def __call__(self, key: str, phi: Tensor) -> Tensor:
        return phi * self._inverse(key, phi)


NAMED = {"free": Free, "box": Box, "simplex": Simplex, "affine": Affine}


def as_constraint(given: str | Constraint) -> Constraint:
    """By name, with its defaults, or as it is."""
    if not isinstance(given, str):
        return given
    if given not in NAMED:
        raise UsageError(
            f"there is no constraint {given!r}{did_you_mean(given, NAMED)}; known: {', '.join(NAMED)}"
        )
    made: Constraint = NAMED[given]()
    return made
