"""`shortened`: layers of a stack merged into the next one, their activations made linear (arXiv:2110.15538).

    W₂ σ(W₁x + b₁) + b₂  ≈  W₂ (D (W₁x + b₁) + c) + b₂        one layer: W = W₂ D W₁, b = W₂ (D b₁ + c) + b₂

with D diagonal, from the pre-activations z of each unit on some data: `average`, the share of examples that it is
on for; `majority`, 1 if that is more than half; `sum`, 1 if Σ z > 0; c = 0 for these, as in the paper. `fit` is the
line nearest to σ by least squares, with its intercept c, and not in the paper.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.company import InCompany
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError
from weft.statistics.batches import Batch, Data, Forward, batches
from weft.statistics.placed import placed
from weft.transform.deepen import IDEMPOTENT, items_of, with_stack
from weft.transform.layers import ends_of, features
from weft.transform.reshaped import Reshaped, change_of

Line = Literal["average", "majority", "sum", "fit"]


def shortened(
    model: Model, away: Sequence[int], data: Data, *, stack: str = "", line: Line = "fit",
    module: nn.Module | None = None, samples: int | None = None, forward: Forward | None = None,
) -> Reshaped:  # fmt: skip
    """`model` without the activations that `away` names (items of the stack), the layers around each made one.

    `data`: inputs without labels. The function changes; `change` says by how much on the first two examples.

    Raises UsageError for items that are no activation between two linear layers. Blocks and convolutions, whose
    composition is none of their kind, cannot be merged.
    """
    if line not in ("average", "majority", "sum", "fit"):
        raise UsageError(f"there is no line {line!r}; there are average, majority, sum and fit")
    net, source = placed(model, module)
    device = next(net.parameters()).device
    every = list(batches(data, device, samples))
    made, example = without_layers(net, away, every, stack, line, forward), every[0].first(2)
    change = change_of(net, made, example) if forward is None else float("nan")
    config: Any = getattr(made, "config", None)
    told = config.to_dict() if hasattr(config, "to_dict") else source.config
    checkpoint = InCompany(StateDict(made, f"{source.origin}, shortened"), told, source.assets)
    return Reshaped(made, checkpoint, change, {"stack": stack, "away": sorted(away), "line": line})


def without_layers(
    net: nn.Module,
    away: Sequence[int],
    data: Sequence[Batch],
    stack: str,
    line: Line,
    forward: Forward | None,
) -> nn.Module:
    """A copy of a network with the layers that end at these items merged into the next."""
    items = items_of(net, stack)
    ends = ends_of(net, stack)
    for i in away:
        around = items[max(0, i - 1) : i + 2]
        fits = i in ends and len(around) == 3 and isinstance(around[1], IDEMPOTENT)
        if not fits or not all(isinstance(m, nn.Linear) for m in (around[0], around[2])):
            raise UsageError(
                f"item {i} of {stack or 'the network'} is no activation between two linear layers, so its layer "
                "cannot be merged into the next: grow the shallow network instead (balance='grow')"
            )
    chosen = sorted(set(away))
    before = features(net, stack, [i - 1 for i in chosen], data, forward)
    made, fresh = copy.deepcopy(net), [copy.deepcopy(m) for m in items]
    for i, z in reversed(list(zip(chosen, before, strict=True))):
        first, second = fresh[i - 1], fresh[i + 1]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        flat = z.reshape(-1, z.shape[-1])
        d, c = straightened(flat, items[i](flat.to(second.weight)).cpu(), line)
        fresh[i - 1 : i + 2] = [composed(first, second, d, c)]
    return with_stack(made, stack, fresh)


def straightened(z: Tensor, y: Tensor, line: Line) -> tuple[Tensor, Tensor]:
    """Slope and intercept of each unit, float64, from what it is before and after its activation, [examples, n]."""
    z, y = z.double(), y.double()
    if line == "fit":
        middle = z - z.mean(0)
        slope = (middle * y).mean(0) / middle.pow(2).mean(0).clamp(min=1e-12)
        return slope, y.mean(0) - slope * z.mean(0)
    on = (z > 0).double().mean(0)
    slope = (
        on if line == "average" else (on > 0.5).double() if line == "majority" else (z.sum(0) > 0).double()
    )
    return slope, torch.zeros_like(slope)


def composed(first: nn.Linear, second: nn.Linear, slope: Tensor, intercept: Tensor) -> nn.Linear:
    """x ↦ second(slope · first(x) + intercept) as one layer."""
    made = nn.Linear(
        first.in_features, second.out_features, device=first.weight.device, dtype=first.weight.dtype
    )
    slope, intercept = (t.to(first.weight.device) for t in (slope, intercept))
    w2 = second.weight.double()
    shift = intercept if first.bias is None else slope * first.bias.double() + intercept
    with torch.no_grad():
        made.weight.copy_((w2 * slope) @ first.weight.double())
        made.bias.copy_(w2 @ shift + (0 if second.bias is None else second.bias.double()))
    return made.eval().requires_grad_(False)
