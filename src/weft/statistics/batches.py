"""Data for a measurement: batches of any usual form, how many examples they hold, what counts, and what is right.

A batch is a tensor (the inputs), a tuple whose last entry are the labels, or a mapping of keyword arguments
(`labels` set apart; `attention_mask` says which tokens count), as data loaders of torch and transformers give
them. Data are an iterable of batches, such as a loader or a list, or what one batch could be with all of the
examples in it, which is cut here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weft.errors import DataError, UsageError

Data = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]
MASKS = ("attention_mask", "decoder_attention_mask")
CUT = 256
"""Examples of a batch that is cut from data that come whole."""


@dataclass(frozen=True)
class Batch:
    """One batch taken apart. Tensors have the examples along their first axis."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None
    raw: Any
    size: int

    @property
    def masks(self) -> list[Tensor]:
        """Which positions count, [B, T] bool each."""
        found = [self.kwargs.get(name) for name in MASKS]
        return [m != 0 for m in found if isinstance(m, Tensor) and m.dim() == 2]

    def first(self, n: int) -> Batch:
        """Its first n examples."""
        if n >= self.size:
            return self
        return self.part(0, n)

    def part(self, start: int, stop: int) -> Batch:
        """Examples [start, stop)."""
        return self._of(lambda value: value[start:stop])

    def repeated(self, i: int, n: int) -> Batch:
        """Example i, n times."""
        return self._of(lambda value: value[i : i + 1].expand(n, *value.shape[1:]))

    def _of(self, cut: Callable[[Tensor], Tensor]) -> Batch:
        def one(value: Any) -> Any:
            held = isinstance(value, Tensor) and value.dim() > 0 and len(value) == self.size
            return cut(value) if held else value

        return as_batch(pytree.tree_map(one, self.raw))


def batches(data: Data, device: torch.device, limit: int | None = None) -> Iterator[Batch]:
    """The batches of `data`, on the device, up to `limit` examples."""
    count = None if _are_batches(data) else rows_of(data)
    if count is not None:
        return _limited((taken(data, slice(at, at + CUT)) for at in range(0, count, CUT)), device, limit)
    if isinstance(data, str | bytes) or not isinstance(data, Iterable):
        raise UsageError(
            f"data must be tensors or an iterable of batches, such as a DataLoader, not a {type(data).__name__}"
        )
    return _limited(data, device, limit)


def _limited(data: Data, device: torch.device, limit: int | None) -> Iterator[Batch]:
    left = limit
    for raw in data:
        if left == 0:
            return
        batch = as_batch(_moved(raw, device))
        batch = batch if left is None else batch.first(left)
        left = None if left is None else left - batch.size
        if batch.size:
            yield batch


def _are_batches(data: Any) -> bool:
    """Whether a tuple of tensors is one of batches, which are alike (as from `split`); inputs and labels aren't."""
    if not isinstance(data, tuple) or not all(isinstance(p, Tensor) and p.ndim for p in data):
        return False
    return len({(p.dtype, p.shape[1:]) for p in data}) == 1


def rows_of(data: Any) -> int | None:
    """How many examples there are in data that come whole: a tensor, a tuple or a mapping of tensors; else None.

    UsageError where the lengths differ.
    """
    if isinstance(data, Tensor):
        parts: list[Any] = [data]
    elif isinstance(data, Mapping):
        parts = list(data.values())
    elif isinstance(data, tuple):
        parts = list(data)
    else:
        return None
    if not parts or not all(isinstance(p, Tensor) and p.ndim for p in parts):
        return None
    lengths = sorted({len(p) for p in parts})
    if len(lengths) != 1:
        raise UsageError(f"the tensors of data have different lengths: {lengths}")
    return lengths[0]


def taken(data: Any, index: Tensor | slice) -> Any:
    """Some examples of such data, in the same form."""
    if isinstance(data, Mapping):
        return {k: v[index] for k, v in data.items()}
    return tuple(v[index] for v in data) if isinstance(data, tuple) else data[index]


def as_batch(raw: Any) -> Batch:
    """One batch taken apart; UsageError for what is none."""
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    labels = None
    if isinstance(raw, Mapping):
        kwargs = {str(k): v for k, v in raw.items()}
        labels = kwargs.pop("labels", None)
    elif isinstance(raw, Tensor):
        args = (raw,)
    elif isinstance(raw, Sequence) and not isinstance(raw, str | bytes) and len(raw):
        args, labels = (tuple(raw[:-1]), raw[-1]) if len(raw) > 1 else ((raw[0],), None)
    else:
        raise UsageError(
            f"a batch must be a tensor, a tuple or a mapping of tensors, not a {type(raw).__name__}"
        )
    sizes = [len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.dim()]
    if not sizes:
        raise UsageError("a batch must hold a tensor with the examples along its first axis")
    if labels is not None and not isinstance(labels, Tensor):
        raise UsageError(f"labels must be a tensor, not a {type(labels).__name__}")
    return Batch(args, kwargs, labels, raw, sizes[0])


def _moved(value: Any, device: torch.device) -> Any:
    plain = dict(value) if isinstance(value, Mapping) else value
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, plain)


def outputs_of(module: nn.Module, batch: Batch, forward: Forward | None) -> Any:
    """What the module makes of a batch: by `forward(module, batch as given)`, or by calling it with the inputs."""
    if forward is not None:
        return forward(module, batch.raw)
    return module(*batch.args, **batch.kwargs)


def logits_of(outputs: Any, check: bool = True) -> Tensor:
    """The logits among the outputs: a tensor, `.logits`, `["logits"]`, or the first of a tuple.

    `check` refuses values that are not finite (which torch.func cannot ask about).
    """
    found = outputs
    if not isinstance(found, Tensor):
        found = getattr(outputs, "logits", None)
        if found is None and isinstance(outputs, Mapping):
            found = outputs.get("logits")
        if found is None and isinstance(outputs, tuple | list) and outputs:
            found = outputs[0]
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        raise UsageError(
            "the model's output has no logits [examples, …, classes]: pass forward=lambda model, batch: …, "
            "which gives them"
        )
    if check and not bool(found.detach().isfinite().all()):
        raise DataError("the model's logits have NaN or infinite values for these data")
    return found
