"""Data to learn from: endless batches of tensors that are cut here, of an iterable, or of a function.

Labels may be missing: a batch is what `weft.statistics` takes for one (a tensor, a tuple that ends with labels, a
mapping of keywords with `labels`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.statistics.batches import Batch, as_batch, rows_of, taken

Data = Tensor | tuple[Any, ...] | Mapping[str, Any] | Iterable[Any] | Callable[[torch.Generator], Any]


GONE = "the data hold no batches (an iterator gives its batches once: pass a list or a loader)"


class Feed:
    """Endless batches. Tensors of one length are shuffled anew each pass by `seed` and cut into `size`."""

    def __init__(self, data: Data, size: int, seed: int, device: torch.device) -> None:
        if size < 1:
            raise UsageError(f"batch must be 1 or more, not {size}")
        self.data, self.size, self.seed, self.device = data, size, seed, device
        self.rows = rows_of(data)
        if self.rows == 0:
            raise DataError("the data hold no examples")
        if self.rows is None and not callable(data) and not isinstance(data, Iterable):
            raise UsageError(
                f"data must be tensors, an iterable of batches or a function, not {type(data).__name__}"
            )

    def __iter__(self) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            count = 0
            for count, raw in enumerate(self._pass(generator), 1):  # noqa: B007
                yield self._batch(raw)
            if count == 0:
                raise DataError(GONE)

    def once(self) -> Iterator[Batch]:
        """All of the data once, in order. UsageError for a function, which has no end."""
        if self.rows is not None:
            for start in range(0, self.rows, max(self.size, 256)):
                index = torch.arange(start, min(start + max(self.size, 256), self.rows))
                yield self._batch(taken(self.data, index))
        elif isinstance(self.data, Iterable):
            count = 0
            for count, raw in enumerate(self.data, 1):  # noqa: B007
                yield self._batch(raw)
            if count == 0:
                raise DataError(GONE)
        else:
            raise UsageError("these data must have an end: give tensors or a list of batches")

    def _pass(self, generator: torch.Generator) -> Iterator[Any]:
        if self.rows is not None:
            order = torch.randperm(self.rows, generator=generator)
            yield from (taken(self.data, index) for index in torch.split(order, self.size))
        elif isinstance(self.data, Iterable):
            yield from self.data
        else:
            assert callable(self.data)
            yield self.data(generator)

    def _batch(self, raw: Any) -> Batch:
        plain = dict(raw) if isinstance(raw, Mapping) else raw
        batch = as_batch(pytree.tree_map(lambda v: v.to(self.device) if isinstance(v, Tensor) else v, plain))
        for value in pytree.tree_leaves((batch.args, dict(batch.kwargs))):
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise DataError("the inputs have NaN or infinite values")
        return batch


def feeds(
    data: Any, tasks: list[str] | None, size: int, seed: int, device: torch.device
) -> dict[str | None, Feed]:
    """A feed a task. With tasks, data are a mapping by task; UsageError names what does not fit."""
    if tasks is None:
        return {None: Feed(data, size, seed, device)}
    if not isinstance(data, Mapping) or not data:
        raise UsageError(f"the merge has tasks: give data by task ({', '.join(tasks)})")
    problems = [f"{t!r}: no such task{did_you_mean(str(t), tasks)}" for t in data if t not in tasks]
    if lacking := [t for t in tasks if t not in data]:
        problems.append(f"no data of {', '.join(lacking)}: every task needs some")
    found: dict[str | None, Feed] = {}
    for i, task in enumerate(tasks):
        try:
            if task in data:
                found[task] = Feed(data[task], size, seed + 7919 * i, device)
        except (DataError, UsageError) as error:
            problems.append(f"{task}: {error}")
    if problems:
        raise Problems(f"the data do not fit the tasks {', '.join(tasks)}", problems)
    return found
