"""How many singular values to keep: a rank, a share of the energy, a ratio to the largest, a threshold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from weft.adapters.lowrank import kept_rank
from weft.errors import UsageError


@dataclass(frozen=True, slots=True)
class Keep:
    """Which of the singular values σ₁ ≥ σ₂ ≥ … stay; where several are given, all of them must agree to one."""

    rank: int | None = None
    """At most so many."""
    energy: float | None = None
    """As many as hold this share of Σ σ² (in (0, 1])."""
    ratio: float | None = None
    """Those with σ ≥ ratio · σ₁."""
    threshold: float | None = None
    """Those with σ ≥ threshold."""

    def __post_init__(self) -> None:
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise UsageError(f"rank must be a whole number of at least 1, not {self.rank!r}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a share of the squared norm in (0, 1], not {self.energy}")
        if self.ratio is not None and not 0 <= self.ratio <= 1:
            raise UsageError(f"ratio is a share of the largest singular value in [0, 1], not {self.ratio}")
        if self.threshold is not None and not self.threshold >= 0:
            raise UsageError(f"threshold must not be negative, not {self.threshold}")
        if not any(x is not None for x in (self.rank, self.energy, self.ratio, self.threshold)):
            raise UsageError("say what to keep: rank, energy, ratio or threshold")

    @property
    def fixed(self) -> bool:
        """True where shapes alone tell the rank."""
        return self.rank is not None and self.energy is None and self.ratio is None and self.threshold is None

    def most(self, least_side: int) -> int:
        """The rank that values of a matrix with this smaller side can be kept at."""
        return least_side if self.rank is None else min(self.rank, least_side)

    def of(self, spectrum: Tensor) -> int:
        """How many of these (falling) singular values to keep; one at least."""
        r = kept_rank(spectrum, rank=self.rank, energy=self.energy)
        if self.ratio is not None:
            r = min(r, int((spectrum >= self.ratio * spectrum[:1]).sum()))
        if self.threshold is not None:
            r = min(r, int((spectrum >= self.threshold).sum()))
        return max(r, 1)
