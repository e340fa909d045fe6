"""Networks to calibrate: the layers that have channels, and what of them may change.

A site is a layer whose output has channels that can be measured and rescaled: a linear map, a convolution, or a
BatchNorm. Sites are found by running the network once, so nothing need be known of the architecture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils import _pytree as pytree

from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Data, Forward, batches, outputs_of
from weft.statistics.observe import slow_attention
from weft.train.select import is_conv1d


@dataclass(frozen=True)
class Site:
    """One layer, in the order in which layers run."""

    name: str
    axis: int
    """Where the channels stand in its output: 1, or −1."""
    kind: Literal["batchnorm", "map"]
    """A BatchNorm with running statistics, which is measured at its input, or anything else."""
    calls: int
    final: bool
    """Whether its output is the network's."""
    normed: bool
    """Whether its output goes into a BatchNorm and nowhere else first."""


def held(data: Data, net: nn.Module, device: Any, samples: int | None) -> list[Batch]:
    """All batches, on the device of the network, which is moved there if one is named."""
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    if device is not None:
        net.to(device)
    where = next((p.device for p in net.parameters()), torch.device("cpu"))
    found = list(batches(data, where, samples))
    if not found:
        raise DataError("the data hold no examples")
    return found


def kind_of(module: nn.Module) -> tuple[Literal["batchnorm", "map"], int] | None:
    """What kind of site a module is, and its axis of channels; None for others."""
    if isinstance(module, _BatchNorm):
        return ("map" if module.running_var is None else "batchnorm"), 1
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "map", -1
    return ("map", 1) if isinstance(module, _ConvNd) else None


def sites(net: nn.Module, batch: Batch, forward: Forward | None = None) -> list[Site]:
    """The sites that a batch goes through, in order."""
    order: dict[str, tuple[Literal["batchnorm", "map"], int]] = {}
    calls: dict[str, int] = {}
    made: dict[int, tuple[str, int]] = {}  # storage → who wrote it, and its version then
    normed: set[str] = set()
    kept: list[Tensor] = []  # so that no storage is used twice

    def before(name: str, args: Any) -> None:
        x = args[0]
        writer, version = made.get(x.untyped_storage().data_ptr(), ("", -1))
        if writer and x._version == version:
            normed.add(writer)

    def after(name: str, kind: tuple[Literal["batchnorm", "map"], int], y: Tensor) -> None:
        order[name] = kind
        calls[name] = calls.get(name, 0) + 1
        made[y.untyped_storage().data_ptr()] = name, y._version
        kept.append(y)

    hooks = []
    for name, m in net.named_modules():
        kind = kind_of(m)
        if kind is not None:
            hooks.append(m.register_forward_hook(lambda m, a, y, n=name, k=kind: after(n, k, y)))
        if isinstance(m, _BatchNorm):
            hooks.append(m.register_forward_pre_hook(lambda m, a, n=name: before(n, a)))
    try:
        with torch.no_grad(), slow_attention():
            result = outputs_of(net, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    ends = {
        t.untyped_storage().data_ptr() for t in pytree.tree_leaves(_plain(result)) if isinstance(t, Tensor)
    }
    final = {made[p][0] for p in ends if p in made}
    return [Site(n, axis, kind, calls[n], n in final, n in normed) for n, (kind, axis) in order.items()]


def _plain(result: Any) -> Any:
    """The outputs of a model of transformers as a dict, which torch can walk."""
    return dict(result) if isinstance(result, Mapping) else result


def own(net: nn.Module, name: str, leaf: str) -> nn.Parameter | None:
    """A parameter of a layer that no other place of the network uses, so that it may be changed; else None."""
    p = getattr(net.get_submodule(name), leaf, None)
    if not isinstance(p, nn.Parameter):
        return None
    uses = sum(q is p for _, q in net.named_parameters(remove_duplicate=False))
    return p if uses == 1 else None


def full(name: str, leaf: str) -> str:
    """The name of a parameter of a layer."""
    return f"{name}.{leaf}" if name else leaf


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Hooks that are there only inside."""
    made = list(handles)
    try:
        yield
    finally:
        for h in made:
            h.remove()


def rows(x: Tensor, axis: int, masks: Sequence[Tensor] = ()) -> Tensor:
    """[…, channels, …] → [n, channels], less the positions that a mask leaves out."""
    x = x.movedim(axis, -1)
    for mask in masks:
        if axis == -1 and x.shape[:-1] == mask.shape:
            return x[mask]
    return x.reshape(-1, x.shape[-1])
