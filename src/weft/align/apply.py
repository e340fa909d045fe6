"""Units in another order: of one tensor (`reorder`), and of a whole checkpoint, lazily (`Permuted`)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from weft.align.spec import Axis, Permutations, PermutationSpec
from weft.align.terms import Chain, Product, Term, groups_in, size_of
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Derived
from weft.checkpoints.ranges import element_range

SMALL = 1 << 17
"""Tensors of no more elements are read whole: a read of each row would take longer."""

Places = tuple[Tensor | None, ...]
"""For each axis where its positions come from, broadcastable to the tensor; None where nothing moves."""


def places(
    spec: PermutationSpec, row: Sequence[Axis], shape: Sequence[int], permutations: Permutations
) -> Places:
    """Source positions σ_k along every axis k of a tensor: `out[i_0 … i_n] = in[σ_0, …, σ_n]`.

    σ_k has as many dimensions as the tensor and length 1 where it does not vary: a permutation within the units
    of a group that stands along an earlier axis varies along that axis too.
    """
    units: dict[str, Tensor] = {}
    sizes = {n: g.size for n, g in spec.groups.items()}
    found: list[Tensor | None] = []
    for k, (term, length) in enumerate(zip(row, shape, strict=True)):
        groups = list(groups_in(term))
        here = torch.arange(length).reshape([-1 if j == k else 1 for j in range(len(shape))])
        if term is None or not groups:
            found.append(None)
            continue
        there = _source(term, here, units, permutations, spec, sizes)
        moved = any(g in permutations for g in groups) and not torch.equal(there, here.expand_as(there))
        found.append(there if moved else None)
    return tuple(found)


def _source(
    term: Term, here: Tensor, units: dict[str, Tensor], permutations: Permutations, spec: PermutationSpec,
    sizes: Mapping[str, int],
) -> Tensor:  # fmt: skip
    """Where the positions `here` of a term come from; `units` learns the unit that each position belongs to."""
    if isinstance(term, str):
        units[term] = here
        if term not in permutations:
            return here
        index = (*(units[w] for w in spec.groups[term].within), here)
        return permutations[term][index]  # indices broadcast
    if isinstance(term, Product):
        lengths = [size_of(f, sizes) or 1 for f in term.factors]
        there = torch.zeros_like(here)
        for i, factor in enumerate(term.factors):
            stride = prod(lengths[i + 1 :])
            digit = here // stride % lengths[i]
            there = there + stride * _source(factor, digit, units, permutations, spec, sizes)
        return there
    if isinstance(term, Chain):
        start, there = 0, here
        for part in term.parts:
            length = size_of(part, sizes) or 0
            inside = (here >= start) & (here < start + length)
            own = _source(part, (here - start).clamp(0, length - 1), dict(units), permutations, spec, sizes)
            there = torch.where(inside, own + start, there)
            start += length
        return there
    return here


def reorder(values: Tensor, where: Places, rows: Tensor | None = None) -> Tensor:
    """The tensor in its new order. Differentiable. `rows`: which of its rows `values` already holds, in order."""
    for k, there in enumerate(where):
        if there is None or (k == 0 and rows is not None):
            continue
        there = there.to(values.device)
        if there.numel() == there.shape[k]:
            values = values.index_select(k, there.flatten())
            continue
        if rows is not None and there.shape[0] > 1:
            there = there[rows]
        values = torch.take_along_dim(values, there, dim=k)
    return values


def gathered(
    source: Checkpoint, name: str, rows: Tensor, length: int, dtype: torch.dtype | None = None
) -> Tensor:
    """These rows of a tensor, flat, each run of neighbours in one read; `length`: elements in a row."""
    cuts = [0, *((rows.diff() != 1).nonzero().flatten() + 1).tolist(), len(rows)]
    runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise(cuts)]
    parts = [source.read(name, a * length, b * length, dtype=dtype) for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def reordered(
    state: Mapping[str, Tensor], spec: PermutationSpec, permutations: Permutations
) -> dict[str, Tensor]:
    """A state dict in memory in its new order; gradients flow to `state`. Tensors not in `spec` are an error."""
    return {
        n: reorder(t, places(spec, spec.axes[n], t.shape, permutations)) if n in spec.axes else t
        for n, t in state.items()
    }


class Permuted(Derived):
    """A checkpoint with its units in another order; rows are gathered as they are asked for.

    Tied names follow the tensor they are tied to. Raises DataProblems where the model does not fit the
    specification, Problems where the permutations do not.
    """

    def __init__(self, source: Checkpoint, spec: PermutationSpec, permutations: Permutations) -> None:
        super().__init__(source)
        self.spec = spec
        spec.check(source)  # before anything is made of the sizes that it tells
        self.permutations = spec.complete(permutations)
        self.origin = f"{source.origin} permuted"
        self._where = lru_cache(maxsize=64)(self._places)

    def __getstate__(self) -> dict[str, object]:
        return {k: v for k, v in self.__dict__.items() if k != "_where"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._where = lru_cache(maxsize=64)(self._places)

    def _places(self, name: str) -> Places:
        return places(self.spec, self.spec.axes[name], self.info(name).shape, self.permutations)

    def _moves(self, name: str) -> bool:
        return any(w is not None for w in self._where(name))

    def _whole(self, name: str) -> bool:
        """Whether the tensor is read as one: small, or stored so that rows cannot be read alone."""
        info = self.info(name)
        return len(info.shape) < 2 or info.numel <= SMALL or bool(self._row(name) % self.first.grain(name))

    def _row(self, name: str) -> int:
        return max(1, prod(self.info(name).shape[1:]))

    def grain(self, name: str) -> int:
        if not self._moves(name):
            return self.first.grain(name)
        info = self.info(name)
        return max(1, info.numel) if self._whole(name) and len(info.shape) > 1 else self._row(name)

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        if not self._moves(name):
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        where = self._where(name)
        if self._whole(name):
            values = self.first.read(name, dtype=dtype).reshape(info.shape)
            return reorder(values, where).reshape(-1)[start:stop]
        row = self._row(name)
        rows = torch.arange(start // row, -(-stop // row))
        values = self._rows(name, rows, dtype).reshape(len(rows), *info.shape[1:])
        return reorder(values, where, rows).reshape(-1)

    def _rows(self, name: str, rows: Tensor, dtype: torch.dtype | None) -> Tensor:
        """The source's rows that come to stand at `rows`."""
        there = self._where(name)[0]
        wanted = rows if there is None else there.flatten()[rows]
        return gathered(self.first, name, wanted, self._row(name), dtype)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if not self._moves(name) or (not self._whole(name) and self._where(name)[0] is None):
            self.first.prefetch(name, start, stop)

    def working_bytes(self, name: str, count: int) -> int:
        numel = self.info(name).numel
        if not self._moves(name):
            return self.first.working_bytes(name, count)
        read = numel if self._whole(name) else min(count, numel)
        return self.first.working_bytes(name, read) + 16 * read + 8 * sum(self.info(name).shape)

    def identity(self) -> str | None:
        inner = super().identity()
        if inner is None:
            return None
        told = hashlib.sha256(str(self.spec.to_json()["axes"]).encode())
        for name in sorted(self.permutations):
            told.update(name.encode() + self.permutations[name].contiguous().numpy().tobytes())
        return f"{told.hexdigest()}{inner}"
