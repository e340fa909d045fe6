"""From the shape of a recipe to its meaning: method, models in order, base, parameters.

Everything that can be known without opening a file is checked here, and reported together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.checkpoints.dtypes import DType, spelled
from weft.checkpoints.refs import Ref, parse_ref
from weft.errors import UsageError
from weft.late import torch
from weft.methods.step import At, Pipeline
from weft.recipes import mergekit, schema, tokenizer
from weft.recipes.findings import Findings
from weft.recipes.groups import BaseRaw, Entry, Group, as_recipe, groups, in_modules, in_slices
from weft.recipes.parameters import Asked, Level, gather, sample
from weft.recipes.recipe import Named, Recipe, Slice, Source
from weft.recipes.steps import steps_method
from weft.recipes.yaml import Path


@dataclass
class Around:
    """What a recipe inherits from the file and from the recipe it stands in."""

    names: Collection[str] = ()
    compat: Any = None


def resolve(
    raw: schema.Recipe, found: Findings, path: Path, around: Around, outer: Sequence[Level] = ()
) -> Recipe | None:
    """The recipe, or None after reporting what is wrong with it. `outer` are parameters from around it."""
    before = len(found.problems)
    within = Around(around.names, raw.compat or around.compat)
    dtype = _dtype(raw, found, path)
    if path and raw.name is not None:
        found.problem((*path, "name"), "a recipe inside another has no name; make it a document of its own")
    base_raw = _base_raw(raw, found, path)
    given = [k for k in ("models", "slices", "modules") if getattr(raw, k) is not None]
    if len(given) != 1:
        found.problem((*path, *given[1:2]), f"{' and '.join(given)} exclude each other" if given
                      else "models is missing: list the models to merge")  # fmt: skip
    if given[:1] == ["modules"]:
        made = _of_modules(raw, found, path, within)
    else:
        made = _of_groups(raw, base_raw, found, path, within, outer)
    if made is None or len(given) != 1 or len(found.problems) > before:
        return None
    anchor = _source(*base_raw, found, within) if base_raw else None
    chosen = tokenizer.choice(raw, found, path, anchor, lambda r, p: _source(r, p, found, within))
    frame = None if raw.frame is None else _source(raw.frame, (*path, "frame"), found, within)
    if len(found.problems) > before:
        return None
    return replace(
        made, name=raw.name, dtype=dtype, tokenizer=chosen, chat_template=raw.chat_template, frame=frame
    )


def _of_modules(raw: schema.Recipe, found: Findings, path: Path, around: Around) -> Recipe | None:
    """A recipe with one inside for each part of the model."""
    made = {}
    if not raw.modules:
        found.problem((*path, "modules"), "name at least one part of the model, with its models or slices")
        return None
    for name, module in raw.modules.items():
        inner = as_recipe(raw, module)
        shared: Level = (raw.parameters, (*path, "parameters"))
        recipe = resolve(inner, found, (*path, "modules", name), around, [shared])
        if recipe is not None:
            made[name] = recipe
    return in_modules(made) if len(made) == len(raw.modules) else None


def _of_groups(
    raw: schema.Recipe, base: BaseRaw, found: Findings, path: Path, around: Around, outer: Sequence[Level]
) -> Recipe | None:
    """A recipe of models, or of slices of them."""
    asked = _method(raw, found, path, around.compat)
    if raw.models is None and raw.slices is None:
        return None
    every = groups(raw, base, found, path, lambda r, p: _source(r, p, found, around), outer)
    if base is not None:
        _source(*base, found, around)  # reported though the models be wrong, too
    if asked is None or every is None:
        return None
    made = [_of_group(raw, asked, group, found, path, around) for group in every]
    slices = [s for s in made if s is not None]
    if len(slices) < len(made):
        return None
    _note_gaps(every, found)
    plain = raw.slices is None or (len(slices) == 1 and not any(slices[0].ranges))
    return slices[0].recipe if plain else in_slices(slices)


def _of_group(
    raw: schema.Recipe, asked: Asked, group: Group, found: Findings, path: Path, around: Around
) -> Slice | None:
    """What the models of one group are merged to."""
    before, compat = len(found.problems), around.compat
    base = _source(*group.base, found, around) if group.base else None
    base_range = group.base_range(base, _same, found)
    entries, base, config_from = _base(asked, group.entries, base, group.base, found, path)
    _arity(asked, entries, base, found, path)
    params, given = gather(asked, [e.level for e in entries], group.shared, found)
    statistics, base_statistics = _statistics(raw, entries, found, path, around)
    if len(found.problems) > before:
        return None
    try:
        _probe(asked, params.by_name, len(entries))
    except UsageError as error:
        found.problem((*path, "parameters"), str(error))
        return None
    otherwise = mergekit.method_differences(asked.method, asked.spelling, params, given, compat)
    made = Recipe(
        method=asked.method, models=tuple(e.source for e in entries), base=base, params=params, seed=raw.seed,
        missing=raw.missing, mismatch=raw.mismatch, nonfinite=raw.nonfinite, compat=compat,
        architectures=raw.architectures,
        mergekit_method=raw.merge_method if raw.merge_method in mergekit.SPELLINGS else None,
        statistics=statistics, base_statistics=base_statistics,
        config_from=config_from, given=given, differences=tuple(f"{asked.method.name}: {d}" for d in otherwise),
    )  # fmt: skip
    return Slice(made, tuple(e.range for e in entries), None if base is None else base_range)


def _note_gaps(every: Sequence[Group], found: Findings) -> None:
    """Layer numbers between others that no slice has, of whatever model: pruning may mean it, a slip may not."""
    ranges = [e.range for group in every for e in group.entries if e.range is not None]
    taken = {i for first, end in ranges for i in range(first, end)}
    gap = [i for i in range(min(taken, default=0), max(taken, default=0)) if i not in taken]
    if gap:
        told = ", ".join(map(str, gap[:8])) + (" …" if len(gap) > 8 else "")
        found.note(every[0].path[:-1], f"no slice has layer{'s' * (len(gap) > 1)} {told} of any model: the result "
                                       f"goes without")  # fmt: skip


def _method(raw: schema.Recipe, found: Findings, path: Path, compat: Any) -> Asked | None:
    given = [k for k in ("merge_method", "method", "steps") if getattr(raw, k) is not None]
    if len(given) != 1:
        found.problem((*path, *given[1:2]), f"{' and '.join(given)} exclude each other" if given
                      else "merge_method is missing (or method, or steps)")  # fmt: skip
        return None
    if raw.steps is not None:
        made = steps_method(raw.steps, (*path, "steps"), found)
        return Asked(made[0], mergekit.Spelling(""), compat, False, made[1]) if made else None
    name = raw.merge_method or raw.method or ""
    try:
        method, spelling = mergekit.find(name)
    except UsageError as error:
        found.problem((*path, given[0]), str(error))
        return None
    return Asked(method, spelling, compat, raw.merge_method is not None, {})


def _base_raw(raw: schema.Recipe, found: Findings, path: Path) -> BaseRaw:
    if raw.base is not None and raw.base_model is not None:
        found.problem((*path, "base"), "base and base_model are two names of one key; give one")
    key = "base" if raw.base is not None else "base_model"
    return (getattr(raw, key), (*path, key)) if getattr(raw, key) is not None else None


def _source(raw: Any, path: Path, found: Findings, around: Around) -> Source | None:
    """What a model value means; None after reporting that it means nothing."""
    try:
        if isinstance(raw, schema.Recipe):
            return resolve(raw, found, path, around)
        if isinstance(raw, schema.PathRef):
            return Ref(raw.path, raw.revision)
        if isinstance(raw, schema.ModelRef):
            if raw.override_architecture:
                found.note((*path, "override_architecture"), "ignored: weft goes by the tensors' names")
            model, lora = (r if r is None else Ref(r.path, r.revision) if isinstance(r, schema.PathRef)
                           else parse_ref(r) for r in (raw.model, raw.lora))  # fmt: skip
            assert model is not None
            if lora is not None and model.lora is not None:
                raise UsageError("the model names an adapter already; give lora: or +adapter, not both")
            return Ref(model.path, model.revision, lora or model.lora)
        if raw in around.names:
            return Named(raw)
        parse_ref(raw)
        return str(raw)
    except UsageError as error:
        found.problem(path, str(error))
        return None


def _same(a: Source, b: Source) -> bool:
    if isinstance(a, Recipe | Named) or isinstance(b, Recipe | Named):
        return a == b
    return (parse_ref(a) if isinstance(a, str) else a) == (parse_ref(b) if isinstance(b, str) else b)


def _base(
    asked: Asked, entries: list[Entry], base: Source | None, base_raw: BaseRaw, found: Findings, path: Path
) -> tuple[list[Entry], Source | None, Source | None]:
    """Models in the order the method wants them, its base, and whose config the result takes."""
    method, role = asked.method, asked.spelling.base
    if base is None:
        if method.base == "required" and base_raw is None:
            found.problem(path, f"{method.name} needs base_model: the model the others were fine-tuned from")
        if role == "model" and len(entries) == 2:
            found.note((*path, "models"), "t = 0 gives the first model, t = 1 the second")
        return entries, None, None
    assert base_raw is not None
    where = base_raw[1]
    listed = [e for e in entries if _same(e.source, base)]
    if role == "model":
        if not listed and len(entries) == 1:
            listed = [Entry(base, (None, where), where)]
        elif not listed:
            found.problem(where, f"{method.name} goes from base_model to the other model: list both")
        return [*listed, *(e for e in entries if e not in listed)], None, None
    if role == "third" and listed:
        found.problem(where, f"base_model of {method.name} must be a third model, not one of the two")
        return entries, base, None
    if method.base == "forbidden" or (role == "ignored" and asked.dialect):
        if not listed:
            found.note(where, f"{method.name} has no base: base_model gives config and tokenizer, and its "
                              f"weights only if it is listed under models")  # fmt: skip
        return entries, None, base
    if listed and len(listed) < len(entries):
        for entry in listed:
            found.note(entry.path, "this is the base, whose task vector is zero: it is left out")
        entries = [e for e in entries if e not in listed]
    return entries, base, None


def _arity(asked: Asked, entries: list[Entry], base: Source | None, found: Findings, path: Path) -> None:
    try:
        asked.method.check_arity(len(entries))
    except UsageError as error:
        found.problem((*path, "models"), f"{error}{' besides the base' if base is not None else ''}")
    seen: list[Entry] = []
    for entry in entries:
        if any(_same(entry.source, o.source) and entry.range == o.range for o in seen):
            found.note(entry.path, "this model is listed before, and counts twice")
        seen.append(entry)


def _statistics(
    raw: schema.Recipe, entries: list[Entry], found: Findings, path: Path, around: Around
) -> tuple[tuple[Source, ...], Source | None]:
    """What was measured of the models and of the base; all models have statistics, or none."""
    given = [e.statistics for e in entries if e.statistics is not None]
    if given and len(given) < len(entries):
        for entry in entries:
            if entry.statistics is None:
                found.problem(entry.path, "has no statistics, though other models have: give all or none")
    of_base = raw.base_statistics
    if (given or of_base) and (raw.slices is not None or "modules" in path):
        found.problem(path, "statistics are of whole models: list these under models")
    key = (*path, "base_statistics")
    return tuple(given), None if of_base is None else _source(of_base, key, found, around)


def _probe(asked: Asked, by_name: Mapping[str, Any], k: int) -> None:
    """Try the parameters together, once with the first and once with the last value of everything.

    Some are right one by one and wrong together (weights that sum to zero). Steps that cannot say so run on a toy.
    """
    for end in (0, -1):
        values = {name: sample(schedule, end) for name, schedule in by_name.items()}
        steps = asked.method.pipeline(**values)
        for bound in steps.steps:
            bound.step.refuse(bound.params, k)
        if any(bound.step.refuses is None for bound in steps.steps):
            _run_on_a_toy(steps, k)


def _run_on_a_toy(steps: Pipeline, k: int) -> None:
    toy = torch.arange(1.0, 1 + 4 * k, dtype=torch.float64).reshape(k, 2, 2).cos()
    at = At("model.layers.0.mlp.up_proj.weight", (2, 2), layer=0, layers=1)
    none = dict.fromkeys(n.source for n in steps.needs)
    steps(toy, base=torch.ones(2, 2, dtype=torch.float64), at=at, statistics=none)


def _dtype(raw: schema.Recipe, found: Findings, path: Path) -> DType | None:
    dtype = None
    for key in ("dtype", "out_dtype"):  # the later one wins
        text = getattr(raw, key)
        if text is None:
            continue
        try:
            dtype = spelled(text)
        except UsageError as error:
            found.problem((*path, key), str(error))
    return dtype
