"""Layers picked, repeated, reordered and stacked anew: frankenmerges as a lazy checkpoint.

    tall = weft.stacked(weft.layers(a)[:24] + weft.layers(b)[8:])

`layers(model)` is the sequence of a model's blocks: it takes indices, slices and lists of indices, and
sequences add up. `stacked` makes a checkpoint of one: block i of the output is the i-th picked. Tensors before
the blocks come from the first layer's model, tensors after them (final norm, head) from the last one's, the
config from the first's, with everything it says of layers rewritten (depth.py). Values are copied, not computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Asset, Checkpoint
from weft.errors import DataProblems, UsageError
from weft.llm.consistency import contradictions, prediction_layers
from weft.llm.depth import Layer, aspects, relayered
from weft.llm.layout import Stack, is_tower, layout
from weft.methods.layers import block_of
from weft.recipes.kinds import after_blocks


@dataclass(frozen=True)
class Source:
    """A model and the stack of it that layers are picked from."""

    model: Checkpoint
    stack: Stack
    block_names: Mapping[int, tuple[str, ...]]
    """Index → what follows `prefix + index + "."` in the names of that block, tied names included."""
    before: tuple[str, ...]
    after: tuple[str, ...]
    aspects: Mapping[str, Sequence[Any]]

    def layer(self, index: int) -> Layer:
        return Layer(self.model.origin, self.aspects, index)


def source(model: Checkpoint, stack: str | None = None) -> Source:
    """What must be known to pick layers: of the main stack, or of the one called by prefix.

    Raises UsageError where there is no such stack or several could be meant, DataProblems where the config
    contradicts the tensors.
    """
    found = layout(model)
    chosen = found.main() if stack is None else found.stacks.get(stack.rstrip(".") + ".")
    if chosen is None:
        known = ", ".join(s.removesuffix(".") for s in found.stacks) or "none"
        raise UsageError(f"{model.origin} has no stack of blocks {stack or ''}; it has {known}")
    if stack is None and found.rivals:
        each = ", ".join(s.prefix.removesuffix(".") for s in (chosen, *found.rivals))
        raise UsageError(f"{model.origin} has several stacks of blocks ({each}): name the one that is meant "
                         f"(in a recipe, write modules)")  # fmt: skip
    problems = contradictions(model, found)
    if problems:
        raise DataProblems(f"{model.origin}: config and tensors contradict each other", problems)
    config = model.config or {}
    if prediction_layers(config, chosen):
        raise UsageError(f"{model.origin} has blocks behind its last that predict further tokens; picking "
                         f"layers of such a model is not possible")  # fmt: skip
    blocks: dict[int, list[str]] = {}
    outside: list[str] = []
    for name in (*model.tensors, *model.aliases):
        block = block_of(name)
        if block is not None and block[0] == chosen.prefix:
            blocks.setdefault(block[1], []).append(name[len(f"{block[0]}{block[1]}.") :])
        else:
            outside.append(name)
    after = [n for n in outside if _follows(n, chosen)]
    return Source(
        model, chosen, {i: tuple(names) for i, names in blocks.items()},
        tuple(n for n in outside if n not in set(after)), tuple(after), aspects(config, chosen),
    )  # fmt: skip


def _follows(name: str, stack: Stack) -> bool:
    """Whether a tensor outside the blocks comes after them: not what stands in other parts of the model."""
    if is_tower(name) and not is_tower(stack.prefix):
        return False
    in_part = name.startswith(stack.owner)
    side = "encoder" if "encoder" in stack.prefix else "decoder"
    elsewhere = not in_part and any(o in name for o in ("encoder.", "decoder.") if not o.startswith(side))
    return after_blocks(name) and not elsewhere


class Layers:
    """Picked layers, of one model or several; see the module's docstring."""

    def __init__(self, picks: Iterable[tuple[Source, int]]) -> None:
        self.picks = tuple(picks)

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, which: int | slice | Sequence[int]) -> Layers:
        if isinstance(which, slice):
            return Layers(self.picks[which])
        indices = [which] if isinstance(which, int) else list(which)
        outside = [i for i in indices if not -len(self) <= i < len(self)]
        if outside:
            raise UsageError(f"there is no layer {', '.join(map(str, outside))}: there are {len(self)}")
        return Layers(self.picks[i] for i in indices)

    def __add__(self, other: Layers) -> Layers:
        return Layers((*self.picks, *other.picks))

    def __mul__(self, times: int) -> Layers:
        return Layers(self.picks * times)

    def __repr__(self) -> str:
        return " + ".join(f"{s.model.origin}[{i}]" for s, i in self.picks)


