"""`steps:`, a method made in the recipe itself.

    steps:
      - trim: {density: 0.2}
      - elect_sign
      - disjoint_mean: {weight: [1, 0.5]}
      - scaled: {scale: 0.7}

Each item is a step (`weft methods --steps` lists them) with its parameters, which may be curves or rules as
anywhere. The result is an ordinary method on task vectors whose parameters are called `trim.density`,
`elect_sign.weight` …; `parameters:` and those of a model may give them by that name, or by the short one
(`weight`), which then means every step that has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weft.errors import did_you_mean
from weft.methods.registry import METHODS, Method, pipeline_method
from weft.methods.step import STEPS, Pipeline, Step
from weft.recipes.findings import Findings
from weft.recipes.yaml import Path

Given = dict[str, tuple[Any, Path]]
"""Parameter → its raw value and where it stands."""


@dataclass(frozen=True)
class Build:
    """From the parameters `step.name` to the pipeline."""

    steps: tuple[tuple[str, Step], ...]

    def __call__(self, **params: Any) -> Pipeline:
        made = Pipeline()
        for label, step in self.steps:
            own = {name: params[f"{label}.{name}"] for name in step.params}
            made = made | step(**own)
        return made


def steps_method(raw: list[Any], path: Path, found: Findings) -> tuple[Method, Given] | None:
    """The method the list declares and the values it gives, or None after reporting what is wrong."""
    len(METHODS)  # declares every step
    before = len(found.problems)
    steps: list[tuple[str, Step]] = []
    given: Given = {}
    merged_by = ""
    for i, item in enumerate(raw):
        name, params = _item(item, (*path, i), found)
        if name is None:
            continue
        if name not in STEPS:
            hint = did_you_mean(name, STEPS) or f"; known are {', '.join(sorted(STEPS))}"
            found.problem((*path, i), f"there is no step {name!r}{hint}")
            continue
        step = STEPS[name]
        if merged_by and (step.reduces or step.stat):
            found.problem((*path, i), f"{name} needs the models apart, but {merged_by} has merged them")
        merged_by = merged_by or (name if step.reduces else "")
        same = sum(s is step for _, s in steps)
        label = f"{name}{same + 1}" if same else name
        steps.append((label, step))
        for key, value in params.items():
            if key in step.params:
                given[f"{label}.{key}"] = (value, (*path, i, name, key))
            else:
                hint = did_you_mean(key, step.params) or f"; it has {', '.join(step.params) or 'none'}"
                found.problem((*path, i, name, key), f"step {name} has no parameter {key!r}{hint}")
    if not merged_by and len(found.problems) == before:
        reducing = ", ".join(sorted(n for n, s in STEPS.items() if s.reduces))
        found.problem(path, f"the steps leave the models apart: add one that merges them ({reducing})")
    if len(found.problems) > before:
        return None
    method = pipeline_method(Pipeline(), "steps")
    method.build_fn = Build(tuple(steps))
    method.needs = tuple(dict.fromkeys(need for _, step in steps for need in step.needs))
    method.__doc__ = " | ".join(label for label, _ in steps)
    method.params = {
        f"{label}.{name}": replace(p, name=f"{label}.{name}")
        for label, step in steps
        for name, p in step.params.items()
    }
    return method, given


def _item(item: Any, path: Path, found: Findings) -> tuple[str | None, Mapping[str, Any]]:
    if isinstance(item, str):
        return item, {}
    if isinstance(item, Mapping) and len(item) == 1:
        ((name, params),) = item.items()
        if params is None or isinstance(params, Mapping):
            return str(name), params or {}
        found.problem((*path, name), "must be a mapping of parameters, such as {density: 0.2}")
    else:
        found.problem(path, "must be a step's name, or {name: {parameter: value}}")
    return None, {}
