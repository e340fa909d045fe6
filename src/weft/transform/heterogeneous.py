"""CLAFusion: networks of other depth and width fused (arXiv:2110.15538); transformers as well as plain stacks.

1. layers are mapped onto each other by CKA, in order                        layers.py
2. the shallow network gets identity layers until the depths agree           deepen.py: its function stays
3. its units are transported onto the deep one's, whatever the widths        weft.align.transport
4. the mean, of the deep network's shape; a little training is expected afterwards
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from weft.align.correlate import Alignment
from weft.align.transport import ot_fusion
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.statistics.batches import Data, Forward, batches
from weft.statistics.placed import placed
from weft.transform.deepen import deepened
from weft.transform.layers import costs, ends_of, features, increasing


@dataclass(frozen=True)
class CrossLayer:
    """How two networks of different depth were fused."""

    layers: list[int]
    """For every layer of the shallow network the layer of the deep one that it stands for."""
    cka: list[float]
    """Linear CKA of these pairs."""
    deepened: nn.Module
    """The shallow network in the other's depth, computing what it did."""
    change: float
    """How much the new layers changed its outputs, relative to the largest."""
    alignment: Alignment
    """Its units transported onto the deep network's."""

    def merged(self, weight: float = 0.5) -> Checkpoint:
        """(1 − weight) · deep + weight · shallow, of the deep network's shape: a lazy checkpoint."""
        return self.alignment.merged(weight)


def cla_fusion(
    shallow: Model,
    deep: Model,
    data: Data,
    *,
    stack: str = "",
    modules: tuple[nn.Module, nn.Module] | None = None,
    by: Literal["activations", "weights"] = "activations",
    samples: int | None = None,
    forward: Forward | None = None,
    transport: Mapping[str, Any] | None = None,
) -> CrossLayer:
    """Fuse `shallow` into the shape of `deep`; `data` are inputs without labels.

    `stack`: the nn.Sequential or nn.ModuleList that differs in depth, "" for the networks themselves. `modules` are
    the two networks, where models are weights. `by` and `transport` go to `weft.align`'s `ot_fusion`; activations
    are standardised unless it says otherwise (`{"normalise": False}` is the paper's; `reg` makes plans soft).

    Raises UsageError for stacks whose layers cannot be told or a shallower second network, DataError where data do
    not serve, Problems where, with the depths equal, the networks' units still do not correspond.
    """
    one, two = modules if modules is not None else (None, None)
    a, b = placed(shallow, one)[0], placed(deep, two)[0]
    device = next(a.parameters()).device
    every = list(batches(data, device, samples))
    if sum(x.size for x in every) < 2:
        raise DataError("CKA compares layers over examples: give at least two")
    ends = [ends_of(net, stack) for net in (a, b)]
    if len(ends[0]) > len(ends[1]):
        raise UsageError(
            f"the first network has {len(ends[0])} layers, the second {len(ends[1])}: give the shallower first"
        )
    seen = [features(net, stack, at, every, forward) for net, at in zip((a, b), ends, strict=True)]
    cost = costs(*seen)
    path = increasing(cost)
    after = [end for end, k, more in zip(ends[0], path, path[1:], strict=False) for _ in range(more - k - 1)]
    example = every[0].first(2)
    given = dict(example.kwargs) if example.kwargs else example.args
    grown, change = a, 0.0
    if after:
        made = deepened(a, after, stack=stack, example_inputs=given)
        grown, change = made.module, made.change
    found = ot_fusion(grown, b, [x.raw for x in every], by=by, forward=forward, **dict(transport or {}))
    cka = [1 - float(cost[i, k]) for i, k in enumerate(path)]
    return CrossLayer(path, cka, grown, change, found)