def layers(model: Any, stack: str | None = None) -> Layers:
    """The blocks of a model (anything `weft.load` takes), of its main stack or the one called by prefix."""
    from weft.checkpoints.load import load

    made = source(load(model), stack)
    return Layers((made, i) for i in range(made.stack.count))


def stacked(
    picked: Layers,
    *,
    before: bool = True,
    after: bool = True,
    frame: Checkpoint | None = None,
    around: Source | None = None,
    ties: Mapping[str, str] | None = None,
    origin: str = "",
) -> Checkpoint:
    """A checkpoint whose blocks are `picked`, in their order; unread.

    `before` and `after` say whether the tensors before and after the blocks are there; they come from `around`,
    or from the first and last layer's models. Config and files are those of `frame`, or of the first layer's
    model. A head that is tied to the embedding stays so where both come from one model, or where `ties` (tied
    name → tensor) says so; otherwise it becomes a tensor. Raises DataProblems where the config cannot say what the
    layers are.
    """
    if not picked.picks:
        raise UsageError("there are no layers to stack")
    first, last = around or picked.picks[0][0], around or picked.picks[-1][0]
    names = _Names(first.stack.prefix, ties or {})
    if before:
        names.outside(first, first.before)
    for i, (origin_of, index) in enumerate(picked.picks):
        names.block(i, origin_of, index)
    if after:
        names.outside(last, last.after)
    pieces, aliases = names.settled()
    shown = origin or _told(picked)
    framing = frame or first.model
    config, assets = _config(picked, framing, shown)
    if config is not None and (names.ties.keys() | framing.aliases.keys()) & pieces.keys():
        config = untied(config)
    return Assembled(pieces, config=config, assets=assets, aliases=aliases, origin=shown)


class _Names:
    """Output names as they are gathered: spans of stored tensors, and tied names with what they are tied to."""

    def __init__(self, prefix: str, given: Mapping[str, str]) -> None:
        self.prefix, self.given = prefix, given
        self.spans: dict[str, Span] = {}
        self.ties: dict[str, tuple[Checkpoint, str]] = {}
        self.placed: dict[tuple[int, str], str] = {}
        """(model, its tensor) → the first output name that shows it."""

    def outside(self, source: Source, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.given:
                self._put(name, source.model, name)

    def block(self, i: int, source: Source, index: int) -> None:
        for rest in source.block_names[index]:
            self._put(f"{self.prefix}{i}.{rest}", source.model, f"{source.stack.prefix}{index}.{rest}")

    def _put(self, new: str, model: Checkpoint, old: str) -> None:
        if old in model:
            self.spans[new] = Span(model, old)
            self.placed.setdefault((id(model), old), new)
        else:
            self.ties[new] = (model, model.aliases[old])

    def settled(self) -> tuple[dict[str, Span], dict[str, str]]:
        """Every name a span, or tied to one. What is tied to a tensor that is not there is one of its own."""
        pieces = dict(self.spans)
        aliases = {name: target for name, target in self.given.items() if target in pieces}
        for name, (model, target) in self.ties.items():
            placed = self.placed.get((id(model), target))
            if placed is None:
                pieces[name] = Span(model, target)
            else:
                aliases[name] = placed
        return pieces, aliases


def _config(
    picked: Layers, frame: Checkpoint, origin: str
) -> tuple[Mapping[str, Any] | None, tuple[Asset, ...]]:
    if not frame.config:
        return frame.config, frame.assets
    own = next((s for s, _ in picked.picks if s.model is frame), None)
    stack = own.stack if own is not None else _stack_of(frame, picked.picks[0][0].stack)
    told = [s.layer(i) for s, i in picked.picks]
    return relayered(frame.config, stack, told, origin), frame.assets


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model with a head of its own. Some classes tie theirs unless told otherwise."""
    inner = {k: untied(v) for k, v in config.items() if isinstance(v, Mapping) and "tie_word_embeddings" in v}
    return {**config, **inner, "tie_word_embeddings": False}


def _stack_of(frame: Checkpoint, like: Stack) -> Stack:
    found = layout(frame)
    return found.stacks.get(like.prefix) or found.main() or like


def _told(picked: Layers) -> str:
    """`a[0:4] + b[2:6]`: runs of layers of one model."""
    runs: list[tuple[str, int, int]] = []
    counts = {source.model.origin: source.stack.count for source, _ in picked.picks}
    for source, i in picked.picks:
        if runs and runs[-1][0] == source.model.origin and runs[-1][2] == i:
            runs[-1] = (runs[-1][0], runs[-1][1], i + 1)
        else:
            runs.append((source.model.origin, i, i + 1))
    shown = " + ".join(o if (a, b) == (0, counts[o]) else f"{o}[{a}:{b}]" for o, a, b in runs[:8])
    return shown + (f" + {len(runs) - 8} more" if len(runs) > 8 else "")
