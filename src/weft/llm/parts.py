"""The parts of a model that has several: language model, vision tower, projector; encoder and decoder.

A part is what stands under a prefix of its own. What stands under none (`lm_head`, a shared embedding) belongs
to the language model, or to the first (embeddings) and last (heads) of several.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError, did_you_mean
from weft.llm.layout import Layout, Stack, is_tower, layout
from weft.recipes.kinds import after_blocks

_LANGUAGE = (
    "text_decoder",
    "language_model",
    "text",
    "language",
    "llm",
    "text_model",
    "text_config",
    "default",
)
_SENSES = {
    "vision": re.compile(r"vision|visual|image|vit\b"),
    "audio": re.compile(r"audio|speech"),
    "projector": re.compile(r"projector|connector|merger|qformer"),
}
_SHARED = ("shared", "rest")
"""What asks for the tensors that stand in no part, as a part of their own (MergeKit has it for T5)."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a model."""

    name: str
    prefix: str
    names: tuple[str, ...]
    stack: Stack | None
    """The longest stack of blocks in it."""

    @property
    def tower(self) -> bool:
        return is_tower(self.prefix)


def parts(model: Checkpoint, found: Layout | None = None, shared: str = "") -> dict[str, Part]:
    """Name → part, in the order of the model's tensors; one part `model` where nothing tells parts apart.

    Tied names count as names of the part that they stand in. Under the name `shared`, if given, what stands in
    none is a part of its own.
    """
    found = found or layout(model)
    names = [*model.tensors, *model.aliases]
    prefixes = _prefixes(names, found)
    if len(prefixes) < 2:
        return {"model": Part("model", "", tuple(names), found.main())}
    owned: dict[str, list[str]] = {p: [] for p in prefixes}
    loose: list[str] = []
    for name in names:
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        (loose if prefix is None else owned[prefix]).append(name)
    language = [p for p in prefixes if not is_tower(p)] or prefixes
    language.sort(key=lambda p: "decoder" in p)  # files list tensors by the alphabet; heads are the decoder's
    for name in [] if shared else loose:
        owned[language[-1 if after_blocks(name) else 0]].append(name)
    made = [Part(_called(p, prefixes), p, tuple(owned[p]), _stack(p, found)) for p in prefixes]
    return {part.name: part for part in (*made, *([Part(shared, "", tuple(loose), None)] if shared else []))}


def _prefixes(names: Sequence[str], found: Layout) -> list[str]:
    """Prefixes of parts, in the order in which names first have them."""
    stacks = [s for s in found.stacks.values() if s.counted_by] or list(found.stacks.values())
    owners = list(dict.fromkeys(s.owner for s in stacks if s.owner))
    if len(owners) < 2:
        return owners
    shared = _common(owners)
    for name in names:  # projectors have no blocks
        head = re.match(re.escape(shared) + r"[^.]+\.", name)
        if head and is_tower(head[0]) and not any(name.startswith(o) for o in owners):
            owners.append(head[0])
    order = {o: min(i for i, n in enumerate(names) if n.startswith(o)) for o in owners}
    return sorted(owners, key=lambda o: order[o])


def _common(prefixes: list[str]) -> str:
    """The dotted prefix that all have: `model.` of `model.visual.` and `model.language_model.`."""
    parts = [p.split(".")[:-1] for p in prefixes]
    kept = []
    for each in zip(*parts, strict=False):
        if len(set(each)) > 1:
            break
        kept.append(each[0])
    return "".join(f"{k}." for k in kept)


def _called(prefix: str, prefixes: list[str]) -> str:
    """`model.vision_tower.` → `vision_tower`; the whole prefix where two parts would be called the same."""
    last = prefix.rstrip(".").rpartition(".")[2]
    alike = [p for p in prefixes if p.rstrip(".").rpartition(".")[2] == last]
    return last if len(alike) == 1 else prefix.rstrip(".")


def _stack(prefix: str, found: Layout) -> Stack | None:
    inside = [s for s in found.stacks.values() if s.prefix.startswith(prefix)]
    return max(inside, key=lambda s: (bool(s.counted_by), s.count), default=None)


def find_part(asked: str, known: Mapping[str, Part]) -> Part | None:
    """The part that a name means: its own, its prefix, MergeKit's, or the kind of input it is for."""
    bare = asked.rstrip(".")
    for part in known.values():
        if bare in (part.name, part.prefix.rstrip(".")):
            return part
    if bare in _LANGUAGE:
        language = [p for p in known.values() if not p.tower and p.stack is not None]
        return language[0] if len(language) == 1 else None
    for sense, rule in _SENSES.items():
        if rule.search(bare):
            meant = [p for p in known.values() if rule.search(p.prefix)]
            if sense != "projector":
                meant = [p for p in meant if p.stack is not None]
            return meant[0] if len(meant) == 1 else None
    return None


def chosen_parts(asked: Collection[str], model: Checkpoint) -> dict[str, Part]:
    """Every name asked for → its part; UsageError with the parts there are for those that mean none."""
    known = parts(model, shared=next((name for name in asked if name in _SHARED), ""))
    found: dict[str, Part] = {}
    for name in asked:
        part = find_part(name, known)
        if part is None:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known)}"
            raise UsageError(f"modules: {model.origin} has no part {name!r}{hint}")
        if part.name in {p.name for p in found.values()}:
            raise UsageError(f"modules: {name!r} is the part {part.name!r}, which is given already")
        found[name] = part
    return found
