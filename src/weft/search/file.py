"""A search file: the recipe, the space, the objectives, the data, and how to look.

    recipe: recipe.yml                     or the recipe itself
    space:
      parameters.scale: {low: 0, high: 1}
    objectives:
      - {function: "mine:accuracy", direction: maximize}
    validation: dev.txt                    the data that candidates are chosen on
    test: test.txt                         optional: other data, for the winner alone
    sampler: tpe
    trials: 50

Paths are taken from the current folder, as in a recipe. Every problem is reported at once, with its line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weft.errors import DataError, UsageError, did_you_mean
from weft.recipes.findings import Findings, raise_problems
from weft.recipes.read import Readable
from weft.recipes.yaml import MAX_BYTES, Document, parse
from weft.recipes.yaml import Path as Place
from weft.search.candidates import RecipeSource, Source
from weft.search.objective import DIRECTIONS, LmEval, Objective, Perplexity
from weft.search.run import Task
from weft.search.sampling import SAMPLERS, Sampler
from weft.search.space import Choice, Dimension, Simplex, Space, choice, label, numbers

KEYS = ("recipe", "space", "objectives", "validation", "test", "sampler", "trials", "seed", "storage", "start",
        "jobs", "executor", "memory")  # fmt: skip
NUMBER_KEYS = ("low", "high", "log", "int", "step", "curve", "when")
DIMENSION_KEYS = (*NUMBER_KEYS, "choices", "simplex")
KINDS = ("function", "perplexity", "lm_eval")
OBJECTIVE_KEYS = (*KINDS, "direction", "name", "module", "validation", "test")
SAMPLER_KEYS = ("name", "startup", "population", "sigma")


def read_task(source: Readable, given: Mapping[str, Any] | None = None) -> Task:
    """The search a file (or its text, or its data) describes; `given` goes before what it says.

    Raises Problems with everything that is wrong, UsageError where it is no YAML.
    """
    origin, document = _document(source)
    found = Findings(document)
    data = document.data
    if not isinstance(data, Mapping):
        raise UsageError(f"{origin}: a search file is a mapping of keys to values: {', '.join(KEYS)}")
    _known(data, KEYS, (), found)
    for key in ("recipe", "space", "objectives", "validation"):
        if data.get(key) is None:
            missing = "is missing: name the data that candidates are chosen on" * (key == "validation")
            found.problem((key,), missing or "is missing")
    if not isinstance(data.get("recipe", ""), str | Mapping):
        found.problem(("recipe",), "must be the path of a recipe, or the recipe itself")
    raise_problems(origin, found.problems)
    recipe = RecipeSource(data["recipe"])
    space = _space(data["space"], recipe, found, ("space",))
    objectives = _objectives(data, found)
    sampler = _sampler(data.get("sampler", "tpe"), found)
    start = data.get("start") or []
    if not isinstance(start, list) or not all(isinstance(s, Mapping) for s in start):
        found.problem(("start",), "must be a list of settings, such as [{parameters.scale: 0.3}]")
    how = {**{k: data.get(k) for k in ("trials", "seed", "jobs")}, **_chosen(given, "trials", "seed", "jobs")}
    for key, value in how.items():
        if value is not None and (
            not isinstance(value, int) or isinstance(value, bool) or value < (key != "seed")
        ):
            found.problem((key,), f"must be a whole number, not {value!r}")
    texts = {k: data.get(k) for k in ("storage", "executor")} | _chosen(given, "storage", "executor")
    for key, value in texts.items():
        if value is not None and not isinstance(value, str | Path):
            found.problem((key,), f"must be text, not {value!r}")
    memory = (given or {}).get("memory") or data.get("memory")
    raise_problems(origin, found.problems)
    assert space is not None and sampler is not None
    from weft.engine.budget import parse_size

    return Task(
        recipe, space, tuple(objectives), sampler, how["trials"], how["seed"] or 0,
        Path(texts["storage"]) if texts["storage"] else None, tuple(_settings(s, recipe) for s in start),
        how["jobs"] or 1, texts["executor"] or "local", None if memory is None else parse_size(memory),
    )  # fmt: skip


def parse_space(raw: Mapping[str, Any], source: Source) -> Space:
    """A space given in Python, checked as a file's is. Raises Problems."""
    plain = json.loads(json.dumps(raw, default=str))
    found = Findings(Document(plain))
    space = _space(plain, source, found, ())
    raise_problems("the space", found.problems)
    assert space is not None
    return space


def _document(source: Readable) -> tuple[str, Document]:
    if isinstance(source, Mapping):
        return "the search", Document(json.loads(json.dumps(source, default=str)))
    if isinstance(source, bytes) or (isinstance(source, str) and "\n" in source):
        origin, text = "the search", source
    else:
        path = Path(source)
        origin = str(path)
        if not path.is_file():
            beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UsageError(f"there is no search file {path}{did_you_mean(path.name, beside)}")
        try:
            with path.open("rb") as file:
                text = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror})") from None
    documents = parse(text, origin)
    if len(documents) != 1:
        raise UsageError(f"{origin} must be one YAML document: {', '.join(KEYS)}")
    return origin, documents[0]


