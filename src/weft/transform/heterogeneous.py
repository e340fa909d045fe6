"""CLAFusion: networks of other depth and width fused (arXiv:2110.15538); transformers as well as plain stacks.

1. layers are mapped onto each other by CKA, in order                        layers.py
2. the shallow network gets identity layers until the depths agree           deepen.py: its function stays
   or the deep one's other layers are merged into the next                   shorten.py: it becomes an approximation
3. units are transported onto the other network's, whatever the widths       weft.align.transport
   or those of both zipped, the alike with the alike (elastic zipping)       weft.align.zipping
4. the mean, of the one network's shape; a little training is expected afterwards
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from weft.align.correlate import Alignment
from weft.align.transport import ot_fusion
from weft.align.zipping import Zipped, zip_models
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.statistics.batches import Data, Forward, batches
from weft.statistics.placed import placed
from weft.transform.deepen import deepened
from weft.transform.layers import costs, ends_of, features, increasing
from weft.transform.reshaped import change_of
from weft.transform.shorten import Line, without_layers


@dataclass(frozen=True)
class CrossLayer:
    """How two networks of different depth were fused."""

    layers: list[int]
    """For every layer of the shallow network the layer of the deep one that it stands for."""
    cka: list[float]
    """Linear CKA of these pairs."""
    balanced: nn.Module
    """The network whose depth was changed: the shallow one grown, or the deep one with layers merged."""
    change: float
    """How much that changed its outputs, relative to the largest: next to nothing where it has grown."""
    alignment: Alignment | Zipped
    """Its units transported onto the other network's, or the units of both zipped."""

    def merged(self, weight: float = 0.5) -> Checkpoint:
        """(1 − weight) · the other + weight · the balanced network, of the other's shape: a lazy checkpoint.

        UsageError for a zip with another weight than a half: its units are means already.
        """
        if isinstance(self.alignment, Alignment):
            return self.alignment.merged(weight)
        if weight != 0.5:
            raise UsageError("zipped units are means of both networks: weight must be 0.5")
        return self.alignment.merged()


def cla_fusion(
    shallow: Model,
    deep: Model,
    data: Data,
    *,
    stack: str = "",
    modules: tuple[nn.Module, nn.Module] | None = None,
    balance: Literal["grow", "merge"] = "grow",
    units: Literal["transport", "zip"] = "transport",
    line: Line = "fit",
    by: Literal["activations", "weights"] = "activations",
    samples: int | None = None,
    forward: Forward | None = None,
    transport: Mapping[str, Any] | None = None,
) -> CrossLayer:
    """Fuse two networks of other depth and width; `data` are inputs without labels.

    `balance`: "grow" the shallow network to the deep one's shape, or "merge" the deep one's layers that the shallow
    one has none for, by `line` (see `shortened`), into the shallow one's shape; linear layers only. `units`:
    "transport", with `by` and `transport` for `weft.align`'s `ot_fusion` (activations are standardised unless it
    says otherwise; `{"normalise": False}` is the paper's; `reg` makes plans soft), or "zip", with `transport` for
    `zip_models`. `stack`: the nn.Sequential or nn.ModuleList that differs in depth, "" for the networks themselves.
    `modules` are the two networks, where models are weights.

    Raises UsageError for stacks whose layers cannot be told or a shallower second network, DataError where data do
    not serve, Problems where, with the depths equal, the networks' units still do not correspond.
    """
    if balance not in ("grow", "merge") or units not in ("transport", "zip"):
        raise UsageError(
            f"balance is grow or merge and units transport or zip, not {balance!r} and {units!r}"
        )
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
    example = every[0].first(2)
    balanced, other = (a, b) if balance == "grow" else (b, a)
    change = 0.0
    if balance == "merge":
        away = [end for k, end in enumerate(ends[1]) if k not in path]
        balanced = without_layers(b, away, every, stack, line, forward) if away else b
        change = change_of(b, balanced, example) if away and forward is None else 0.0
    else:
        after = [e for e, k, more in zip(ends[0], path, path[1:], strict=False) for _ in range(more - k - 1)]
        if after:
            given = dict(example.kwargs) if example.kwargs else example.args
            grown = deepened(a, after, stack=stack, example_inputs=given)
            balanced, change = grown.module, grown.change
    raw, options = [x.raw for x in every], dict(transport or {})
    found: Alignment | Zipped
    if units == "zip":
        found = zip_models([other, balanced], raw, forward=forward, **options)
    else:
        found = ot_fusion(balanced, other, raw, by=by, forward=forward, **options)
    cka = [1 - float(cost[i, k]) for i, k in enumerate(path)]
    return CrossLayer(path, cka, balanced, change, found)
