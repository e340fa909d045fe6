"""From the shape of a recipe to its meaning: method, models in order, base, parameters.

Everything that can be known without opening a file is checked here, and reported together.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from weft.checkpoints.dtypes import parse_dtype
from weft.checkpoints.refs import Ref, parse_ref
from weft.errors import UsageError
from weft.methods.step import At
from weft.recipes import mergekit, schema
from weft.recipes.findings import Findings
from weft.recipes.parameters import Asked, Level, gather, sample
from weft.recipes.recipe import Named, Recipe, Source
from weft.recipes.steps import steps_method
from weft.recipes.yaml import Path


@dataclass
class Entry:
    """One model of the recipe."""

    source: Source
    level: Level
    path: Path


@dataclass
class Around:
    """What a recipe inherits from the file and from the recipe it stands in."""

    names: Collection[str] = ()
    compat: Any = None


def resolve(raw: schema.Recipe, found: Findings, path: Path, around: Around) -> Recipe | None:
    """The recipe, or None after reporting what is wrong with it."""
    before = len(found.problems)
    compat = raw.compat or around.compat
    within = Around(around.names, compat)
    asked = _method(raw, found, path, compat)
    entries, shared, base_raw, layers = _entries(raw, found, path, within)
    base = _source(*base_raw, found, within) if base_raw else None
    dtype = _dtype(raw, found, path)
    if path and raw.name is not None:
        found.problem((*path, "name"), "a recipe inside another has no name; make it a document of its own")
    if asked is None or entries is None:
        return None
    entries, base, config_from = _base(asked, entries, base, base_raw, found, path)
    _arity(asked, entries, base, found, path)
    params, given = gather(asked, [e.level for e in entries], shared, found)
    if len(found.problems) > before:
        return None
    models = tuple(e.source for e in entries)
    try:
        _probe(asked, params.by_name, len(models))
    except UsageError as error:
        found.problem((*path, "parameters"), str(error))
        return None
    tokenizer = _tokenizer(raw, found, path, within, base_raw)
    if raw.chat_template is not None:
        found.note((*path, "chat_template"), "not applied yet: the output has its tokenizer's template")
    if len(found.problems) > before:
        return None
    otherwise = mergekit.method_differences(asked.method, asked.spelling, params, given, compat)
    differences = [f"{asked.method.name}: {d}" for d in otherwise]
    return Recipe(
        method=asked.method, models=models, base=base, params=params,
        name=raw.name, dtype=dtype, seed=raw.seed,
        missing=raw.missing, mismatch=raw.mismatch, nonfinite=raw.nonfinite, compat=compat,
        mergekit_method=raw.merge_method if raw.merge_method in mergekit.SPELLINGS else None,
        config_from=config_from, tokenizer_from=tokenizer, layers=layers, given=given,
        differences=tuple(differences),
    )  # fmt: skip


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


BaseRaw = tuple[Any, Path] | None


def _entries(
    raw: schema.Recipe, found: Findings, path: Path, around: Around
) -> tuple[list[Entry] | None, list[Level], BaseRaw, int | None]:
    """The models, the shared levels of parameters (nearest first), the base, the layers a slice must have."""
    if raw.base is not None and raw.base_model is not None:
        found.problem((*path, "base"), "base and base_model are two names of one key; give one")
    key = "base" if raw.base is not None else "base_model"
    base: BaseRaw = (getattr(raw, key), (*path, key)) if getattr(raw, key) is not None else None
    shared: list[Level] = [(raw.parameters, (*path, "parameters"))]
    given = [k for k in ("models", "slices", "modules") if getattr(raw, k) is not None]
    if len(given) != 1:
        found.problem((*path, *given[1:2]), f"{' and '.join(given)} exclude each other" if given
                      else "models is missing: list the models to merge")  # fmt: skip
        return None, shared, base, None
    if raw.modules is not None:
        found.problem((*path, "modules"), "modules are not supported yet; use models")
        return None, shared, base, None
    inputs: Sequence[str | schema.Input]
    place: Path
    layers = None
    if raw.slices is not None:
        slice_path = (*path, "slices")
        layers = _whole_layers(raw.slices, found, slice_path)
        one = raw.slices[0]
        inputs, place = one.sources, (*slice_path, 0, "sources")
        shared.insert(0, (one.parameters, (*slice_path, 0, "parameters")))
        if one.base_model is not None:
            base = (one.base_model, (*slice_path, 0, "base_model"))
    else:
        inputs, place = raw.models or [], (*path, "models")
    entries = []
    for i, item in enumerate(inputs):
        at = (*place, i)
        model, parameters = (item, None) if isinstance(item, str) else (item.model, item.parameters)
        model_path = at if isinstance(item, str) else (*at, "model")
        source = _source(model, model_path, found, around)
        if source is not None:
            entries.append(Entry(source, (parameters, (*at, "parameters")), at))
    return entries if len(entries) == len(inputs) else None, shared, base, layers


def _whole_layers(slices: list[schema.Slice], found: Findings, path: Path) -> int | None:
    """The number of layers of the one slice that is a whole model; other slices are reported."""
    ranges = {tuple(s.layer_range) if s.layer_range else None for s in slices[0].sources}
    only = next(iter(ranges)) if len(ranges) == 1 else ()
    if len(slices) > 1 or only == () or (only is not None and (only[0] != 0 or only[1] < 1)):
        found.problem(path, "not yet supported: slices are coming. One slice whose sources all have the same "
                            "layer_range from 0 to the last layer is accepted, as are models")  # fmt: skip
        return None
    return only[1] if only else None


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
        if any(_same(entry.source, other.source) for other in seen):
            found.note(entry.path, "this model is listed before, and counts twice")
        seen.append(entry)


def _probe(asked: Asked, by_name: Mapping[str, Any], k: int) -> None:
    """Run the method on a toy, once for the first and once for the last value of everything.

    Some parameters are right one by one and wrong together (weights that sum to zero).
    """
    toy = torch.arange(1.0, 1 + 4 * k, dtype=torch.float64).reshape(k, 2, 2).cos()
    at = At("model.layers.0.mlp.up_proj.weight", (2, 2), layer=0, layers=1)
    for end in (0, -1):
        values = {name: sample(schedule, end) for name, schedule in by_name.items()}
        asked.method.pipeline(**values)(toy, base=torch.ones(2, 2, dtype=torch.float64), at=at)


def _dtype(raw: schema.Recipe, found: Findings, path: Path) -> torch.dtype | None:
    dtype = None
    for key in ("dtype", "out_dtype"):  # the later one wins
        text = getattr(raw, key)
        if text is None:
            continue
        try:
            dtype = parse_dtype(text)
        except UsageError as error:
            found.problem((*path, key), str(error))
    return dtype


def _tokenizer(raw: schema.Recipe, found: Findings, path: Path, around: Around, base: BaseRaw) -> Any:
    """Whose tokenizer the result takes: a source, "union", or None for that of the config."""
    if raw.tokenizer is not None and raw.tokenizer_source is not None:
        found.problem((*path, "tokenizer_source"), "tokenizer and tokenizer_source exclude each other")
    source: Any = raw.tokenizer_source
    where: Path = (*path, "tokenizer_source")
    if raw.tokenizer is not None:
        where = (*path, "tokenizer")
        source = raw.tokenizer if isinstance(raw.tokenizer, str) else raw.tokenizer.source
        if not isinstance(raw.tokenizer, str):
            for key in ("tokens", "pad_to_multiple_of"):
                if getattr(raw.tokenizer, key):
                    found.problem((*where, key), "not supported yet: weft does not change the vocabulary")
    if source is None:
        return None
    if source == "union":
        found.note(where, "union is taken to mean that all models share one tokenizer")
        return "union"
    if source == "base":
        if base is None:
            found.problem(where, "there is no base_model to take the tokenizer from")
            return None
        return None  # the result takes it from its base anyway
    return _source(source, where, found, around)
