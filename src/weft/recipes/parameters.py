"""A method's parameters, gathered from every place a recipe may give them.

For each model the value is looked up in its own `parameters`, then in the step that has it, the slice, the
recipe, and at last among the defaults. Rules of a nearer place that hold for no tensor let the farther
places speak, as in MergeKit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import UsageError, did_you_mean
from weft.methods.params import Parameter
from weft.methods.registry import Method
from weft.recipes import mergekit
from weft.recipes.findings import Findings
from weft.recipes.mergekit import Spelling
from weft.recipes.schedule import Curve, Schedule, Schedules, constant, parse_rules
from weft.recipes.steps import Given
from weft.recipes.yaml import Path

Level = tuple[Mapping[str, Any] | None, Path]
"""One `parameters:` mapping and where it stands."""


@dataclass
class Asked:
    """A method and the way the recipe names it."""

    method: Method
    spelling: Spelling
    compat: str | None
    dialect: bool
    """True where the recipe writes merge_method:, so that MergeKit's stray parameters are let pass."""
    inline: Given
    """Values given in the steps themselves."""


def gather(
    asked: Asked, models: Sequence[Level], shared: Sequence[Level], found: Findings
) -> tuple[Schedules, frozenset[str]]:
    """The schedules of all parameters, and the names of those the recipe gives.

    `shared` goes from the nearest level to the farthest. What is wrong is reported, and left out.
    """
    per_model = [_sorted(level, asked, found, of_model=True) for level in models]
    for_all = [asked.inline, *(_sorted(level, asked, found, of_model=False) for level in shared)]
    by_name: dict[str, Schedule | tuple[Schedule, ...]] = {}
    given: set[str] = set()
    theirs = asked.method.compat.get(asked.compat, {}) if asked.compat else {}
    for name, parameter in asked.method.params.items():
        common = constant_or_none(parameter, theirs)
        farther = [_schedule(level[name], parameter, asked, found) for level in for_all if name in level]
        own = [
            [_schedule(level[name], parameter, asked, found)] if name in level else [] for level in per_model
        ]
        if farther or any(own):
            given.add(name)
        chains = [_chain([*nearest, *farther], common) for nearest in (own if any(own) else [[]])]
        lacking = [i for i, chain in enumerate(chains) if chain is None]
        if lacking:
            _report_missing(name, parameter, asked, models, lacking if any(own) else [], found)
        else:
            complete = tuple(c for c in chains if c is not None)
            by_name[name] = complete if any(own) else complete[0]
    return _one_scope(asked.method, Schedules(by_name), given, found), frozenset(given)


def constant_or_none(parameter: Parameter, theirs: Mapping[str, Any]) -> Schedule | None:
    """The default of a parameter as a schedule, None where it must be given."""
    if parameter.name in theirs:
        return constant(parameter, parameter.check(theirs[parameter.name]))
    return None if parameter.required else constant(parameter, parameter.default)


def _chain(levels: list[Schedule], default: Schedule | None) -> Schedule | None:
    every = [*levels, *([default] if default is not None else [])]
    if not every:
        return None
    chain = every[0]
    for schedule in every[1:]:
        chain = chain.then(schedule)
    # the default knows nothing of the dialect, and needs not
    return Schedule(chain.parameter, chain.rules, any(s.mergekit for s in levels))


def _schedule(given: tuple[Any, Path], parameter: Parameter, asked: Asked, found: Findings) -> Schedule:
    raw, path = given
    theirs = asked.method.compat.get("mergekit", {}).get(parameter.name)
    raw = mergekit.translated(parameter, raw, asked.compat, theirs)
    return Schedule(parameter, parse_rules(raw, parameter, path, found.problem), asked.compat == "mergekit")


