"""`Checkpoint`: named tensors whose name, shape and dtype are known at once and whose values are not.

Everything that holds weights is one: a file, a folder, a module, a difference of two models, a merge.
A value is computed only when it is read, whole or a range of elements at a time, so a graph of
checkpoints of any depth streams in bounded memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.checkpoints.bits import Bits
from weft.checkpoints.dtypes import DType
from weft.checkpoints.orientation import inputs_first
from weft.errors import UsageError, did_you_mean
from weft.late import Tensor, torch

if TYPE_CHECKING:
    from weft.checkpoints.lazy import Affine

ANY_RANGE = 1
"""The grain of a tensor that may be read in any range of elements."""


@dataclass(frozen=True, slots=True, init=False)
class TensorInfo:
    """Shape and storage dtype of one tensor."""

    shape: tuple[int, ...]
    kind: DType
    """The dtype as weft's own; to know it takes no torch."""

    def __init__(self, shape: tuple[int, ...], kind: torch.dtype | DType | str) -> None:
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "kind", DType.of(kind))

    @property
    def dtype(self) -> torch.dtype:
        return self.kind.torch

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.kind.itemsize


@dataclass(frozen=True)
class Asset:
    """A file that travels with the weights (config.json, tokenizer.json …); read only when written."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One file weights are read from, for the manifest. `path` is a local path or a URL."""

    path: str
    size: int
    digest: Callable[[], str] | None = None
    """Returns the sha256 in hex, from a cache where the file is unchanged; None where it cannot be had."""

    def identity(self) -> str:
        """Path, size and time of last change: enough to see that a file is not what it was."""
        try:
            return f"{self.path}:{self.size}:{Path(self.path).stat().st_mtime_ns}"
        except OSError:
            return f"{self.path}:{self.size}"