def _chosen(given: Mapping[str, Any] | None, *keys: str) -> dict[str, Any]:
    return {k: v for k, v in (given or {}).items() if k in keys and v is not None}


def _settings(raw: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """A start's settings with its paths as the space has them."""
    return {path: value for key, value in raw.items() for path in source.expand(key)}


def _known(raw: Mapping[str, Any], keys: Sequence[str], path: Place, found: Findings) -> None:
    for key in raw:
        if key not in keys:
            found.problem(
                (*path, key), f"unknown key{did_you_mean(key, keys) or '; known are ' + ', '.join(keys)}"
            )


# -- the space ---------------------------------------------------------------------------------------


def _space(raw: Any, source: Source, found: Findings, path: Place) -> Space | None:
    if not isinstance(raw, Mapping) or not raw:
        found.problem(path, "must map keys of the recipe to the values they may take, and not be empty")
        return None
    before = len(found.problems)
    dimensions: list[Dimension] = []
    waiting: list[tuple[Place, Dimension, Any]] = []
    for key, value in raw.items():
        place = (*path, key)
        try:
            for d in _dimensions(key, value, source, found, place):
                when = value.get("when") if isinstance(value, Mapping) else None
                if when is None:
                    dimensions.append(d)
                else:
                    waiting.append((place, d, when))
        except UsageError as error:
            found.problem(place, str(error))
    choices = {d.path: d for d in dimensions if isinstance(d, Choice)}
    for place, d, when in waiting:
        made = _when(when, choices, source, found, (*place, "when"))
        dimensions.append(replace(d, when=made))
    every = [p for d in dimensions for p in d.paths]
    for p in sorted({p for p in every if every.count(p) > 1}):
        if not all(d.when for d in dimensions if p in d.paths):
            found.problem(path, f"{p} is varied twice")
    return Space(tuple(dimensions)) if len(found.problems) == before else None


def _dimensions(key: str, raw: Any, source: Source, found: Findings, path: Place) -> list[Dimension]:
    if isinstance(raw, list):
        raw = {"choices": raw}
    if not isinstance(raw, Mapping):
        found.problem(path, "must be {low, high}, a list of choices, or {simplex: [keys]}")
        return []
    _known(raw, DIMENSION_KEYS, path, found)
    kinds = [k for k in ("choices", "simplex", "low") if k in raw]
    if len(kinds) != 1 or (kinds == ["low"] and "high" not in raw):
        found.problem(path, "must have low and high, or choices, or simplex, and only one of them")
        return []
    if kinds == ["simplex"]:
        return _simplex(key, raw, source, found, path)
    paths = source.expand(key)
    if kinds == ["choices"]:
        values = raw["choices"]
        if not isinstance(values, list) or len({label(v) for v in values}) != len(values) or not values:
            found.problem((*path, "choices"), "must be a list of different values")
            return []
        return [choice(p, values) for p in paths]
    how = _number(raw, found, path)
    return [] if how is None else [numbers(p, **how) for p in paths]


def _simplex(
    key: str, raw: Mapping[str, Any], source: Source, found: Findings, path: Place
) -> list[Dimension]:
    given = raw["simplex"]
    given = [given] if isinstance(given, str) else given
    if not isinstance(given, list) or not all(isinstance(p, str) for p in given):
        found.problem((*path, "simplex"), "must be a list of keys, or one with [*]")
        return []
    paths = [p for text in given for p in source.expand(text)]
    if len(set(paths)) != len(paths) or len(paths) < 2:
        found.problem((*path, "simplex"), "must be two different keys at least")
        return []
    return [Simplex(key, tuple(paths))]


def _number(raw: Mapping[str, Any], found: Findings, path: Place) -> dict[str, Any] | None:
    before = len(found.problems)
    for key in ("low", "high", "step"):
        value = raw.get(key)
        if key in raw and (
            isinstance(value, bool) or not isinstance(value, int | float) or abs(value) == float("inf")
        ):
            found.problem((*path, key), f"must be a number, not {value!r}")
    for key in ("log", "int"):
        if not isinstance(raw.get(key, False), bool):
            found.problem((*path, key), f"must be true or false, not {raw[key]!r}")
    curve = raw.get("curve")
    if curve is not None and (
        isinstance(curve, bool) or not isinstance(curve, int) or not 2 <= curve <= 1000
    ):
        found.problem((*path, "curve"), f"must be how many points the curve has, from 2 on, not {curve!r}")
    if len(found.problems) > before:
        return None
    low, high, step, integer = raw["low"], raw["high"], raw.get("step"), bool(raw.get("int"))
    log = bool(raw.get("log"))
    if not low < high:
        found.problem(path, f"low ({low!r}) must be below high ({high!r})")
    if log and low <= 0:
        found.problem((*path, "low"), "must be positive with log: true")
    if step is not None and (step <= 0 or step > high - low or log):
        found.problem((*path, "step"), "must be positive, no longer than the range, and without log")
    if integer and any(v is not None and v != int(v) for v in (low, high, step)):
        found.problem(path, "with int: true low, high and step must be whole numbers")
    if len(found.problems) > before:
        return None
    kind = int if integer else float
    return {"low": kind(low), "high": kind(high), "log": log, "integer": integer, "curve": curve,
            "step": None if step is None else kind(step)}  # fmt: skip


def _when(
    raw: Any, choices: Mapping[str, Choice], source: Source, found: Findings, path: Place
) -> dict[str, tuple[str, ...]]:
    if not isinstance(raw, Mapping):
        found.problem(path, "must map a choice to the values for which this counts")
        return {}
    made = {}
    for key, values in raw.items():
        (on,) = source.expand(key) if "[*]" not in key else (key,)
        if on not in choices:
            found.problem((*path, key), f"is no choice of this space{did_you_mean(on, choices)}")
            continue
        labels = tuple(label(v) for v in (values if isinstance(values, list) else [values]))
        for word in labels:
            if word not in choices[on].values:
                hint = did_you_mean(word, choices[on].values)
                found.problem((*path, key), f"{word} is none of its values{hint}")
        made[on] = labels
    return made


# -- the rest ----------------------------------------------------------------------------------------


def _sampler(raw: Any, found: Findings) -> Sampler | None:
    options: Any = {"name": raw} if isinstance(raw, str) else raw
    if not isinstance(options, Mapping):
        found.problem(("sampler",), f"must be one of {', '.join(SAMPLERS)}, or {{name: …, startup: …}}")
        return None
    before = len(found.problems)
    _known(options, SAMPLER_KEYS, ("sampler",), found)
    for key in ("startup", "population", "sigma"):
        value, kinds = options.get(key), float | int if key == "sigma" else int
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            found.problem(("sampler", key), f"must be a number, not {value!r}")
    if len(found.problems) > before:
        return None
    try:
        return Sampler(**{k: v for k, v in options.items() if v is not None})
    except UsageError as error:
        found.problem(("sampler",), str(error))
        return None


def _objectives(data: Mapping[str, Any], found: Findings) -> list[Objective]:
    raw, path = data["objectives"], ("objectives",)
    if not isinstance(raw, list) or not raw:
        found.problem(
            path, "must be a list of objectives, such as [{function: mine:accuracy, direction: maximize}]"
        )
        return []
    made = []
    for i, one in enumerate(raw):
        place: Place = (*path, i)
        if not isinstance(one, Mapping):
            found.problem(place, f"must be a mapping with one of {', '.join(KINDS)}")
            continue
        before = len(found.problems)
        _known(one, OBJECTIVE_KEYS, place, found)
        kinds = [k for k in KINDS if k in one]
        if len(kinds) != 1:
            found.problem(place, f"must have one of {', '.join(KINDS)}")
        for key in ("name", "module", "function"):
            if key in one and not isinstance(one[key], str):
                found.problem((*place, key), f"must be text, not {one[key]!r}")
        splits = [one.get(k, data.get(k)) for k in ("validation", "test")]
        for key, split in zip(("validation", "test"), splits, strict=True):
            if split is not None and not isinstance(split, str):
                found.problem((*place, key) if key in one else (key,), "must be the name of data, or a file")
        if len(found.problems) == before:
            try:
                made.append(_objective(kinds[0], one, *splits))
            except UsageError as error:
                found.problem(place, str(error))
    return made


def _objective(kind: str, raw: Mapping[str, Any], validation: str, test: str | None) -> Objective:
    direction: Any = raw.get("direction")
    options = raw[kind] if isinstance(raw[kind], Mapping) else {}
    score: Any
    if kind == "function":
        score = raw["function"]
        if direction is None:
            raise UsageError(f"direction is missing: is more of it better ({' or '.join(DIRECTIONS)})?")
    elif kind == "perplexity":
        score, direction = Perplexity(options), direction or "minimize"
        for split in (validation, test):
            if split is not None and not Path(split).is_file():
                raise UsageError(f"perplexity is measured on a text file, and there is none at {split}")
    else:
        metric = raw[kind] if isinstance(raw[kind], str) else options.get("metric", "acc")
        rest = {k: v for k, v in options.items() if k != "metric"}
        score, direction = LmEval(metric, rest), direction or "maximize"
    return Objective(score, direction, validation, test, raw.get("name", ""), raw.get("module"))
