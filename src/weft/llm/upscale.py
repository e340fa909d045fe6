"""Deeper models out of one: two overlapping copies, or new blocks that change nothing yet.

Both are meant to be trained further. Nothing is computed: layers are picked (slices.py), and the output
projections of a new block are zeros.
"""

from __future__ import annotations

import re
from typing import Any

from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError
from weft.llm.slices import Layers, layers, stacked
from weft.methods.layers import block_of

_OUTPUTS = re.compile(
    r".*\.(o_proj|out_proj|c_proj|down_proj|w2|fc2|wo|ff_out|dense_4h_to_h|(?:attention|self_attention|attn)\.dense"
    r"|attention\.output\.dense|output\.dense)(\.weight|\.bias|_bias)?"
)
"""Projections whose output is added to the residual stream, and their biases."""
_AFTER_SUM = re.compile(r".*(output\.LayerNorm|self_attn_layer_norm|sa_layer_norm|output_layer_norm)\..*")
"""Norms of the sum of a block's input and output: with these no block is the identity."""


def upscaled(model: Any, drop: int, stack: str | None = None) -> Checkpoint:
    """Depth up-scaling: two copies of n layers, the first without its last m, the second without its first m.

    s = 2(n − m) layers, 0 ≤ `drop` = m < n. Kim et al., SOLAR 10.7B, arXiv:2312.15166 (n = 32, m = 8).
    """
    every = layers(model, stack)
    if not 0 <= drop < len(every):
        raise UsageError(
            f"drop must be from 0 to {len(every) - 1}, the model has {len(every)} layers; not {drop}"
        )
    made = stacked(every[: len(every) - drop] + every[drop:])
    made.origin = f"{every.picks[0][0].model.origin}, up-scaled to {2 * (len(every) - drop)} layers"
    return made


def expanded(model: Any, blocks: int, stack: str | None = None) -> Checkpoint:
    """Block expansion: `blocks` new layers, spread evenly, each a copy of the one before it with output zero.

    The L layers are cut into groups as equal as can be, and behind each group comes a copy of its last layer
    whose output projections (attention, MLP, experts) and their biases are zeros: x + 0 + 0, so that the
    model computes what it did. Wu et al., LLaMA Pro, arXiv:2401.02415.

    Raises UsageError for 0 or more blocks than layers, and where no block can be the identity: the output
    projections are not known by name, or a norm follows the residual sum (BERT).
    """
    every = layers(model, stack)
    count = len(every)
    if not 1 <= blocks <= count:
        raise UsageError(f"blocks must be from 1 to {count}, as many as the model has layers; not {blocks}")
    ends = {count * (g + 1) // blocks for g in range(blocks)}
    picks, new = [], []
    for i, pick in enumerate(every.picks):
        picks.append(pick)
        if i + 1 in ends:
            new.append(len(picks))
            picks.append(pick)
    tall = stacked(Layers(picks))
    prefix = picks[0][0].stack.prefix
    names = [n for n in tall if (b := block_of(n)) and b[0] == prefix and b[1] in set(new)]
    silent = {n for n in names if _OUTPUTS.fullmatch(n)}
    _check_identity(tall, names, silent, new)
    nothing = 0.0 * tall
    origin = f"{picks[0][0].model.origin} with {blocks} new blocks"
    return Assembled(
        {n: Span(nothing if n in silent else tall, n) for n in tall}, config=tall.config, assets=tall.assets,
        aliases=tall.aliases, origin=origin,
    )  # fmt: skip


def _check_identity(tall: Checkpoint, names: list[str], silent: set[str], new: list[int]) -> None:
    problems = sorted(f"{n}: normalises the sum of a block's input and output" for n in names
                      if _AFTER_SUM.fullmatch(n))  # fmt: skip
    known = {block[1] for n in silent if (block := block_of(n))}
    problems += [f"block {i}: none of its tensors is known for an output projection" for i in new
                 if i not in known]  # fmt: skip
    if problems:
        raise DataProblems(f"no block of {tall.origin} can be made the identity", problems)
