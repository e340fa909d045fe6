"""Batches: from tensors (shuffled here, by seed), an iterable that is walked again each epoch, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor

from weft.errors import UsageError
from weft.train.objectives import Batch

Data = tuple[Tensor, Tensor] | Mapping[str, Tensor] | Iterable[Any] | Callable[[torch.Generator], Any]


def as_batch(item: Any, device: torch.device) -> Batch:
    """(inputs, targets), or a mapping whose `labels` are the targets and whose rest are keywords."""
    if isinstance(item, Mapping):
        if "labels" not in item:
            raise UsageError(
                "a batch that is a mapping needs labels: its other entries are the module's keywords"
            )
        rest = {k: _to(v, device) for k, v in item.items() if k != "labels"}
        return Batch((), rest, _to(item["labels"], device))
    if isinstance(item, tuple | list) and len(item) == 2:
        inputs, targets = item
        args = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
        return Batch(tuple(_to(a, device) for a in args), {}, _to(targets, device))
    raise UsageError(f"a batch must be (inputs, targets) or a mapping with labels, not {type(item).__name__}")


def _to(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, Tensor) else x


class Batches:
    """Endless batches of `data`; `per_epoch` is their number in one pass, where it is known.

    Tensors of one length are shuffled anew each epoch by `seed`; the last batch of an epoch may be smaller.
    With `share=(i, n)` each batch is the i-th of n processes' part.
    """

    def __init__(self, data: Data, size: int, seed: int, share: tuple[int, int] = (0, 1)) -> None:
        self.data, self.size, self.seed, self.share = data, size, seed, share
        self.per_epoch: int | None = None
        if size < 1:
            raise UsageError(f"batch must be 1 or more, not {size}")
        self._rows = _rows(data)
        if self._rows is not None:
            self.per_epoch = -(-self._rows // size)
        elif callable(data) and not isinstance(data, Iterable):
            self.per_epoch = None
        elif isinstance(data, Iterable):
            self.per_epoch = len(data) if isinstance(data, Sized) else None
        else:
            raise UsageError(
                f"data must be tensors, an iterable of batches or a function, not {type(data).__name__}"
            )
        if self.per_epoch == 0:
            raise UsageError("there are no data: the first epoch would have no batch")

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            count = 0
            for count, item in enumerate(self._epoch(generator), 1):  # noqa: B007
                yield item
            if count == 0:
                raise UsageError(
                    "the data ran out: an iterator gives its batches once; pass a list or a DataLoader"
                )

    def _epoch(self, generator: torch.Generator) -> Iterator[Any]:
        if self._rows is not None:
            order = torch.randperm(self._rows, generator=generator)
            for index in torch.split(order, self.size):
                # a rest too small to share is everyone's
                mine = index[self.share[0] :: self.share[1]] if len(index) >= self.share[1] else index
                yield _take(self.data, mine)
        elif isinstance(self.data, Iterable):
            yield from self.data
        else:
            assert callable(self.data)
            while True:
                yield self.data(generator)


def _rows(data: Any) -> int | None:
    """The common length of tensors; None for data of another kind."""
    if isinstance(data, Mapping):
        parts = list(data.values())
    elif isinstance(data, tuple) and len(data) == 2:
        parts = [*(data[0] if isinstance(data[0], tuple) else (data[0],)), data[1]]
    else:
        return None
    if not all(isinstance(p, Tensor) for p in parts):
        return None
    lengths = {len(p) for p in parts}
    if len(lengths) != 1:
        raise UsageError(f"the tensors of data have different lengths: {sorted(lengths)}")
    return lengths.pop()


def _take(data: Any, index: Tensor) -> Any:
    if isinstance(data, Mapping):
        return {k: v[index] for k, v in data.items()}
    inputs = tuple(x[index] for x in data[0]) if isinstance(data[0], tuple) else data[0][index]
    return inputs, data[1][index]
