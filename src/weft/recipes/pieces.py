"""Building what a recipe says of single layers and parts: slices, modules, a frame around a trunk.

Each piece is a merge of its own over views of the models (`weft.llm.slices`, `weft.llm.graft`); the result is
assembled from the pieces. What is wrong with any of them is reported together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, DataProblems, Problems, UsageError, WeftError
from weft.methods.layers import block_of
from weft.methods.step import At
from weft.recipes.recipe import Range, Recipe, Slice, Source

if TYPE_CHECKING:
    from weft.llm.slices import Layers

Fetch = Callable[[Source], Checkpoint]


def merged(recipe: Recipe, seed: int, fetch: Fetch) -> Checkpoint:
    """What a recipe makes of its models, unread; config and files are those the recipe asks for.

    Raises Problems for layers and parts that are not there, DataProblems for models that do not fit together.
    """
    from weft.llm.graft import Frame, frame_of

    sources = [fetch(s) for s in recipe.sources]
    check_configs(sources)
    if recipe.architectures == "error":
        check_architectures(sources)
    config = None if recipe.config_from is None else fetch(recipe.config_from)
    frame = None if recipe.frame is None else fetch(recipe.frame)
    if _names_differ(sources):
        fetch = _one_layout(sources, fetch)
        sources = [fetch(s) for s in recipe.sources]
        frame = frame or frame_of(sources)
    if recipe.modules:
        return of_modules(recipe, seed, fetch, frame or config or sources[0])
    if frame is None:
        if recipe.slices:
            return of_slices(recipe, seed, fetch, config or sources[0])
        return in_company(_of_models(recipe, seed, fetch, fetch), config)
    around = Frame(frame, sources)
    views = {id(s): around.view(s) for s in sources}

    def seen(source: Source) -> Checkpoint:
        return views[id(fetch(source))]

    if recipe.slices:
        trunk = of_slices(recipe, seed, seen, frame)
        return around.completed(trunk, trunk.config)
    return around.completed(_of_models(recipe, seed, seen, fetch))


def _one_layout(models: Sequence[Checkpoint], fetch: Fetch) -> Fetch:
    """Mixtures whose experts are stored in two ways, all as the first stores them."""
    from weft.llm.experts import experts_like

    shown = {id(m): experts_like(m, models[0]) for m in models}
    return lambda source: shown.get(id(made := fetch(source)), made)


def _of_models(recipe: Recipe, seed: int, fetch: Fetch, measured: Fetch | None = None) -> Checkpoint:
    """`measured` fetches statistics, which are no views of anything."""
    base = None if recipe.base is None else fetch(recipe.base)
    models = [fetch(m) for m in recipe.models]
    known: dict[str, Any] = {}
    if measured is not None and recipe.measured:
        of_base = recipe.base_statistics
        known["statistics"] = [measured(s) for s in recipe.statistics]
        known["base_statistics"] = None if of_base is None else measured(of_base)
    return merge_of(recipe, models, base, seed, recipe.name or "", **known)


def in_company(made: Checkpoint, of: Checkpoint | None) -> Checkpoint:
    """The result with another model's config and files."""
    if of is None:
        return made
    from weft.checkpoints.company import InCompany

    return InCompany(made, of.config, of.assets)


def _names_differ(models: Sequence[Checkpoint]) -> bool:
    names = [m.tensors.keys() for m in models]
    return any(n != names[0] for n in names[1:])


def check_configs(models: Sequence[Checkpoint]) -> None:
    """DataProblems where a config contradicts the tensors beside it, for all models at once."""
    from weft.llm.consistency import contradictions

    every = {id(m): m for m in models}
    problems = [text for m in every.values() for text in contradictions(m)]
    if problems:
        raise DataProblems(
            "config.json says otherwise than the tensors: mend it, or the checkpoint", problems
        )


def check_architectures(models: Sequence[Checkpoint]) -> None:
    """DataError where models of different classes have tensors of the same names: MergeKit's `--allow-crimes`."""
    from weft.llm.consistency import strangers

    told = strangers(models)
    if told is not None:
        raise DataError(
            f"these models are of different architectures: model_type is {told}. Their tensors have the same "
            f"names but may mean something else; architectures: allow merges them all the same"
        )


