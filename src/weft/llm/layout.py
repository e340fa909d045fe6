"""What must be known of a model's architecture, read off its tensors' names and its config.

No list of architectures. Stacks of blocks come from the integers in names; the config's fields that count them
are those whose value is that number; the vocabulary is the axis as long as the config's `vocab_size` in an
embedding or a head; experts are the second integer of a name, or the first axis of a fused tensor; the parts of
a model of several kinds of input or output are the prefixes that tell its stacks apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.methods.layers import block_of
from weft.recipes.kinds import kinds_of

_COUNTS = re.compile(
    r"(num_|n_)?((hidden|encoder|decoder|text|vision|audio)_)?(layers?|blocks)|depth|num_(\w+_)?hidden_layers"
)
_EXPERT = re.compile(r"(?P<prefix>.*\bexperts)\.(?P<index>\d+)\.(?P<rest>.+)")
_FUSED = re.compile(r"(?P<prefix>.*\bexperts)\.(?P<rest>[^\d.][^.]*)(?:\.weight)?")
_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOWER = re.compile(r"vision|visual|image|audio|speech|vit\b|vqmodel|qformer|projector")

ConfigPath = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stack:
    """Blocks one after the other: `prefix` + index + "." begins the names of each."""

    prefix: str
    count: int
    counted_by: tuple[ConfigPath, ...]
    """Paths in the config (`("text_config", "num_hidden_layers")`) of fields that state `count`."""
    listed_by: tuple[ConfigPath, ...]
    """Paths of lists with one entry a block (`layer_types`)."""
    holes: tuple[int, ...] = ()
    """Indices below `count` that no tensor has."""
    owner: str = ""
    """The prefix of the part of the model that the stack stands in; empty where it is the whole model."""
    miscounted_by: tuple[ConfigPath, ...] = ()
    """Paths of fields that ought to state the number of blocks and state another."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts of one block."""

    prefix: str
    """`model.layers.3.mlp.experts`."""
    count: int
    parts: tuple[str, ...]
    """What each consists of: names after `prefix.N.`, or after `prefix.` where fused."""
    fused: bool
    """True where one tensor `[count, …]` holds a part of all experts (transformers 5)."""


@dataclass(frozen=True)
class Layout:
    """The structure of one checkpoint."""

    stacks: Mapping[str, Stack]
    """By prefix."""
    vocabulary: Mapping[str, int]
    """Tensors with one row a token → the size of that first axis (padding included)."""
    experts: Mapping[str, Experts]
    """By prefix."""

    def main(self) -> Stack | None:
        """The stack a user means by "the layers": the longest that the config counts and is in no tower."""
        own = [s for s in self.stacks.values() if not is_tower(s.prefix)] or list(self.stacks.values())
        return max(own, key=lambda s: (bool(s.counted_by or s.miscounted_by), s.count), default=None)

    @property
    def rivals(self) -> tuple[Stack, ...]:
        """Stacks beside the main one that are no tower's either: an encoder's beside a decoder's."""
        main = self.main()
        if main is None:
            return ()
        return tuple(
            s
            for s in self.stacks.values()
            if s is not main and s.owner != main.owner and s.counted_by and not is_tower(s.prefix)
        )


def is_tower(prefix: str) -> bool:
    """True for a part of a model of several kinds of input that is not the language model."""
    return _TOWER.search(prefix.lower()) is not None


def layout(model: Checkpoint) -> Layout:
    """The structure of a checkpoint, from names, shapes and config; nothing is read."""
    config = model.config or {}
    indices = _indices(model)
    owners = _owners(list(indices))
    stacks = {}
    for prefix, found in indices.items():
        count = max(found) + 1
        told = [(p, v) for p, v in fields(config) if _of_stack(p, prefix, list(indices), config)]
        stated = [(p, v) for p, v in told if _counts(p, v)]
        stacks[prefix] = Stack(
            prefix, count, tuple(p for p, v in stated if v == count),
            tuple(p for p, v in told if _lists(p, v, count)),
            tuple(i for i in range(count) if i not in found), owners[prefix],
            tuple(p for p, v in stated if v != count and count > 1),
        )  # fmt: skip
    return Layout(stacks, _vocabulary(model, config), _experts(model, config))


def fields(config: Mapping[str, Any], path: ConfigPath = ()) -> Iterator[tuple[ConfigPath, Any]]:
    """Every field of a config and of the configs inside it, with its path."""
    for key, value in config.items():
        yield (*path, key), value
        if isinstance(value, Mapping):
            yield from fields(value, (*path, key))


def _indices(model: Checkpoint) -> dict[str, set[int]]:
    """Stack prefix → the block indices that names have, tied names included."""
    found: dict[str, set[int]] = {}
    for name in (*model.tensors, *model.aliases):
        if block := block_of(name):
            found.setdefault(block[0], set()).add(block[1])
    return found


