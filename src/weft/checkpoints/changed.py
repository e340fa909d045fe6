"""`Changed`: a checkpoint with some of its tensors replaced by values in memory."""

from __future__ import annotations

from collections.abc import Mapping

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.lazy import Derived
from weft.checkpoints.memory import flat_range
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems
from weft.late import Tensor, torch


class Changed(Derived):
    """`source` with `values` in place of tensors of its own, by name; shapes and storage dtypes stay.

    DataProblems naming every value that has no place or another shape.
    """

    def __init__(self, source: Checkpoint, values: Mapping[str, Tensor], origin: str | None = None) -> None:
        super().__init__(source)
        self.origin = origin or source.origin
        self.values = {source.aliases.get(n, n): v.detach().cpu() for n, v in values.items()}
        problems = [f"{n}: not in {source.origin}" for n in self.values if n not in source]
        problems += [
            f"{n}: shape {list(v.shape)} does not fit {list(source.info(n).shape)}"
            for n, v in self.values.items()
            if n in source and tuple(v.shape) != source.info(n).shape
        ]
        if problems:
            raise DataProblems(f"these values do not fit {source.origin}", problems)

    def grain(self, name: str) -> int:
        return 1 if name in self.values else self.first.grain(name)

    def bytes_read(self, name: str) -> int:
        return 0 if name in self.values else self.first.bytes_read(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self.values:
            self.first.prefetch(name, start, stop)

    def ready(self, name: str) -> None:
        if name not in self.values:
            self.first.ready(name)

    def identity(self) -> str | None:
        return None if self.values else super().identity()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        if name not in self.values:
            return self.first.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, self.info(name), start, stop)
        values = flat_range(self.values[name], start, stop)
        return values if dtype is None else round_to(values, dtype)
