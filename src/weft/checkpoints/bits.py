"""`Bits`: a run of values as they are stored, in a numpy array of their bits. What files hold and kernels take.

torch and numpy look at the same memory, so either may be had of the other without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoints.dtypes import DType
from weft.late import Tensor, torch

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Bits:
    """A 1-D array, and the dtype that its bits are of."""

    array: Array
    dtype: DType

    @classmethod
    def empty(cls, count: int, dtype: DType) -> Bits:
        """Memory for `count` values."""
        return cls(np.empty(count, dtype.raw or f"V{dtype.itemsize}"), dtype)

    @classmethod
    def of(cls, values: Tensor) -> Bits:
        """The memory of a CPU tensor, flat; copied only where it is not contiguous."""
        dtype = DType.of(values.dtype)
        flat = values.detach().contiguous().reshape(-1)
        if dtype.raw is None:
            return cls(flat.view(torch.uint8).numpy().view(f"V{dtype.itemsize}"), dtype)
        held = np.dtype(dtype.raw).name
        return cls((flat if held == dtype.name else flat.view(getattr(torch, held))).numpy(), dtype)

    def tensor(self) -> Tensor:
        """The same memory as a tensor `[n]`."""
        wanted = self.dtype.torch
        if self.dtype.raw is None:
            return torch.from_numpy(self.array.view(np.uint8)).view(wanted)
        made = torch.from_numpy(self.array)
        return made if made.dtype == wanted else made.view(wanted)

    @property
    def memory(self) -> memoryview:
        """The bytes, to be filled or written."""
        array: Any = self.array.view(np.uint8)
        return memoryview(array)

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, part: slice) -> Bits:
        return Bits(self.array[part], self.dtype)


def join(parts: Sequence[Bits]) -> Bits:
    """One after the other."""
    return parts[0] if len(parts) == 1 else Bits(np.concatenate([p.array for p in parts]), parts[0].dtype)