def merge_of(
    recipe: Recipe, models: Sequence[Checkpoint], base: Checkpoint | None, seed: int, origin: str = "",
    params: Any = None, statistics: Sequence[Checkpoint] | None = None, base_statistics: Checkpoint | None = None,
) -> Checkpoint:  # fmt: skip
    """The merge of a recipe over models as they are; where they don't fit it says how the architectures differ."""
    from weft.methods.merge import Merge

    try:
        return Merge(
            models, base=base, method=recipe.method, params=params or recipe.params, seed=seed,
            missing=recipe.missing, mismatch=recipe.mismatch, nonfinite=recipe.nonfinite, origin=origin,
            statistics=statistics, base_statistics=base_statistics,
        )  # fmt: skip
    except DataProblems as error:
        from weft.llm.consistency import differing

        told = differing([*models, *([] if base is None else [base])])
        if not told:
            raise
        heading = str(error).partition("\n")[0].removesuffix(":")
        raise DataProblems(f"{heading}; the architectures differ", [*told, *error.problems]) from None


@dataclass(frozen=True)
class Placed:
    """Parameters of a slice: names are those of the output, layers count within the slice."""

    params: Callable[[At], Any]
    prefix: str
    offset: int

    def __call__(self, at: At) -> Any:
        block = block_of(at.name)
        if block is None or block[0] != self.prefix:
            return self.params(at)
        rest = at.name[len(f"{self.prefix}{block[1]}") :]
        return self.params(replace(at, name=f"{self.prefix}{block[1] + self.offset}{rest}"))


def of_slices(recipe: Recipe, seed: int, fetch: Fetch, frame: Checkpoint) -> Checkpoint:
    """The slices merged one by one, and their layers stacked."""
    from weft.llm.slices import layers, stacked

    picked = _picked(recipe.slices, fetch)
    whole = _whole(recipe, picked, fetch, seed)
    if whole is not None:
        return whole if frame.config is whole.config else in_company(whole, frame)
    last = len(recipe.slices) - 1
    ties = _ties(recipe, fetch)
    found: list[Layers] = []
    problems: list[str] = []
    offset = 0
    for i, (one, (models, base)) in enumerate(zip(recipe.slices, picked, strict=True)):
        try:
            problems += [f"slices[{i}]: {text}" for text in _conflicts(models, base)]
            inputs = models if base is None else [*models, base]
            views = [stacked(m, before=i == 0, after=i == last, ties=ties) for m in inputs]
            prefix = models[0].picks[0][0].stack.prefix
            params = Placed(one.recipe.params, prefix, offset)
            made = merge_of(
                one.recipe,
                views[: len(models)],
                None if base is None else views[-1],
                _seed(seed, i),
                "",
                params,
            )
            found.append(layers(made, prefix))
            offset += len(models[0])
        except (DataProblems, Problems) as error:
            problems += [f"slices[{i}]: {text}" for text in error.problems]
    if problems:
        raise DataProblems("these slices cannot be stacked", problems)
    every = found[0]
    for more in found[1:]:
        every = every + more
    return stacked(every, frame=frame, ties=ties, origin=recipe.name or "")


def _ties(recipe: Recipe, fetch: Fetch) -> dict[str, str]:
    """The ties of embedding and head that the result keeps: those that all models of both outer slices have.

    They must be the same models, or a head that is the last model's embedding would become the first one's;
    MergeKit lets it.
    """
    first, last = ([fetch(s) for s in one.recipe.sources] for one in (recipe.slices[0], recipe.slices[-1]))
    if {id(m) for m in first} != {id(m) for m in last} and recipe.compat != "mergekit":
        return {}
    ties = [m.aliases for m in (*first, *last)]
    return {
        name: target for name, target in ties[0].items()
        if block_of(name) is None and all(t.get(name) == target for t in ties)
    }  # fmt: skip


