"""`Weighted`: θ0 + m ⊙ Σᵢ cᵢ (θᵢ − θ0) as a lazy checkpoint, with coefficients for any part of the parameters.

What learning gives: the coefficients are in memory, the models stay where they are, and any range of a tensor is
computed in float64 and rounded once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import lcm

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.lazy import Derived
from weft.checkpoints.memory import flat_range
from weft.checkpoints.ranges import element_range
from weft.learn.parts import Place


@dataclass(frozen=True)
class Entry:
    """How one tensor is made: its coefficients [k, *place.shape], what sources call it, a mask over τ."""

    place: Place
    coefficients: Tensor
    names: tuple[str, ...]
    """By source: the base, where there is one, and the models."""
    mask: Tensor | None = None

    def factor(self, i: int, start: int, stop: int) -> Tensor:
        """cᵢ over elements [start, stop), float64; a number where there is one."""
        c = self.coefficients[i].double()
        if self.place.whole:
            return c
        if self.place.index is not None:
            return c[self.place.index.reshape(-1)[start:stop]]
        return flat_range(c.expand(self.place.of), start, stop)


class Weighted(Derived):
    """See the module's docstring. `entries`: the anchor's name of a tensor → how it is made.

    `taken` names tensors that come as they are from another checkpoint; all others are carried from the anchor,
    which is the base, or the first model without one (then θ = Σᵢ cᵢ θᵢ).
    """

    def __init__(
        self,
        base: Checkpoint | None,
        models: Sequence[Checkpoint],
        entries: Mapping[str, Entry],
        taken: Mapping[str, tuple[Checkpoint, str]] | None = None,
        origin: str = "learned",
    ) -> None:
        self.base, self.models = base, tuple(models)
        self._sources = self.models if base is None else (base, *models)
        self.entries, self.taken = dict(entries), dict(taken or {})
        more = {id(s): s for s, _ in self.taken.values() if not any(s is m for m in self._sources)}
        super().__init__(*self._sources, *more.values())
        self.origin = f"{origin}({', '.join(m.origin for m in models)})"
        own = self.first.tensors
        self._tensors = {
            **own,
            **{n: replace(own[n], shape=s.info(m).shape) for n, (s, m) in self.taken.items()},
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def carried(self) -> dict[str, str]:
        """Tensors that are copied rather than merged, with the reason."""
        private = {n: f"is of one task, from {s.origin}" for n, (s, _) in self.taken.items()}
        return private | {
            n: "is no parameter of the module" for n in self if n not in self.entries and n not in self.taken
        }

    def _pairs(self, name: str) -> list[tuple[Checkpoint, str]]:
        """What a tensor is read from."""
        self.info(name)
        if name in self.entries:
            return list(zip(self._sources, self.entries[name].names, strict=True))
        return [self.taken.get(name, (self.first, name))]

    def grain(self, name: str) -> int:
        return min(lcm(*(s.grain(n) for s, n in self._pairs(name))), max(1, self.info(name).numel))

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        for source, n in self._pairs(name):
            source.prefetch(n, start, stop)

    def ready(self, name: str) -> None:
        for source, n in self._pairs(name):
            source.ready(n)

    def hold(self, name: str) -> None:
        for source, n in self._pairs(name):
            source.hold(n)

    def held_bytes(self, name: str) -> int:
        return sum(s.held_bytes(n) for s, n in self._pairs(name))

    def release(self, name: str) -> None:
        for source, n in self._pairs(name):
            source.release(n)

    def bytes_read(self, name: str) -> int:
        return sum(s.bytes_read(n) for s, n in self._pairs(name))

    def working_bytes(self, name: str, count: int) -> int:
        # sum, difference, factor and product in float64, beside what the sources need in turn
        return max(s.working_bytes(n, count) for s, n in self._pairs(name)) + 8 * 6 * count

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        start, stop = element_range(name, self.info(name), start, stop, self.grain(name))
        pairs = self._pairs(name)
        if name not in self.entries or not is_mergeable(self.info(name).dtype):
            source, n = pairs[0]
            return source.read(n, start, stop, dtype=dtype)
        entry = self.entries[name]
        base = None if self.base is None else pairs.pop(0)[0].read(entry.names[0], start, stop).double()
        total = torch.zeros(stop - start, dtype=torch.float64)
        for i, (source, n) in enumerate(pairs):
            x = source.read(n, start, stop).double()
            total += entry.factor(i, start, stop) * (x if base is None else x - base)
        if entry.mask is not None:
            total *= flat_range(entry.mask, start, stop).double()
        total = total if base is None else base + total
        return total if dtype is None else round_to(total, dtype)

    def identity(self) -> str | None:
        inner = super().identity()
        if inner is None:
            return None
        digest = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            digest.update(f"{name}{entry.place.shape}{entry.place.blocks}{entry.names}".encode())
            for values in (entry.coefficients, entry.mask):
                if values is not None:
                    digest.update(values.double().contiguous().numpy().tobytes())
        taken = {n: (self._inputs.index(s), stored) for n, (s, stored) in sorted(self.taken.items())}
        return f"{digest.hexdigest()}{taken}{inner}"