def _sorted(level: Level, asked: Asked, found: Findings, of_model: bool) -> Given:
    """One level's values by the method's own names; unknown ones are reported."""
    mapping, path = level
    method, spelling = asked.method, asked.spelling
    known = mergekit.parameter_names(method, spelling)
    sorted_out: Given = {}
    try:
        mapping = mergekit.rewritten(mapping or {}, spelling)
    except UsageError as error:
        found.problem(path, str(error))
    for key, raw in (mapping or {}).items():
        place = (*path, key)
        targets = [known[key]] if key in known else _short(key, method)
        if raw is None and not (targets and method.params[targets[0]].optional):
            continue  # `scale: null` is MergeKit's way to say nothing
        if key in mergekit.NO_EFFECT:
            found.note(place, f"ignored: {mergekit.NO_EFFECT[key]}")
        elif key in spelling.without:
            harmless, said = spelling.without[key]
            if raw != harmless:
                found.note(place, f"ignored: {said}; the result differs from MergeKit's")
        elif not targets:
            _unknown(key, place, asked, found, known)
        elif of_model and not all(method.params[t].per_model for t in targets):
            message = f"{key} is one value for the whole merge, not one a model"
            if asked.dialect and key in mergekit.PARAMETERS:
                found.note(place, f"ignored, as in MergeKit: {message}")
            else:
                found.problem(place, f"{message}; move it to the recipe's parameters")
        else:
            for t in targets:
                if t in sorted_out and "." not in t:
                    found.problem(place, f"{t} is given twice, once under another name; give it once")
                if t not in sorted_out or key == t:  # trim.density goes before density, which is any step's
                    sorted_out[t] = (raw, place)
            _note_lists(key, raw, targets, place, of_model, asked, found)
    return sorted_out


def _short(key: str, method: Method) -> list[str]:
    """The parameters of steps that a short name means."""
    return [name for name in method.params if "." in name and name.rpartition(".")[2] == key]


def _note_lists(
    key: str, raw: Any, targets: list[str], path: Path, of_model: bool, asked: Asked, found: Findings
) -> None:
    # in Python a list of weights is one a model, so this is worth a word
    curve = isinstance(raw, list) and len(raw) > 1 and not any(isinstance(v, dict) for v in raw)
    if curve and not of_model and asked.method.params[targets[0]].per_model:
        found.note(path, f"a list is a curve over the blocks, the same for every model; to give each model "
                         f"its own {key}, write it under that model's parameters")  # fmt: skip


def _unknown(key: str, path: Path, asked: Asked, found: Findings, known: Mapping[str, str]) -> None:
    name = asked.method.name
    if asked.dialect and key in mergekit.PARAMETERS:
        found.note(path, f"ignored: {name} has no parameter {key!r}")
        return
    short = {n.rpartition(".")[2] for n in known}
    hint = did_you_mean(key, [*known, *short]) or f"; it has {', '.join(known) or 'none'}"
    found.problem(path, f"{name} has no parameter {key!r}{hint}")


def _report_missing(
    name: str, parameter: Parameter, asked: Asked, models: Sequence[Level], lacking: list[int],
    found: Findings,
) -> None:  # fmt: skip
    said = f"{asked.method.name} needs {name} ({parameter.describe()})"
    for i in lacking:
        found.problem(models[i][1], said)
    if not lacking:
        found.problem(("parameters",), said)


def sample(schedule: Schedule | tuple[Schedule, ...], end: int = 0) -> Any:
    """One value that a schedule takes: that of its first (0) or last (-1) rule, at that end of a curve."""
    if isinstance(schedule, tuple):
        return [sample(s, end) for s in schedule]
    rules = schedule.effective
    value = rules[end].value if rules else schedule.parameter.default
    return value.values[end] if isinstance(value, Curve) else value


def _one_scope(method: Method, params: Schedules, given: set[str], found: Findings) -> Schedules:
    """A statistic of the whole model has one set of parameters; where they vary, it is taken per tensor.

    MergeKit's recipes vary TIES' density over the layers, which the paper's trim over all layers cannot.
    """
    scope = method.params.get("scope")
    if scope is None or "scope" not in params.by_name:
        return params
    try:
        steps = method.pipeline(**{n: sample(s) for n, s in params.by_name.items()}).steps
    except UsageError:  # some parameter is wrong by itself, which is reported where it is
        return params
    wanted = {n for b in steps if b.step.stat is not None and b.scope == "model" for n in b.params}
    varying = [n for n in wanted & params.by_name.keys() if not all(s.constant for s in params.each(n))]
    if not varying:
        return params
    if "scope" in given:
        said = f"with scope 'model' {' and '.join(sorted(varying))} cannot vary over the tensors"
        found.problem(("parameters", "scope"), f"{said}; write scope: tensor")
        return params
    found.note(("parameters",), f"scope is 'tensor', because {' and '.join(sorted(varying))} varies over the "
                                f"tensors and scope 'model' has one for all")  # fmt: skip
    return Schedules({**params.by_name, "scope": constant(scope, "tensor")})
