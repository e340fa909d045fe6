"""Two checkpoints of one shape, read side by side, b's tensors already in another order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from weft.align.apply import Places, gathered, reorder
from weft.align.spec import PermutationSpec
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.engine.budget import Frugal, default_memory, parse_size, show_size
from weft.errors import DataError, DataProblems, UsageError

STATISTICS = ("*running_mean", "*running_var")
"""BatchNorm's running statistics: no weights, so they say nothing of which unit is which."""
BLOCK = 1 << 17
"""Larger blocks (of 8 bytes an element) go back to the system when they are freed."""
COPIES = 6
"""Of the larger tensor of two in float32: both, b in its order, both unfolded, and the products."""


def check_pair(spec: PermutationSpec, a: Checkpoint, b: Checkpoint) -> None:
    """DataProblems where no permutation of `spec` relates two checkpoints: names or shapes differ."""
    problems = [
        f"{n}: {list(a.info(n).shape)} in {a.origin}, {list(b.info(n).shape)} in {b.origin}"
        for n in a if n in b and a.info(n).shape != b.info(n).shape
    ]  # fmt: skip
    if problems:
        raise DataProblems(
            f"no permutation relates {a.origin} and {b.origin}, whose shapes differ; permutations need equal "
            "widths, optimal transport does not",
            problems,
        )
    spec.check(a)
    spec.check(b)


class Pair:
    """What two checkpoints hold under one name; kept in memory where both fit into half of the budget."""

    def __init__(
        self, spec: PermutationSpec, a: Checkpoint, b: Checkpoint, *, memory: int | str | None = None,
        ignore: Sequence[str] = STATISTICS,
    ) -> None:  # fmt: skip
        check_pair(spec, a, b)
        self.a, self.b = a, b
        self.memory = default_memory() if memory is None else parse_size(memory)
        self.names = [
            n for n, i in a.tensors.items()
            if is_mergeable(i.dtype) and is_mergeable(b.info(b.aliases.get(n, n)).dtype) and i.numel
            and not any(fnmatchcase(n, p) for p in ignore)
        ]  # fmt: skip
        if not self.names:
            raise UsageError(f"{a.origin} has no floating tensor to match by")
        self._size = {n: a.info(n).numel * max(4, a.info(n).dtype.itemsize) for n in self.names}
        self._kept: dict[str, tuple[Tensor, Tensor]] | None = None
        if 2 * sum(self._size.values()) <= self.memory // 2:
            self._kept = {}
        else:
            Frugal(BLOCK)  # tensors of many sizes come and go, and what is kept between them would add up
        for source in (a, b):
            source.survey()

    def shape(self, name: str) -> tuple[int, ...]:
        return self.a.info(name).shape

    def both(self, name: str) -> tuple[Tensor, Tensor]:
        """Both tensors, in float32 or, where both are float64, that."""
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        if self._kept is None and COPIES * self._size[name] > self.memory:
            raise DataError(
                f"{name}: matching its units takes {show_size(COPIES * self._size[name])} of memory, more than "
                f"the budget of {show_size(self.memory)}: raise memory="
            )
        found = (self._read(self.a, name), self._read(self.b, name))
        if self._kept is not None:
            self._kept[name] = found
        return found

    def blocks(self, name: str, where: Places, axis: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """`a` and the reordered `b`, whole; or, where both are large, rows at a time, unless `axis` is 0."""
        shape = self.shape(name)
        row = max(1, prod(shape[1:]))
        rows = max(1, self.memory // (2 * COPIES * 4 * row))
        if self._kept is not None or axis == 0 or rows >= shape[0] or self._coarse(name, row):
            a, b = self.both(name)
            yield a, reorder(b, where)
            return
        there = where[0]
        order = torch.arange(shape[0]) if there is None else there.flatten()
        for start in range(0, shape[0], rows):
            here = torch.arange(start, min(start + rows, shape[0]))
            a = self.finite(self.a.read(name, start * row, (int(here[-1]) + 1) * row, dtype=self.dtype(name)),
                             name, self.a)  # fmt: skip
            b = self.finite(gathered(self.b, self._name(name), order[here], row, self.dtype(name)),
                             name, self.b)  # fmt: skip
            yield a.reshape(-1, *shape[1:]), reorder(b.reshape(-1, *shape[1:]), where, here)

    def _coarse(self, name: str, row: int) -> bool:
        return bool(row % self.a.grain(name) or row % self.b.grain(self._name(name)))

    def _name(self, name: str) -> str:
        return self.b.aliases.get(name, name)

    def dtype(self, name: str) -> torch.dtype:
        """What two tensors are compared in."""
        kinds = {self.a.info(name).dtype, self.b.info(self._name(name)).dtype}
        return torch.float64 if kinds == {torch.float64} else torch.float32

    def _read(self, source: Checkpoint, name: str) -> Tensor:
        read = source.tensor(name, dtype=self.dtype(name))
        return self.finite(read, name, source)

    @staticmethod
    def finite(values: Tensor, name: str, source: Checkpoint) -> Tensor:
        """The values. DataError where some are NaN or infinite."""
        if not bool(values.isfinite().all()):
            raise DataError(
                f"{name} of {source.origin} has {int((~values.isfinite()).sum())} values that are NaN or "
                "infinite, so its units cannot be matched: mend or retrain the model"
            )
        return values
