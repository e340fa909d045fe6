"""Configs of transformers that say what the tensors of a reshaped model say."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
SIZES = re.compile(r".*(size|dim|embd|inner|ff|heads?|width|channels|model)$")
"""Names of settings that are sizes."""
KEPT = ("head_dim", "vocab_size")


def grown_config(net: nn.Module, shapes: Shapes) -> nn.Module | None:
    """The network made anew from a config whose sizes give these shapes; None where none is found.

    Sizes of the config are tried one by one, each with what the shapes have in its place, and kept where more
    tensors fit. The size of a head is not tried: attention divides by its root.
    """
    config: Any = copy.deepcopy(net.config)
    known = {n: tuple(t.shape) for n, t in net.state_dict().items()}
    changes = {
        (a, b) for n, s in shapes.items() for a, b in zip(known.get(n, ()), s, strict=False) if a != b
    }  # fmt: skip
    wrong = _misfits(net, config, shapes)
    while wrong:
        best: tuple[int, Any] | None = None
        for key, value in [kv for kv in vars(config).items() if SIZES.match(kv[0]) and kv[0] not in KEPT]:
            for tried in _tries(value, changes):
                candidate = copy.deepcopy(config)
                left = _misfits(net, candidate, shapes, **{key: tried})
                if left is not None and left < (wrong if best is None else best[0]):
                    best = left, candidate
        if best is None:
            return None
        wrong, config = best
    return type(net)(copy.deepcopy(config)).eval()


def _tries(value: Any, changes: set[tuple[int, int]]) -> list[int]:
    if type(value) is int:
        return sorted({value * b // a for a, b in changes if (value * b) % a == 0 and value > 0})
    return sorted({b for _, b in changes}) if value is None else []


def _misfits(net: nn.Module, config: Any, shapes: Shapes, **changed: Any) -> int | None:
    """How many tensors a network of this config has in another shape; None where it cannot be made."""
    try:
        for key, value in changed.items():
            setattr(config, key, value)
        with torch.device("meta"):
            made = type(net)(copy.deepcopy(config))
    except Exception:  # whatever a class of transformers says to a config that makes no sense
        return None
    found = {n: tuple(t.shape) for n, t in made.state_dict().items()}
    if set(found) != set(shapes):
        return None
    return sum(found[n] != s for n, s in shapes.items())
