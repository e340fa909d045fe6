"""How to pack: the scheme, what it keeps, and which tensors it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from weft.checkpoints.dtypes import is_mergeable
from weft.deltas.groups import Group
from weft.errors import UsageError, did_you_mean

USES = {
    "auto": {"error", "group", "dtype", "seed"},
    "exact": set[str](),
    "sparse": {"density", "dtype"},
    "lowrank": {"rank", "energy", "dtype", "fast", "seed"},
    "sign": {"group"},
    "quantised": {"bits", "group"},
}
"""Scheme → the settings that mean something to it."""


@dataclass(frozen=True, slots=True)
class Way:
    """The settings of `pack_delta`; None for a default. UsageError for what cannot be meant."""

    scheme: str = "auto"
    error: float | None = None
    """auto: the most that may be lost of a tensor, ‖θ̂ − θ‖ / ‖θ − θ0‖; 0.2."""
    density: float | None = None
    """sparse: the share of entries kept; 0.1."""
    rank: int | None = None
    """lowrank: the most singular values kept; 16."""
    energy: float | None = None
    """lowrank: keep the least rank with this share of ‖τ‖²."""
    bits: int | None = None
    """quantised: bits a code; 4."""
    group: Group | None = None
    """Elements that share a scale. sign: the tensor; quantised: 128."""
    dtype: torch.dtype | None = None
    """Storage dtype of sparse values and low-rank factors; bfloat16."""
    fast: bool = False
    """lowrank: sketch instead of the exact decomposition."""
    seed: int = 0
    """Of the sketch."""
    include: str | None = None
    """Regular expression: other tensors are kept exactly."""
    exclude: str | None = None
    """Regular expression: these tensors are kept exactly."""

    def __post_init__(self) -> None:
        if self.scheme not in USES:
            raise UsageError(
                f"there is no scheme {self.scheme!r}: choose {', '.join(USES)}{did_you_mean(self.scheme, USES)}"
            )
        defaults = {f.name: f.default for f in fields(self)}
        given = {n for n, default in defaults.items() if getattr(self, n) != default}
        idle = given - USES[self.scheme] - {"scheme", "include", "exclude"}
        if idle:
            homes = "; ".join(
                f"{n} is for {', '.join(s for s in USES if n in USES[s])}" for n in sorted(idle)
            )
            raise UsageError(f"the scheme {self.scheme} has no {' or '.join(sorted(idle))}: {homes}")
        if self.error is not None and not 0 <= self.error < 1:
            raise UsageError(f"error is a share of the difference in [0, 1), not {self.error}")
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError(f"density is a share of the entries in (0, 1], not {self.density}")
        if self.rank is not None and self.rank < 1:
            raise UsageError(f"rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UsageError(f"energy is a share of the squared norm in (0, 1], not {self.energy}")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise UsageError(f"bits must be 1 to 8, not {self.bits}")
        if self.group not in (None, "row", "tensor") and (
            not isinstance(self.group, int) or isinstance(self.group, bool) or self.group < 1
        ):
            raise UsageError(f"group must be tensor, row or a number of elements, not {self.group!r}")
        if self.dtype is not None and not is_mergeable(self.dtype):
            raise UsageError(f"differences cannot be stored as {self.dtype}: choose a floating dtype")

    def exact_names(self, names: Iterable[str], origin: str) -> set[str]:
        """What `include` and `exclude` keep from an inexact scheme. UsageError for a pattern without a match."""
        every, exact = list(names), set[str]()
        for what, pattern in (("include", self.include), ("exclude", self.exclude)):
            if pattern is None:
                continue
            try:
                hits = {n for n in every if re.search(pattern, n)}
            except re.error as error:
                raise UsageError(f"{what} {pattern!r} is no regular expression: {error}") from None
            if not hits:
                raise UsageError(f"{what} {pattern!r} matches no tensor of {origin}")
            exact |= hits if what == "exclude" else set(every) - hits
        return exact
