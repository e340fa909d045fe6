"""One model's trunk inside another's frame: a language model and the vision-language model made of it.

The two keep the same blocks under different names (`model.layers.` and `model.language_model.layers.`). The
blocks say how names map: strip what two stacks' prefixes have in common at the end, and the rest is what the
names differ by. `Frame` shows every model under the frame's names, the trunk only, and puts what is
made of the trunks back among the frame's other tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems
from weft.llm.layout import is_tower, layout
from weft.llm.parts import Part
from weft.llm.slices import untied
from weft.methods.layers import block_of


def every_name(model: Checkpoint) -> dict[str, None]:
    """Names of tensors and tied names, in order."""
    return dict.fromkeys((*model.tensors, *model.aliases))


def name_map(part: Checkpoint, whole: Checkpoint) -> dict[str, str] | None:
    """Every name of `part` → the name of the same tensor in `whole`; None where no stack of blocks agrees.

    A name that `whole` has no counterpart for maps to what it would be called.
    """
    theirs = every_name(whole)
    ours = every_name(part)
    if not any(block_of(n) and n not in theirs for n in ours) and any(block_of(n) for n in ours):
        return {n: n for n in ours}
    heads = _heads(part, whole)
    if heads is None:
        return None
    inner, outer = heads
    return {name: _counterpart(name, inner, outer, theirs) for name in ours}


def _counterpart(name: str, inner: str, outer: str, theirs: Mapping[str, None]) -> str:
    moved = outer + name.removeprefix(inner) if name.startswith(inner) else None
    above = outer.rpartition(".")[0].rpartition(".")[0]
    tried = [moved, name, f"{above}.{name}" if above else None]
    there = [t for t in tried if t is not None and t in theirs and not is_tower(t)]
    return there[0] if there else moved or name


def _heads(part: Checkpoint, whole: Checkpoint) -> tuple[str, str] | None:
    """(`model.`, `model.language_model.`): by what the names of the two models' blocks differ."""
    main = layout(part).main()
    if main is None:
        return None
    mine = _inside(part, main.prefix)
    best: tuple[float, str] | None = None
    for stack in layout(whole).stacks.values():
        if is_tower(stack.prefix) and not is_tower(main.prefix):
            continue
        other = _inside(whole, stack.prefix)
        alike = len(mine & other) / len(mine | other)
        if alike > 0.5 and (best is None or alike > best[0]):
            best = (alike, stack.prefix)
    if best is None:
        return None
    inner, outer = main.prefix.split(".")[:-1], best[1].split(".")[:-1]
    while inner and outer and inner[-1] == outer[-1]:
        inner.pop()
        outer.pop()
    return "".join(f"{p}." for p in inner), "".join(f"{p}." for p in outer)


def _inside(model: Checkpoint, prefix: str) -> set[str]:
    return {n[len(prefix) :] for n in every_name(model) if (b := block_of(n)) and b[0] == prefix}


class Frame:
    """A model around a trunk that other models are, too."""

    def __init__(self, frame: Checkpoint, models: Sequence[Checkpoint]) -> None:
        self.frame = frame
        self.maps: dict[int, dict[str, str]] = {}
        problems = []
        for model in models:
            found = name_map(model, frame)
            if found is None:
                problems.append(f"{model.origin}: none of its stacks of blocks is one of {frame.origin}")
            else:
                self.maps[id(model)] = found
        if problems:
            raise DataProblems(f"{frame.origin} is no frame for these models", problems)
        own = every_name(frame)
        # the trunk is what every model has, and what some have besides that the frame does not
        shared = set(own).intersection(*(set(m.values()) for m in self.maps.values()))
        blocks = {b[0] for n in shared if (b := block_of(n))}
        every = {n for m in self.maps.values() for n in m.values()}
        self.trunk = shared | {n for n in every if n not in own or ((b := block_of(n)) and b[0] in blocks)}

    def view(self, model: Checkpoint) -> Checkpoint:
        """The trunk of a model under the frame's names."""
        names = self.maps.get(id(model)) or {n: n for n in every_name(model)}
        return _view(model, {old: new for old, new in names.items() if new in self.trunk})

    def completed(self, trunk: Checkpoint, config: Mapping[str, Any] | None = None) -> Checkpoint:
        """The frame with its trunk replaced. `config` is the frame's where nothing in it changes."""
        return completed(self.frame, [trunk], config, f"{trunk.origin} in {self.frame.origin}")