def _picked(slices: Sequence[Slice], fetch: Fetch) -> list[tuple[list[Layers], Layers | None]]:
    """The layers of every model of every slice; Problems where some are not there."""
    from weft.llm.slices import layers

    every: dict[int, Layers] = {}
    problems: list[str] = []

    def pick(source: Source, span: Range, where: str) -> Layers | None:
        model = fetch(source)
        try:
            if id(model) not in every:
                every[id(model)] = layers(model)
        except WeftError as error:
            problems.extend(getattr(error, "problems", [str(error)]))
            return None
        known = every[id(model)]
        if span is not None and span[1] > len(known):
            problems.append(f"{where}: layer_range {list(span)} of {model.origin} ends behind its last layer: "
                            f"it has {len(known)}")  # fmt: skip
            return None
        return known if span is None else known[slice(*span)]

    made = []
    for i, one in enumerate(slices):
        where = f"slices[{i}]"
        models = [pick(m, r, where) for m, r in zip(one.recipe.models, one.ranges, strict=True)]
        base = None if one.recipe.base is None else pick(one.recipe.base, one.base_range, where)
        kept = [m for m in models if m is not None]
        lengths = {len(m) for m in (*kept, *([base] if base else []))}
        if len(kept) == len(models) and len(lengths) > 1:
            problems.append(f"{where}: its models have {' and '.join(map(str, sorted(lengths)))} layers")
        made.append((kept, base))
    if problems:
        raise Problems("slices: these layers cannot be had", dict.fromkeys(problems))
    return made


def _whole(
    recipe: Recipe, picked: Sequence[tuple[list[Layers], Layers | None]], fetch: Fetch, seed: int
) -> Checkpoint | None:
    """One slice over all layers of its models is the merge of the models."""
    if len(recipe.slices) > 1:
        return None
    one, (models, base) = recipe.slices[0], picked[0]
    for layers in (*models, *([base] if base else [])):
        if len(layers) != layers.picks[0][0].stack.count:
            return None
    return _of_models(one.recipe, seed, fetch)


def _conflicts(models: Sequence[Layers], base: Layers | None) -> list[str]:
    """Layers that are merged with one another though the configs say that they are of different kinds."""
    from weft.llm.depth import conflicts

    told: list[str] = []
    every = [m.picks for m in (*([base] if base else []), *models)]
    for same in zip(*every, strict=False):
        told += conflicts([source.layer(i) for source, i in same])
    return told


def _seed(seed: int, i: int) -> int:
    """Slices draw different masks for the same layer number; the first draws as a whole model would."""
    if i == 0:
        return seed
    return int.from_bytes(hashlib.blake2b(f"slice:{seed}:{i}".encode(), digest_size=8).digest()) >> 1


def of_modules(recipe: Recipe, seed: int, fetch: Fetch, frame: Checkpoint) -> Checkpoint:
    """The parts merged one by one, and put back among the frame's other tensors."""
    from weft.checkpoints.company import InCompany
    from weft.llm.graft import completed, part_views
    from weft.llm.parts import chosen_parts

    chosen = chosen_parts(recipe.modules, frame)
    made: list[Checkpoint] = []
    problems: list[str] = []
    config = frame.config
    for name, inner in recipe.modules.items():
        try:
            views = part_views(chosen[name], frame, [fetch(s) for s in inner.sources])

            def seen(source: Source, views: dict[int, Checkpoint] = views) -> Checkpoint:
                return views[id(fetch(source))]

            if inner.slices:
                made.append(of_slices(inner, seed, seen, InCompany(frame, config)))
                config = made[-1].config
            else:
                made.append(_of_models(inner, seed, seen))
        except (DataProblems, Problems) as error:
            problems += [f"modules.{name}: {text}" for text in error.problems]
        except UsageError as error:
            problems.append(f"modules.{name}: {error}")
    if problems:
        raise DataProblems("these modules cannot be merged", problems)
    return completed(frame, made, config, recipe.name or f"{', '.join(recipe.modules)} in {frame.origin}")
