"""A checkpoint's tensors under GGUF's names: experts stacked, rotary rows reordered, norms offset.

Every tensor must find its place or be one that is known to hold nothing (a buffer); all that do not are
named at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from weft.checkpoints.assembled import Assembled, Span, Whole
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems
from weft.export.gguf.architectures import Architecture
from weft.export.gguf.changes import Change, Changed, PlusOne, RotaryRows, Transposed
from weft.export.gguf.metadata import Sizes

_BUFFERS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")


def named(
    checkpoint: Checkpoint,
    known: Architecture,
    sizes: Sizes,
    constants: Mapping[str, Tensor],
    notes: list[str],
) -> Checkpoint:
    """The tensors as GGUF has them, still lazy. Raises DataProblems naming every one without a place."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    number = {name: arch for arch, name in MODEL_ARCH_NAMES.items()}[known.arch]
    table = get_tensor_name_map(MODEL_ARCH(number), sizes.blocks)
    placed: dict[str, Whole] = {}
    problems: list[str] = []
    for name, whole, origin in _sources(checkpoint, known, sizes, problems, notes):
        place = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if place is None:
            problems.append(f"{shown(origin)} has no place in GGUF's {known.arch} of {sizes.blocks} blocks")
        elif place in placed:
            problems.append(f"{shown(origin)} and another tensor both become {place}")
        else:
            placed[place] = whole
    problems += _missing_blocks(placed, sizes)
    if problems:
        raise DataProblems(f"{checkpoint.origin} cannot be written as GGUF", problems)
    extra = StateDict(dict(constants), origin="rotary scaling") if constants else None
    for name in extra or ():
        assert extra is not None
        placed[name] = Whole((Span(extra, name),))
    ordered = dict(sorted(placed.items(), key=lambda item: _order(item[0])))
    assembled = Assembled(ordered, origin=checkpoint.origin)
    return Changed(assembled, _changes(assembled, known, sizes))


def _sources(
    checkpoint: Checkpoint, known: Architecture, sizes: Sizes, problems: list[str], notes: list[str]
) -> list[tuple[str, Whole, str]]:
    """(name to look up, values, what to call it) of every tensor, or stack of experts."""
    found: list[tuple[str, Whole, str]] = []
    stacks: dict[str, dict[int, str]] = {}
    for name, info in checkpoint.tensors.items():
        if _BUFFERS.fullmatch(name):
            notes.append(f"{name}: left out, a buffer that is computed")
        elif known.always_tied and name == "lm_head.weight" and sizes.config.get("tie_word_embeddings", True):
            notes.append(f"{name}: left out, since GGUF's {known.arch} uses the embedding")
        elif match := _EXPERT.fullmatch(name):
            stacks.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = name
        elif (match := _FUSED.fullmatch(name)) and len(info.shape) == 3:
            found += _split_experts(checkpoint, name, match[1], match[2])
        else:
            shape = tuple(n for n in info.shape if n != 1) or (1,)  # as readers of GGUF expect
            found.append((name, Whole((Span(checkpoint, name),), shape), name))
    for stack, members in stacks.items():
        names = [members[i] for i in sorted(members)]
        shapes = {checkpoint.info(n).shape for n in names}
        if sorted(members) != list(range(sizes.experts or len(members))) or len(shapes) > 1:
            problems.append(
                f"{shown(stack)}: {len(members)} experts that are not all alike, or not all there"
            )
            continue
        shape = (len(names), *shapes.pop())
        found.append((stack, Whole(tuple(Span(checkpoint, n) for n in names), shape), stack))
    return found


def _split_experts(checkpoint: Checkpoint, name: str, prefix: str, part: str) -> list[tuple[str, Whole, str]]:
    """All experts' weights in one tensor, as transformers 5 may write them; gate rows come before up rows."""
    experts, rows, columns = checkpoint.info(name).shape
    if part == "down_proj":
        return [(f"{prefix}.down_proj.weight", Whole((Span(checkpoint, name),)), name)]
    half = rows // 2 * columns
    found = []
    for i, leaf in enumerate(("gate_proj", "up_proj")):
        starts = [e * rows * columns + i * half for e in range(experts)]
        spans = tuple(Span(checkpoint, name, s, s + half) for s in starts)
        found.append((f"{prefix}.{leaf}.weight", Whole(spans, (experts, rows // 2, columns)), name))
    return found


def _missing_blocks(placed: Mapping[str, Any], sizes: Sizes) -> list[str]:
    """Every block must have the tensors that most blocks have, and there must be an embedding."""
    blocks: dict[str, set[int]] = {}
    for name in placed:
        if match := _BLOCK.fullmatch(name):
            blocks.setdefault(match[2], set()).add(int(match[1]))
    problems = [
        f"blk.{i}.{leaf} is in other blocks but not in this one of the {sizes.blocks} that config.json states"
        for leaf, there in blocks.items()
        for i in range(sizes.blocks)
        if i not in there
    ]
    if "token_embd.weight" not in placed:
        problems.append("there is no token embedding")
    return problems


def _order(name: str) -> tuple[int, int, str]:
    """Embedding, blocks in turn, the rest."""
    match = _BLOCK.fullmatch(name)
    if match:
        return 1, int(match[1]), match[2]
    return (0 if name.startswith(("token_embd", "position_embd")) else 2), 0, name


def _changes(source: Checkpoint, known: Architecture, sizes: Sizes) -> dict[str, Change]:
    changes: dict[str, Change] = {}
    for name in source:
        leaf = name.partition(".")[2].partition(".")[2] if name.startswith("blk.") else name
        if known.permuted and leaf.startswith(("attn_q.", "attn_k.")):
            changes[name] = RotaryRows(sizes.head)
        elif known.norm_offset and name.endswith("norm.weight"):
            changes[name] = PlusOne()
        elif leaf in known.transposed:
            changes[name] = Transposed()
    return changes