def completed(
    frame: Checkpoint, made: Sequence[Checkpoint], config: Mapping[str, Any] | None, origin: str
) -> Checkpoint:
    """`frame` with the tensors of `made` in place of its own, and without blocks of theirs that they left out.

    What is kept of the frame is reported as carried.
    """
    pieces: dict[str, Span] = {}
    aliases: dict[str, str] = {}
    carried: dict[str, str] = {}
    named = {name: part for part in made for name in every_name(part)}
    stacks = {b[0] for n in named if (b := block_of(n))}
    for name in dict.fromkeys((*every_name(frame), *named)):
        part, block = named.get(name), block_of(name)
        if part is not None and name in part:
            pieces[name] = Span(part, name)
        elif part is not None:
            aliases[name] = part.aliases[name]
        elif block is not None and block[0] in stacks:
            continue  # a block that was not picked
        elif name in frame:
            pieces[name] = Span(frame, name)
            carried[name] = f"kept from {frame.origin}"
        else:
            aliases[name] = frame.aliases[name]
    config = frame.config if config is None else config
    if config is not None and any(name in pieces for name in frame.aliases):
        config = untied(config)
    return Assembled(
        pieces, config=config, assets=frame.assets,
        aliases={a: t for a, t in aliases.items() if t in pieces}, origin=origin, carried=carried,
    )  # fmt: skip


def part_views(part: Part, frame: Checkpoint, models: Sequence[Checkpoint]) -> dict[int, Checkpoint]:
    """By id of every model: what it has of one part of the frame, under the frame's names."""
    wanted, views, problems = set(part.names), {}, []
    for model in models:
        names = name_map(model, frame) or {n: n for n in every_name(model)}
        if not wanted.intersection(names.values()):
            problems.append(f"{model.origin} has nothing of the part {part.name} of {frame.origin}")
        else:
            own = {
                o: n for o, n in names.items() if n in wanted or (part.prefix and n.startswith(part.prefix))
            }
            # what the frame ties to another part stays tied
            own = {o: n for o, n in own.items() if n not in frame.aliases or model.aliases.get(o, o) in own}
            views[id(model)] = _view(model, own)
    if problems:
        raise DataProblems(f"{part.name} cannot be merged", problems)
    return views


def _view(model: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Only some tensors, under other names. One tied to what is left out is a tensor of its own."""
    pieces, aliases = {}, {}
    for old, new in names.items():
        target = model.aliases.get(old, old)
        if target != old and target in names:
            aliases[new] = names[target]
        else:
            pieces[new] = Span(model, target)
    return Assembled(pieces, config=model.config, assets=model.assets, aliases=aliases, origin=model.origin)


def frame_of(models: Sequence[Checkpoint]) -> Checkpoint | None:
    """The model that the others are trunks of: under other names, or but for its towers. None where none is."""
    stacks = [{b[0] for n in every_name(m) if (b := block_of(n))} for m in models]
    if not all(stacks) or len({frozenset(s) for s in stacks}) == 1:
        return None
    for frame in sorted(models, key=lambda m: -len(every_name(m))):
        maps = [name_map(model, frame) for model in models]
        own = every_name(frame)
        if any(m is None or sum(n in own for n in m.values()) < 0.9 * len(m) for m in maps):
            continue
        found = [m for m in maps if m is not None]
        moved = any(block_of(n) and n != new for m in found for n, new in m.items())
        lacking = own.keys() - set.intersection(*(set(m.values()) for m in found))
        return frame if moved or all(is_tower(n) for n in lacking) else None
    return None
