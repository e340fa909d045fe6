"""`reduce_experts`: fewer experts in every layer of a mixture, and what is checked before any is merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import get_args

from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError, did_you_mean
from weft.llm.moe.blocks import Block, blocks_of
from weft.llm.moe.measure import Texts, expert_usage, router_inputs
from weft.llm.moe.reduced import How, Reduced
from weft.llm.moe.routing import routing_of


def reduce_experts(
    model: Checkpoint,
    n: int,
    how: How = "frequency",
    *,
    texts: Texts | None = None,
    tokens: int = 1024,
    inputs: Mapping[str, Tensor] | None = None,
    usage: Mapping[str, Tensor] | None = None,
    experts_per_token: int | None = None,
    align: bool = True,
    ridge: float = 1e-2,
    seed: int = 0,
) -> Reduced:
    """`model` with n experts a layer: clusters merged by usage ("frequency"), evenly ("mean"), by usage and then
    least squares on inputs ("lstsq"), or the n most used kept ("drop").

    What the layers see is measured over `texts`, at `tokens` of their tokens (or given as `inputs`, from
    `router_inputs`); `usage` gives shares by mixture prefix where only they are known. "mean" needs neither.
    `experts_per_token` is the new top-k (the old one, at most n, by default). `align` permutes neurons before
    they are averaged. `seed` is for the random inputs that experts are compared on without data. Raises
    UsageError for what cannot be meant, DataProblems where layers differ in their experts.
    """
    if how not in get_args(How):
        raise UsageError(f"experts cannot be reduced by {how!r}{did_you_mean(how, get_args(How))}")
    if texts is not None and inputs is not None:
        raise UsageError("texts and inputs exclude each other: inputs are what texts are measured for")
    blocks = blocks_of(model)
    _check(blocks, n, how, experts_per_token)
    if how == "lstsq" and texts is None and inputs is None:
        raise UsageError("least squares needs inputs: give texts to measure them with")
    if texts is not None:
        inputs = router_inputs(model, texts, tokens=tokens)
    if usage is None and inputs is not None:
        usage = expert_usage(model, inputs)
    if usage is None and how != "mean":
        raise UsageError(f"{how} needs to know how often each expert is used: give texts, or usage")
    for given, name in ((inputs, "inputs"), (usage, "usage")):
        if given is not None and (absent := [b.prefix for b in blocks if b.prefix not in given]):
            raise UsageError(f"{name} say nothing of {', '.join(absent)}")
    return Reduced(model, n, how, inputs, usage, experts_per_token, align, ridge, seed)


def _check(blocks: Sequence[Block], n: int, how: How, top_k: int | None) -> None:
    counts = {b.count for b in blocks}
    origin = blocks[0].model.origin
    if len(counts) > 1:
        raise DataProblems(
            f"{origin} has layers with different numbers of experts, which a config cannot tell apart",
            [f"{b.prefix}: {b.count}" for b in blocks],
        )
    count = counts.pop()
    if not 1 <= n <= count:
        raise UsageError(f"{origin} has {count} experts a layer: it cannot be reduced to {n}")
    if top_k is not None and not 1 <= top_k <= n:
        raise UsageError(f"{top_k} experts per token cannot be chosen from {n}")
    if how == "drop":
        return
    if odd := [b.prefix for b in blocks if b.roles() is None]:
        raise UsageError(
            f"the experts of {odd[0]} in {origin} are not gate, up and down projections without biases, so "
            "weft cannot merge them; drop the least used instead (how: drop)"
        )
    routing = routing_of(blocks[0].model.config)
    if routing.groups > 1 and (n % routing.groups or n // routing.groups < routing.best_in_group):
        raise UsageError(
            f"{origin} chooses experts by {routing.groups} groups: n must be a multiple of that, with "
            f"{routing.best_in_group} experts a group at least, not {n}"
        )
