"""What a mixture's layers see: the inputs of its routers, caught in a forward pass over texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.llm.moe.blocks import Block, blocks_of
from weft.llm.moe.routing import routing_of

Texts = Sequence[str | Sequence[int]]
"""Texts, or the token ids of texts."""


def router_inputs(
    model: Checkpoint, texts: Texts, *, tokens: int = 1024, window: int = 512
) -> dict[str, Tensor]:
    """The states that enter each mixture `[n, hidden]` (float32), by the mixture's prefix.

    The whole model runs forward over the texts, in pieces of `window` tokens; of all states, at most `tokens`
    are kept, evenly spread. Raises UsageError where the texts hold no token or there is no tokenizer,
    MissingExtra without transformers.
    """
    from weft.llm.hf import to_transformers

    blocks = blocks_of(model)
    sequences = _sequences(model, texts, window)
    total = sum(len(s) for s in sequences)
    if not total:
        raise UsageError("the texts to measure the experts with hold no token")
    module = to_transformers(model, dtype=torch.float32)
    found = [m for m in module.modules() if _is_mixture(m)]
    if len(found) != len(blocks):
        raise DataError(
            f"{model.origin} has {len(blocks)} layers with experts, its class {len(found)}: "
            f"{type(module).__name__} is not the class of this checkpoint"
        )
    kept: list[list[Tensor]] = [[] for _ in blocks]
    wanted = set(torch.linspace(0, total - 1, min(tokens, total)).round().long().tolist())
    at = 0

    def catcher(i: int) -> Any:
        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else kwargs["hidden_states"]).detach().flatten(0, -2)
            rows = [j for j in range(len(x)) if at + j in wanted]
            kept[i].append(x[rows].clone())

        return catch

    hooks = [m.register_forward_pre_hook(catcher(i), with_kwargs=True) for i, m in enumerate(found)]
    try:
        for sequence in sequences:
            with torch.no_grad():
                module(input_ids=torch.tensor([sequence]), use_cache=False)
            at += len(sequence)
    finally:
        for hook in hooks:
            hook.remove()
    return {b.prefix: torch.cat(k) for b, k in zip(blocks, kept, strict=True)}


def expert_usage(model: Checkpoint, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often each expert is chosen, as a share of the tokens `[experts]` (float64), by mixture."""
    usage = {}
    for block in blocks_of(model):
        if block.prefix in inputs:
            usage[block.prefix] = (gates_of(block, inputs[block.prefix]) > 0).double().mean(0)
    return usage


def gates_of(block: Block, x: Tensor) -> Tensor:
    """g `[tokens, experts]`, float64: the weight of each expert in a mixture's output for inputs x."""
    rows, bias, correction = router_of(block)
    logits = x.double() @ rows.T
    return routing_of(block.model.config).chosen(logits if bias is None else logits + bias, correction)


def router_of(block: Block) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The router's rows `[E, H]`, the bias of its logits, the correction of its choice `[E]`; float64."""
    found: dict[str, Tensor] = {}
    block.model.survey()
    for name, axis in block.routers.items():
        block.model.ready(name)
        values = block.model.tensor(name).double().movedim(axis, 0)
        kind = block.router_kind(name)
        found[kind] = values if kind == "rows" else values.reshape(-1)
    return found["rows"], found.get("bias"), found.get("correction")


def _is_mixture(module: nn.Module) -> bool:
    """True for what holds experts and the router that chooses among them."""
    return isinstance(getattr(module, "experts", None), nn.Module) and any(
        isinstance(getattr(module, name, None), nn.Module) for name in ("gate", "router")
    )


def _sequences(model: Checkpoint, texts: Texts, window: int) -> list[list[int]]:
    """Token ids, in pieces of at most `window`."""
    tokenizer: Any = None
    found: list[list[int]] = []
    for text in texts:
        if not isinstance(text, str):
            ids = [int(i) for i in text]
        else:
            if tokenizer is None:
                from weft.llm.hf import tokenizer_of

                tokenizer = tokenizer_of(model)
            if tokenizer is None:
                raise UsageError(
                    f"{model.origin} has no tokenizer to read the texts with; put its tokenizer files beside "
                    "config.json, or give token ids"
                )
            ids = list(tokenizer(text)["input_ids"])
        found += [ids[i : i + window] for i in range(0, len(ids), window)]
    return found
