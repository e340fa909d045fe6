"""LoRA Soups: weights of adapters learned by gradients, for every layer, on the exact sum.

Prabhakar et al., COLING 2025, arXiv:2410.13025 (CAT): W_l + Σᵢ w_{l,i} BᵢAᵢ with the w_{l,i} learned on a few
examples and everything else frozen. With `simplex` the weights of a layer are a softmax, as in Asadi et al. 2024,
arXiv:2402.15414.

The module may be any torch module: its weights are replaced during the forward pass by the sums, so in training
(and only there) a dense weight is formed for each update, as for any fine-tuning of these weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.adapters.factors import as_adapter
from weft.adapters.merge import Source, merge_adapters
from weft.adapters.output import AdapterCheckpoint
from weft.adapters.together import Missing, together
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError
from weft.methods.layers import block_of

Model = Callable[..., Any]
Groups = Literal["tensor", "layer", "model"]


@dataclass(frozen=True)
class Soup:
    """Learned weights."""

    weights: dict[str, list[float]]
    """Tensor → one weight an adapter: what `merge_adapters` takes."""
    adapter: AdapterCheckpoint
    """The exact merge with these weights."""
    losses: list[float]
    """The loss of every step."""


def learn_soup(
    module: nn.Module,
    adapters: Sequence[Source],
    loss: Callable[[Model, Any], Tensor],
    batches: Iterable[Any],
    *,
    per: Groups = "layer",
    simplex: bool = False,
    steps: int = 100,
    rate: float = 0.05,
    start: Sequence[float] | None = None,
    missing: Missing = "error",
    how: str = "concat",
    **merging: Any,
) -> Soup:
    """Learn the weights of `adapters` over `module` (the base) by Adam on `loss(model, batch)`.

    `model(*args)` calls the module with the present sum in its weights; `batches` are gone through again as often
    as `steps` needs. `per`: one list of weights a tensor, a block of layers (tensors outside the blocks have their
    own), or the model. `start` is one weight an adapter, 1/k by default. The module itself is not changed.
    `merging` (and `how`) say how the final adapter is made. Deterministic for the same batches.
    """
    fitting = together([as_adapter(a, StateDict(module)) for a in adapters], missing=missing)
    k = len(fitting.adapters)
    begin = [1 / k] * k if start is None else [float(w) for w in start]
    if len(begin) != k or steps < 1 or (simplex and min(begin) <= 0):
        raise UsageError(
            f"{k} adapters need {k} starting weights (above 0 on a simplex) and one step or more"
        )
    data = list(batches)
    if not data:
        raise UsageError("there are no batches to learn from")
    groups = {name: _group(name, per) for name in fitting.slots}
    order = list(dict.fromkeys(groups.values()))
    frozen = {n: p.detach() for n, p in (*module.named_parameters(), *module.named_buffers())}
    unknown = [name for name in fitting.slots if name not in frozen]
    if unknown:
        raise UsageError(
            f"weights are learned for whole parameters only, and {unknown[0]!r} is none of the module's"
        )
    updates = {name: _tensors(fitting.factors(name), frozen[name]) for name in fitting.slots}
    raw = torch.tensor([begin] * len(order), dtype=torch.float32)
    raw = (raw.log() if simplex else raw).requires_grad_(True)

    def weights() -> Tensor:
        return raw.softmax(1) if simplex else raw

    def model(*args: Any, **kwargs: Any) -> Any:
        w = weights()
        made = {name: frozen[name] + expand(w[order.index(groups[name])]) for name, expand in updates.items()}
        return functional_call(module, {**frozen, **made}, args, kwargs)

    optimizer = torch.optim.Adam([raw], lr=rate)
    losses: list[float] = []
    for batch in islice(cycle(data), steps):
        optimizer.zero_grad()
        value = loss(model, batch)
        if not torch.isfinite(value):
            shown = float(value.detach())
            raise DataError(f"the loss is {shown} at step {len(losses)}: lower the rate, or mend the data")
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(value.detach()))
    learned = weights().detach().double().tolist()
    table = {name: learned[order.index(group)] for name, group in groups.items()}
    made = merge_adapters(list(fitting.adapters), table, how=how, missing=missing, **merging)
    return Soup(table, made, losses)


def _group(name: str, per: Groups) -> str:
    if per == "model":
        return ""
    block = block_of(name) if per == "layer" else None
    return f"{block[0]}.{block[1]}" if block else name


def _tensors(factors: Sequence[Any], weight: Tensor) -> Callable[[Tensor], Tensor]:
    """w: [k] ↦ Σ wᵢΔWᵢ in the weight's shape and dtype, differentiable in w."""
    b = torch.cat([f.b for f in factors], 1).to(weight)
    a = torch.cat([f.a for f in factors]).to(weight)
    ranks = torch.tensor([f.rank for f in factors], device=weight.device)
    turned, shape = factors[0].transposed, weight.shape

    def expand(w: Tensor) -> Tensor:
        total = (b * w.to(weight).repeat_interleave(ranks)) @ a
        return (total.T if turned else total).reshape(shape)

    return expand
