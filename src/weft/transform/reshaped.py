"""`Reshaped`: a network of another shape that computes what it did, checked by running both."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils import _pytree as pytree

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch
from weft.statistics.observe import slow_attention
from weft.train.select import is_conv1d

TOLERANCE = 1e-6
"""How much outputs may change, in float64, relative to their largest."""


@dataclass(frozen=True)
class Reshaped:
    """A network in its new shape."""

    module: nn.Module
    checkpoint: Checkpoint
    change: float
    """How much the outputs changed on the example, in float64, relative to their largest."""
    told: Mapping[str, Any]
    """What was done: sizes of groups, places of layers."""


def change_of(before: nn.Module, after: nn.Module, example: Batch) -> float:
    """max |after − before| / max |before| over the floating outputs, in float64. DataError where one cannot run."""
    results = []
    for net in (before, after):
        wide = copy.deepcopy(net).double().eval()
        call = pytree.tree_map(
            lambda t: t.double() if _floating(t) else t, (example.args, dict(example.kwargs))
        )
        with torch.no_grad(), slow_attention():
            try:
                results.append(_outputs(wide(*call[0], **call[1])))
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                raise DataError(
                    f"{type(net).__name__} cannot be run in its new shape ({str(error)[:160]}): its code has "
                    "a size written down that no tensor tells; make the network in that shape and give it as to="
                ) from error
    worst = 0.0
    for b, a in zip(*results, strict=True):
        if b.shape != a.shape:
            return float("inf")
        worst = max(worst, float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)))
    return worst


def _floating(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _outputs(result: Any) -> list[Tensor]:
    """The logits, or every floating tensor; no caches."""
    if isinstance(result, Mapping):
        kept = {k: v for k, v in result.items() if k.startswith("logits")}
        result = kept or {k: v for k, v in result.items() if "cache" not in k and k != "past_key_values"}
    return [t for t in pytree.tree_leaves(result) if _floating(t) and t.numel()]


def resized(module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module with tensors of other sizes, and torch's own layers told of them.

    UsageError where the module lacks a tensor. Code of its own that has a size written down is not changed.
    """
    made = copy.deepcopy(module)
    for name, value in state.items():
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        old = getattr(owner, leaf, None)
        if not isinstance(old, Tensor):
            raise UsageError(f"{type(module).__name__} has no tensor {name}")
        if old.shape != value.shape:
            fresh = value.detach().clone().to(old.dtype)
            kept = nn.Parameter(fresh, old.requires_grad) if isinstance(old, nn.Parameter) else fresh
            setattr(owner, leaf, kept)
        else:
            with torch.no_grad():
                old.copy_(value)
    for m in made.modules():
        told_sizes(m)
    return made


def told_sizes(m: Any) -> None:
    """Make a layer's attributes those of its weight."""
    weight = getattr(m, "weight", None)
    if not isinstance(weight, Tensor):
        return
    if isinstance(m, nn.Linear):
        m.out_features, m.in_features = weight.shape
    elif is_conv1d(m):
        m.nx, m.nf = weight.shape
    elif isinstance(m, _ConvNd):
        first, second = weight.shape[:2]
        out = m.out_channels
        if isinstance(m, _ConvTransposeNd):
            m.in_channels, m.out_channels = first, second * m.groups
        else:
            if m.groups > 1 and first != out and first % (out // m.groups) == 0:
                m.groups = first // (out // m.groups)  # more groups of the same size
            m.in_channels, m.out_channels = second * m.groups, first
    elif isinstance(m, _BatchNorm | nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        m.num_features = len(weight)
    elif isinstance(m, nn.GroupNorm):
        m.num_channels = len(weight)
    elif isinstance(m, nn.LayerNorm | nn.RMSNorm):
        m.normalized_shape = tuple(weight.shape)
    elif isinstance(m, nn.Embedding):
        m.num_embeddings, m.embedding_dim = weight.shape
