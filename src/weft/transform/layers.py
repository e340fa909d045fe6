"""Layers of two networks of different depth: which is most like which, in order (arXiv:2110.15538).

C[l, k] = 1 − CKA of what layer l of the shallow and layer k of the deep network make of the same data; the map is
the strictly increasing one of least Σ C, with the first and last layers on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.analysis.representation import linear_cka
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Forward, outputs_of
from weft.statistics.observe import slow_attention
from weft.transform.deepen import IDEMPOTENT, is_map, items_of


def ends_of(net: nn.Module, stack: str) -> list[int]:
    """The items of a stack that end a layer: blocks, else activations behind a linear layer or convolution.

    UsageError where there are none.
    """
    items = items_of(net, stack)
    blocks = [i for i, m in enumerate(items) if list(m.children())]
    if blocks:
        return blocks
    found, mapped = [], False
    for i, m in enumerate(items):
        mapped = mapped or is_map(m)
        if mapped and isinstance(m, IDEMPOTENT):
            found.append(i)
            mapped = False
    if not found:
        raise UsageError(
            f"{stack or 'the network'} has neither blocks nor layers that end in an activation such as ReLU, so "
            "its layers cannot be told"
        )
    return found


def features(
    net: nn.Module, stack: str, ends: Sequence[int], data: Sequence[Batch], forward: Forward | None = None
) -> list[Tensor]:
    """What every layer makes of the data: [n, …], all batches behind one another."""
    found: dict[int, list[Tensor]] = {i: [] for i in ends}

    def note(i: int, y: Any) -> None:
        found[i].append((y[0] if isinstance(y, tuple) else y).detach().cpu())

    items = items_of(net, stack)
    hooks = [items[i].register_forward_hook(lambda m, a, y, i=i: note(i, y)) for i in ends]
    try:
        with torch.no_grad(), slow_attention():
            for batch in data:
                outputs_of(net, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(v) != len(data) for v in found.values()):
        raise DataError(
            f"{type(net).__name__} does not run every layer of {stack or 'its stack'} once a batch"
        )
    return [torch.cat(found[i]) for i in ends]


def costs(shallow: Sequence[Tensor], deep: Sequence[Tensor]) -> Tensor:
    """1 − CKA, [layers of the one, of the other]; infinite where maps have another size in space.

    DataError where features are not finite.
    """
    for x in (*shallow, *deep):
        if not bool(x.isfinite().all()):
            raise DataError("features are NaN or infinite for these data, so layers cannot be compared")
    made = torch.empty(len(shallow), len(deep), dtype=torch.float64)
    for i, x in enumerate(shallow):
        for k, y in enumerate(deep):
            space = x.dim() > 3 and x.shape[2:] != y.shape[2:]
            made[i, k] = float("inf") if space else 1 - linear_cka(_rows(x), _rows(y))
    return made


def _rows(x: Tensor) -> Tensor:
    """One row an example, or a token: [n, …] of images flat, [n, t, d] of sequences as [n·t, d]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() == 3 else x.flatten(1)


def increasing(cost: Tensor) -> list[int]:
    """k(0) < k(1) < … of least Σ cost[l, k(l)], with k(0) = 0 and k(m − 1) = n − 1; by dynamic programming.

    UsageError where the first network is the deeper, DataError where no map of finite cost exists.
    """
    m, n = cost.shape
    if m > n:
        raise UsageError(f"{m} layers do not fit into {n}: give the shallower network first")
    if m == 1 and n > 1:
        raise UsageError("one layer cannot be both the first and the last of several: give it two")
    best = torch.full((m, n), float("inf"), dtype=torch.float64)
    came = torch.zeros(m, n, dtype=torch.long)
    best[0, 0] = cost[0, 0]
    for i in range(1, m):
        for k in range(i, n):
            before, at = best[i - 1, :k].min(0)
            best[i, k], came[i, k] = before + cost[i, k], at
    if not bool(best[-1, -1].isfinite()):
        raise DataError(
            "no order of layers fits: the two networks have maps of one size in space at other depths"
        )
    path = [n - 1]
    for i in range(m - 1, 0, -1):
        path.append(int(came[i, path[-1]]))
    return path[::-1]
