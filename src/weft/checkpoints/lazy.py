"""Lazy nodes that need no merging method: affine combinations, casts, renamings, selections."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType, floating, round_to
from weft.errors import DataProblems, UsageError
from weft.late import Tensor, torch


class Derived(Checkpoint):
    """A checkpoint that is, but for what a subclass changes, like its first input."""

    def __init__(self, *inputs: Checkpoint) -> None:
        self._inputs = inputs

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self._inputs

    @property
    def first(self) -> Checkpoint:
        return self._inputs[0]

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self.first.tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.first.aliases

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.first.config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self.first.assets

    def grain(self, name: str) -> int:
        return self.first.grain(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        for source in self._inputs:
            source.prefetch(name, start, stop)


class Affine(Derived):
    """Σ cᵢ · θᵢ, in float64, rounded once. Expressions flatten: `(a - b) * 2 + c` is one node.

    Integer and bool tensors are carried from the first term. `anchor` names the term whose config, tied
    names and storage dtypes the result has: the first with a positive coefficient.
    """

    def __init__(self, terms: Sequence[tuple[float, Checkpoint]]) -> None:
        # the same checkpoint in several terms counts once, with the sum of its coefficients
        merged: dict[int, tuple[float, Checkpoint]] = {}
        for c, source in terms:
            before = merged.get(id(source), (0.0, source))[0]
            merged[id(source)] = (before + c, source)
        kept = [(c, s) for c, s in merged.values() if c != 0] or list(merged.values())[:1]
        # the anchor comes first: a model with a whole config rather than a difference's second half
        kept.sort(key=lambda term: term[0] <= 0)
        self.coefficients = [c for c, _ in kept]
        super().__init__(*(s for _, s in kept))
        self.origin = " ".join(f"{c:+g}·({s.origin})" for c, s in kept)
        _same_tensors(self.inputs)

    @classmethod
    def of(cls, source: Checkpoint) -> Affine:
        return source if isinstance(source, Affine) else cls([(1.0, source)])

    @property
    def terms(self) -> list[tuple[float, Checkpoint]]:
        return list(zip(self.coefficients, self.inputs, strict=True))

    def grain(self, name: str) -> int:
        from math import lcm

        return min(lcm(*(s.grain(name) for s in self.inputs)), max(1, self.info(name).numel))

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        if not self.info(name).kind.mergeable:
            return self.first.read(name, start, stop, dtype=dtype)
        total: Tensor | None = None
        for c, source in self.terms:
            term = source.read(name, start, stop).double() * c
            total = term if total is None else total + term
        assert total is not None
        return total if dtype is None else round_to(total, dtype)

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.coefficients}{inner}"

    def _combine(self, other: Checkpoint, sign: float) -> Affine:
        if not isinstance(other, Checkpoint):
            raise UsageError(
                f"only checkpoints can be added to a checkpoint, not {type(other).__name__}: load it"
            )
        right = [(sign * c, s) for c, s in Affine.of(other).terms]
        return Affine([*self.terms, *right])

    def __add__(self, other: Checkpoint) -> Affine:
        return self._combine(other, 1.0)

    def __sub__(self, other: Checkpoint) -> Affine:
        return self._combine(other, -1.0)

    def __mul__(self, factor: float) -> Affine:
        return Affine([(c * operator.mul(factor, 1.0), s) for c, s in self.terms])


def _same_tensors(sources: Sequence[Checkpoint]) -> None:
    """Every difference in names and shapes at once, or nothing."""
    first, problems = sources[0], []
    for other in sources[1:]:
        problems += [f"{n}: in {first.origin}, not in {other.origin}" for n in first if n not in other]
        problems += [f"{n}: in {other.origin}, not in {first.origin}" for n in other if n not in first]
        problems += [
            f"{n}: shape {list(i.shape)} in {first.origin}, {list(other.tensors[n].shape)} in {other.origin}"
            for n, i in first.tensors.items()
            if n in other and other.tensors[n].shape != i.shape
        ]
    if problems:
        raise DataProblems("these checkpoints cannot be added: their tensors differ", problems)


class Cast(Derived):
    """The floating tensors in another storage dtype; the values round once, when they are read."""

    def __init__(self, source: Checkpoint, dtype: torch.dtype | DType | str) -> None:
        super().__init__(source)
        self.kind = floating(dtype)
        self.origin = source.origin
        self._tensors = {
            n: TensorInfo(i.shape, dtype) if i.kind.mergeable else i for n, i in source.tensors.items()
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.kind}{inner}"

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        # the values round to this node's dtype, then (if another is asked for) again, as a saved file's would
        if dtype is not None and DType.of(dtype) != self.kind and self.info(name).kind.mergeable:
            return round_to(self.first.read(name, start, stop, dtype=self.kind.torch), dtype)
        wanted = self.kind.torch if dtype is None and self.info(name).kind.mergeable else dtype
        return self.first.read(name, start, stop, dtype=wanted)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        floating = self.info(name).kind.mergeable
        if floating and dtype not in (None, self.kind):
            return super().bits(name, start, stop, dtype=dtype)
        return self.first.bits(name, start, stop, dtype=self.kind if floating else dtype)


class Renamed(Derived):
    """Tensors under other names: `rename(old) -> new`, or None to leave a tensor out."""

    def __init__(self, source: Checkpoint, rename: Callable[[str], str | None]) -> None:
        super().__init__(source)
        self.origin = source.origin
        self._old: dict[str, str] = {}
        for old in source:
            new = rename(old)
            if new is None:
                continue
            if new in self._old:
                raise UsageError(
                    f"renaming {source.origin}: {self._old[new]!r} and {old!r} both become {new!r}"
                )
            self._old[new] = old
        self._tensors = {new: source.tensors[old] for new, old in self._old.items()}
        kept = {old: new for new, old in self._old.items()}
        self._aliases = {
            new: kept[target]
            for alias, target in source.aliases.items()
            if target in kept and (new := rename(alias)) is not None
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def grain(self, name: str) -> int:
        return self.first.grain(self._old[name])

    def bytes_read(self, name: str) -> int:
        return self.first.bytes_read(self._old[name])

    def working_bytes(self, name: str, count: int) -> int:
        return self.first.working_bytes(self._old[name], count)

    def at_hand(self, name: str) -> bool:
        return self.first.at_hand(self._old[name])

    def held_bytes(self, name: str) -> int:
        return self.first.held_bytes(self._old[name])

    def hold(self, name: str) -> None:
        self.first.hold(self._old[name])

    def release(self, name: str) -> None:
        self.first.release(self._old[name])

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self._old}{inner}"

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        self.first.prefetch(self._old[name], start, stop)

    def ready(self, name: str) -> None:
        self.first.ready(self._old[name])

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        self.info(name)
        return self.first.read(self._old[name], start, stop, dtype=dtype)

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        self.info(name)
        return self.first.bits(self._old[name], start, stop, dtype=dtype)


def subset(source: Checkpoint, names: Iterable[str]) -> Renamed:
    """Only the named tensors."""
    wanted = set(names)
    return Renamed(source, lambda name: name if name in wanted else None)