def _owners(prefixes: list[str]) -> dict[str, str]:
    """For every stack the shortest prefix that parts it from the stacks of other parts.

    `encoder.block.` and `decoder.block.` are parts `encoder.` and `decoder.`. Several stacks within one tower
    (`visual.blocks.`, `visual.merger.mlp.`) are one part.
    """
    main = [p for p in prefixes if not is_tower(p)]
    owners = {}
    for prefix in prefixes:
        # a tower is told apart from the language model, and that from everything
        others = main if is_tower(prefix) and main else [p for p in prefixes if p != prefix]
        owners[prefix] = _parting(prefix, others)
    return owners


def _parting(prefix: str, others: list[str]) -> str:
    if not others:
        return ""
    parts = prefix.split(".")[:-1]
    for n in range(1, len(parts) + 1):
        head = ".".join(parts[:n]) + "."
        if not any(o.startswith(head) for o in others):
            return head
    return prefix


def _counts(path: ConfigPath, value: Any) -> bool:
    return type(value) is int and _COUNTS.fullmatch(path[-1]) is not None


def _lists(path: ConfigPath, value: Any, count: int) -> bool:
    if isinstance(value, str):  # one letter a block
        return len(value) == count and count > 1 and path[-1].endswith("pattern")
    named = re.search(r"layer|block|pattern|depth|sparse_step|num_\w*heads|multipliers|intermediate_size",
                      path[-1])  # fmt: skip
    return (
        isinstance(value, list) and len(value) == count and named is not None and not index_list(path, value)
    )


def index_list(path: ConfigPath, value: Any) -> bool:
    """True for a list of block indices (`mlp_only_layers`), rather than one entry a block."""
    if not isinstance(value, list) or any(type(v) is not int for v in value):
        return False
    named = re.search(r"(only|moe|dense|full_attn|global_attn|attention|attn)_(layers?|layer_ids)$|"
                      r"(idxs|idx|indices|indexes|layer_ids)$", path[-1])  # fmt: skip
    return named is not None and all(v >= 0 for v in value) and all(a < b for a, b in pairwise(value))


def _of_stack(path: ConfigPath, prefix: str, prefixes: list[str], config: Mapping[str, Any]) -> bool:
    """Whether a field of the config may speak of this stack."""
    where = "_".join(path).lower()
    if is_tower(where) != is_tower(prefix):
        # a model that is nothing but a tower has no sub-config for it
        lone = all(is_tower(p) for p in prefixes) and not any(is_tower(k) for k, v in config.items()
                                                              if isinstance(v, Mapping))  # fmt: skip
        return is_tower(prefix) and lone
    if is_tower(prefix):
        return _same_sense(prefix, where)
    return _of_side(path, prefix, prefixes, config)


def _same_sense(prefix: str, where: str) -> bool:
    """A field of an audio tower is not a vision tower's."""
    audio = re.compile(r"audio|speech")
    return bool(audio.search(prefix.lower())) == bool(audio.search(where))


def _of_side(path: ConfigPath, prefix: str, prefixes: list[str], config: Mapping[str, Any]) -> bool:
    """Encoders and decoders: a field that names neither is the encoder's, where there are both."""
    where = "_".join(path).lower()
    sides = {p: "encoder" if "encoder" in p else "decoder" if "decoder" in p else "" for p in prefixes}
    both = {"encoder", "decoder"} <= set(sides.values())
    if both or (sides[prefix] == "decoder" and any("decoder" in k and "layers" in k for k in config)):
        return sides[prefix] == ("decoder" if "decoder" in where else "encoder")
    other = {"encoder": "decoder", "decoder": "encoder"}.get(sides[prefix], "")
    return not other or other not in where


def _vocabulary(model: Checkpoint, config: Mapping[str, Any]) -> dict[str, int]:
    sizes = {v for path, v in fields(config) if path[-1] == "vocab_size" and type(v) is int}
    found = {}
    for name, info in model.tensors.items():
        outside = block_of(name) is None and not is_tower(name)
        if not outside or not info.shape or not may_be_vocabulary(name):
            continue
        if info.shape[0] in sizes:
            found[name] = info.shape[0]
    return found


def may_be_vocabulary(name: str) -> bool:
    """Whether a name outside the blocks may be an embedding or a head; T5 and BART call theirs `shared`."""
    return bool(kinds_of(name) & {"embedding", "head"}) or "shared" in name.split(".")


def _experts(model: Checkpoint, config: Mapping[str, Any]) -> dict[str, Experts]:
    each: dict[str, dict[str, set[int]]] = {}
    fused: dict[str, dict[str, int]] = {}
    counts = {v for path, v in fields(config) if path[-1] in _EXPERT_COUNTS and type(v) is int}
    for name, info in model.tensors.items():
        if match := _EXPERT.fullmatch(name):
            each.setdefault(match["prefix"], {}).setdefault(match["rest"], set()).add(int(match["index"]))
        elif (match := _FUSED.fullmatch(name)) and info.shape and (not counts or info.shape[0] in counts):
            fused.setdefault(match["prefix"], {})[name.removeprefix(match["prefix"] + ".")] = info.shape[0]
    found = {p: Experts(p, max(max(i) for i in parts.values()) + 1, tuple(parts), False)
             for p, parts in each.items()}  # fmt: skip
    return found | {
        p: Experts(p, next(iter(parts.values())), tuple(parts), True) for p, parts in fused.items()
    }