class Checkpoint(ABC):
    """Named tensors, their config and the files that travel with them.

    Subclasses give `tensors` and `read`; the rest has defaults.
    """

    origin: str = "checkpoint"
    """What the user called it: the path, id or expression, for messages."""
    stem: str = "model"
    """What its weight file is called in a folder; loaders expect an adapter's to be one file of its own name."""

    @property
    @abstractmethod
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Name → shape and dtype, in the checkpoint's own order. Never reads a value."""

    @abstractmethod
    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Elements `[start, stop)` of the flattened tensor, as a 1-D CPU tensor of `stop - start`.

        Without `dtype` the values come as exactly as the node has them: the storage dtype for a file,
        the (wider) working dtype for a lazy node. With `dtype` they are rounded to it, once.
        The result is the caller's to read; whether it may be written to is not promised.
        `start` and `stop` must be multiples of `grain(name)` (or the end).
        """

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        """`read`, as bits: of what is only moved, or made by kernels, torch need not be imported."""
        return Bits.of(self.read(name, start, stop, dtype=None if dtype is None else dtype.torch))

    def inputs_first(self, name: str) -> bool:
        """Whether a weight is stored [in, out], by the module it is of, or by the config and its name."""
        inner = any(s.inputs_first(name) for s in self.inputs if name in s)
        return inner or inputs_first(name, self.info(name).shape, self.config)

    def grain(self, name: str) -> int:
        """How many consecutive elements must be read together: 1, a row's length, or the whole tensor."""
        return ANY_RANGE

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:  # noqa: B027
        """Hint that a range will be read soon. Returns at once; may do nothing."""

    def survey(self) -> None:
        """Do the first pass over all tensors that a value may depend on; inputs first. Idempotent."""
        for source in self.inputs:
            source.survey()

    def ready(self, name: str) -> None:
        """Do whatever must precede the first read of a tensor (its statistics); inputs first. Idempotent."""
        for source in self.inputs:
            if name in source:
                source.ready(name)

    @property
    def aliases(self) -> Mapping[str, str]:
        """Tied names that are not in `tensors` → the tensor whose values they share."""
        return {}

    @property
    def config(self) -> Mapping[str, Any] | None:
        """config.json as data, or None."""
        return None

    @property
    def assets(self) -> tuple[Asset, ...]:
        """Files that travel with the weights, config.json excepted."""
        return ()

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """The checkpoints this one is computed from."""
        return ()

    @property
    def files(self) -> tuple[WeightFile, ...]:
        """Every file that the values come from, inputs' files included, each once."""
        seen = {f.path: f for source in self.inputs for f in source.files}
        return tuple(seen.values())

    def bytes_read(self, name: str) -> int:
        """Stored bytes that computing one tensor reads, first passes included."""
        if not self.inputs:
            return self.info(name).nbytes
        return sum(s.bytes_read(name) for s in self.inputs if name in s)

    def at_hand(self, name: str) -> bool:
        """Whether to read a range again costs no more than to keep it: what local files hold as it is.

        It is in the page cache since it was read, and is copied from there into buffers that the processor's cache
        holds, where values kept elsewhere in memory come from memory each time.
        """
        return False

    def held_bytes(self, name: str) -> int:
        """Memory that `hold` would take; 0 where a tensor is read once anyway."""
        return sum(s.held_bytes(name) for s in self.inputs if name in s)

    def hold(self, name: str) -> None:
        """Keep what is read of a tensor in memory until `release`, since it will be read several times."""
        for source in self.inputs:
            if name in source:
                source.hold(name)

    def release(self, name: str) -> None:
        """Forget what was held or found out for a tensor; it will not be read again soon."""
        for source in self.inputs:
            if name in source:
                source.release(name)

    def working_bytes(self, name: str, count: int) -> int:
        """Memory that reading `count` elements takes at its peak, the result included; an upper bound."""
        itemsize = self.info(name).kind.itemsize
        inner = sum(s.working_bytes(name, count) for s in self.inputs if name in s)
        return inner + count * (itemsize if not self.inputs else 24)

    def identity(self) -> str | None:
        """Text that is the same exactly when the values are; None where that cannot be known (memory)."""
        if self.inputs:
            inner = [s.identity() for s in self.inputs]
            return None if None in inner else f"{type(self).__name__}({', '.join(map(str, inner))})"
        if not self.files:
            return None
        return f"{type(self).__name__}({', '.join(f.identity() for f in self.files)})"

    # -- conveniences ---------------------------------------------------------------------------

    def tensor(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """The whole tensor, in its shape. A tied name gives the tensor it is tied to."""
        name = self.aliases.get(name, name)
        return self.read(name, dtype=dtype).reshape(self.info(name).shape)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of one tensor; UsageError with the nearest name if there is none."""
        try:
            return self.tensors[name]
        except KeyError:
            hint = did_you_mean(name, self.tensors)
            raise UsageError(f"{self.origin} has no tensor {name!r}{hint}") from None

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor in memory, rounded to its storage dtype; tied names share one tensor."""
        state = {n: self.tensor(n, dtype=i.dtype).clone() for n, i in self.tensors.items()}
        return state | {alias: state[name] for alias, name in self.aliases.items()}

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(info.nbytes for info in self.tensors.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.origin!r}: {len(self)} tensors, {self.nbytes:,} bytes>"

    # -- arithmetic: every expression is one affine combination, evaluated when read --------------

    def __add__(self, other: Checkpoint) -> Affine:
        from weft.checkpoints.lazy import Affine

        return Affine.of(self) + other

    def __sub__(self, other: Checkpoint) -> Affine:
        from weft.checkpoints.lazy import Affine

        return Affine.of(self) - other

    def __mul__(self, factor: float) -> Affine:
        from weft.checkpoints.lazy import Affine

        return Affine.of(self) * factor

    def __rmul__(self, factor: float) -> Affine:
        return self * factor

    def __truediv__(self, divisor: float) -> Affine:
        return self * (1.0 / divisor)

    def __neg__(self) -> Affine:
        return self * -1.0
