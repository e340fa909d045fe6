"""`Pair`: one tensor of a model beside the same tensor of its base, readable in any range of elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import lcm

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.execution import executing, execution, map_here
from weft.errors import DataError

BATCH = 1 << 18
"""Elements that are looked at together; fixed, so that nothing depends on how a save cuts its ranges."""
WORKING = 80
"""Bytes an element of a batch takes while it is encoded: the two values and a few float64 or int64 copies."""


def read_any(
    source: Checkpoint, name: str, start: int, stop: int, dtype: torch.dtype | None = None
) -> Tensor:
    """Elements [start, stop) whatever the grain: a coarser range is read and cut."""
    grain, numel = source.grain(name), source.info(name).numel
    first, last = start // grain * grain, min(-(-stop // grain) * grain, numel)
    return source.read(name, first, last, dtype=dtype)[start - first : stop - first]


class Pair:
    """θ and θ0 of one name. A name that the base ties is compared with the tensor it is tied to.

    θ is rounded to the model's storage dtype, as a saved file would have it; θ0 is as wide as the base has it.
    """

    def __init__(self, model: Checkpoint, base: Checkpoint, name: str) -> None:
        self.model, self.base, self.name = model, base, name
        self.theirs = base.aliases.get(name, name)
        self.info: TensorInfo = model.info(name)

    @property
    def comparable(self) -> bool:
        """Whether the base has a tensor of the same shape and of a dtype that a difference can be taken to."""
        if self.theirs not in self.base:
            return False
        other = self.base.info(self.theirs)
        same = self.info.dtype == other.dtype
        return other.shape == self.info.shape and (
            same or (is_mergeable(self.info.dtype) and is_mergeable(other.dtype))
        )

    @property
    def grain(self) -> int:
        """Elements that both are best read in multiples of."""
        both = lcm(self.model.grain(self.name), self.base.grain(self.theirs))
        return min(both, max(1, self.info.numel))

    def cuts(self, unit: int = 1) -> list[tuple[int, int]]:
        """[0, numel) in ranges of about `BATCH` elements (or the grain), each a multiple of `unit`."""
        step = unit * -(-max(BATCH, self.grain) // unit)
        return [(a, min(a + step, self.info.numel)) for a in range(0, self.info.numel, step)]

    def after(self, start: int, stop: int) -> Tensor:
        """θ, in the model's storage dtype."""
        return read_any(self.model, self.name, start, stop, self.info.dtype)

    def before(self, start: int, stop: int, dtype: torch.dtype | None = None) -> Tensor:
        """θ0, rounded to `dtype` if one is given."""
        return read_any(self.base, self.theirs, start, stop, dtype)

    def delta(self, start: int, stop: int) -> Tensor:
        """τ = θ − θ0 in float64. DataError where it is not finite."""
        tau = self.after(start, stop).double() - self.before(start, stop).double()
        if not tau.isfinite().all():
            raise DataError(
                f"{self.model.origin} or {self.base.origin}: tensor {self.name!r} has NaN or infinite values, "
                "which only an exact delta can keep: choose the scheme exact, or exclude that tensor"
            )
        return tau

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Gather what must precede reading (statistics of a merge), and forget it afterwards; in this thread."""
        with executing(replace(execution(), map=map_here, where="cpu")):
            self.model.ready(self.name)
            self.base.ready(self.theirs)
            try:
                yield
            finally:
                self.model.release(self.name)
                self.base.release(self.theirs)

    def bytes_read(self) -> int:
        """Stored bytes of one pass over both."""
        return self.model.bytes_read(self.name) + self.base.bytes_read(self.theirs)

    def working_bytes(self, count: int) -> int:
        """An upper bound of what encoding `count` elements holds, batch after batch."""
        most = min(max(count, 2 * BATCH) + 2 * self.grain, self.info.numel)
        inner = self.model.working_bytes(self.name, most) + self.base.working_bytes(self.theirs, most)
        return inner + WORKING * most


Values = Callable[[int, int, torch.dtype | None], Tensor]
"""Reads elements [start, stop) of the base's tensor, rounded to a dtype if one is given."""
Part = Callable[[str, int, int], Tensor]
"""Reads elements [start, stop) of a stored part, flattened."""
