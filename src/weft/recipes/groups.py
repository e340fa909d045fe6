"""Which models a recipe merges with one another: all it lists, or those of each slice.

A slice is a recipe of its own over some layers of its models, with parameters of its own before the recipe's.
So is a module, over a part of its models; `as_recipe` writes it as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.recipes import schema
from weft.recipes.findings import Findings
from weft.recipes.parameters import Level
from weft.recipes.recipe import Range, Recipe, Slice, Source
from weft.recipes.yaml import Path

BaseRaw = tuple[Any, Path] | None
Reader = Callable[[Any, Path], Source | None]
"""What a model value means; None after reporting that it means nothing."""


@dataclass
class Entry:
    """One model of a group."""

    source: Source
    level: Level
    path: Path
    range: Range = None
    statistics: Source | None = None


@dataclass
class Group:
    """Models that are merged with one another."""

    entries: list[Entry]
    shared: list[Level]
    """Parameters for all of them, the nearest first."""
    base: BaseRaw
    path: Path

    def base_range(
        self, base: Source | None, same: Callable[[Source, Source], bool], found: Findings
    ) -> Range:
        """The layers of the base: as listed among the models, else those that all models have."""
        if base is None:
            return None
        listed = [e.range for e in self.entries if same(e.source, base)]
        ranges = set(listed[:1] or [e.range for e in self.entries])
        if len(ranges) > 1:
            assert self.base is not None
            found.problem(self.base[1], "the models of this slice have different layers, so the base needs its "
                                        "own: list it among the sources, with its layer_range")  # fmt: skip
        return next(iter(ranges), None)


def groups(
    raw: schema.Recipe, base: BaseRaw, found: Findings, path: Path, read: Reader, outer: Sequence[Level]
) -> list[Group] | None:
    """The groups of a recipe that has models or slices; None after reporting what is wrong."""
    shared: list[Level] = [(raw.parameters, (*path, "parameters")), *outer]
    if raw.slices is None:
        entries = _entries(raw.models or [], (*path, "models"), read)
        return None if entries is None else [Group(entries, shared, base, (*path, "models"))]
    made = []
    for i, one in enumerate(raw.slices):
        at = (*path, "slices", i)
        _check_ranges(one, at, found)
        if one.residual_weight is not None:
            found.note((*at, "residual_weight"), "ignored: it has no effect in MergeKit either")
        entries = _entries(one.sources, (*at, "sources"), read)
        own = base if one.base_model is None else (one.base_model, (*at, "base_model"))
        if entries is not None:
            made.append(Group(entries, [(one.parameters, (*at, "parameters")), *shared], own, at))
    return made if len(made) == len(raw.slices) else None


def _entries(inputs: Sequence[str | schema.Input], path: Path, read: Reader) -> list[Entry] | None:
    entries = []
    for i, item in enumerate(inputs):
        at = (*path, i)
        model, parameters = (item, None) if isinstance(item, str) else (item.model, item.parameters)
        source = read(model, at if isinstance(item, str) else (*at, "model"))
        given = item.layer_range if isinstance(item, schema.SliceSource) else None
        if source is not None:
            layers = None if given is None else (given[0], given[1])
            measured = None if isinstance(item, str) else item.statistics
            known = None if measured is None else read(measured, (*at, "statistics"))
            entries.append(Entry(source, (parameters, (*at, "parameters")), at, layers, known))
    return entries if len(entries) == len(inputs) else None


def _check_ranges(one: schema.Slice, path: Path, found: Findings) -> None:
    lengths: list[int | None] = []
    for j, source in enumerate(one.sources):
        if source.layer_range is None:
            lengths.append(None)
            continue
        first, end = source.layer_range
        lengths.append(end - first)
        if not 0 <= first < end:
            found.problem((*path, "sources", j, "layer_range"),
                          f"must be [first, end) with 0 <= first < end, not {[first, end]}")  # fmt: skip
    if len(set(lengths)) > 1:
        told = ", ".join("all" if n is None else str(n) for n in lengths)
        found.problem(
            (*path, "sources"), f"the models of one slice must have as many layers each, not {told}"
        )


def as_recipe(raw: schema.Recipe, module: schema.Module) -> schema.Recipe:
    """A module as a recipe: the method and policies of the whole, its own models or slices and parameters."""
    keys = ("merge_method", "method", "base_model")
    own = {k: getattr(module, k) for k in keys if getattr(module, k) is not None}
    if "merge_method" in own or "method" in own:
        own = {"merge_method": None, "method": None, "steps": None, **own}
    if "base_model" in own:
        own["base"] = None
    rest = {"name": None, "tokenizer": None, "tokenizer_source": None, "chat_template": None, "frame": None,
            "dtype": None, "out_dtype": None, "modules": None}  # fmt: skip
    return raw.model_copy(update={
        **rest, **own, "models": module.models, "slices": module.slices, "parameters": module.parameters,
    })  # fmt: skip


def in_slices(slices: Sequence[Slice]) -> Recipe:
    """One recipe of its slices."""
    made = [s.recipe for s in slices]
    return replace(made[0], models=_distinct(made), slices=tuple(slices))


def in_modules(made: dict[str, Recipe]) -> Recipe:
    """One recipe of the recipes of its modules."""
    first = next(iter(made.values()))
    return replace(first, models=_distinct(list(made.values())), slices=(), modules=made)


def _distinct(made: Sequence[Recipe]) -> tuple[Source, ...]:
    """Every model and base that the pieces name beside the first one's base, each once."""
    found: list[Source] = []
    for recipe in made:
        for source in recipe.sources:
            if source not in found and source != made[0].base:
                found.append(source)
    return tuple(found)
