"""`weft check` and `weft methods`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from inspect import cleandoc
from typing import Any

import typer

from weft.cli.output import console, print_json, safe, table
from weft.errors import UsageError, did_you_mean
from weft.methods.params import Parameter
from weft.methods.registry import METHODS, Method
from weft.methods.step import STEPS, Step


def check_recipe(recipe: str, sets: list[str], headers: bool, as_json: bool) -> None:
    """Print the report on a recipe; its problems give the exit status."""
    from weft.recipes import check

    report = check(recipe, sets, headers=headers)
    if as_json:
        print_json(report.to_json())
    else:
        print(safe(report))
    if report.exit_status:
        raise typer.Exit(report.exit_status)


def list_methods(name: str | None, as_json: bool) -> None:
    """Print every method, or one method or step in full."""
    if name is not None:
        _list_one(name, as_json)
        return
    made = list(METHODS.values())
    if as_json:
        print_json([describe_method(m) for m in made])
        return
    listed = table("method", "models", "base", "parameters", "what it does")
    for m in made:
        listed.add_row(m.name, _arity(m), m.base, ", ".join(m.params) or "–", m.summary)
    console().print(listed)
    print(f"\n{len(made)} methods; `weft methods NAME` shows one: defaults, bounds, formula, paper.")
    print(f"Steps for `steps:` in a recipe: {', '.join(sorted(STEPS))}.")


def _list_one(name: str, as_json: bool) -> None:
    if name in METHODS or name not in STEPS:
        if name not in METHODS:
            hint = did_you_mean(name, [*METHODS, *(a for m in METHODS.values() for a in m.aliases), *STEPS])
            raise UsageError(f"there is no method or step {name!r}{hint or '; weft methods lists them'}")
        method = METHODS[name]
        if as_json:
            print_json(describe_method(method))
        else:
            _show_method(method)
        return
    step = STEPS[name]
    if as_json:
        print_json(describe_step(step))
        return
    print(f"{step.name} (a step)\n")
    print(cleandoc(step.__doc__ or ""))
    print(f"\nsees      {_SIGHT[step.grain({p.name: p.default for p in step.params.values()})]}")
    print(f"gives     {'one tensor' if step.reduces else 'a stack, one tensor a model'}")
    print(f"measures  {', '.join(step.stat.provides) if step.stat else 'nothing'} beforehand")
    _show_parameters(step.params)


_SIGHT = {"element": "any range of elements", "row": "whole rows", "tensor": "whole tensors"}


def _show_method(m: Method) -> None:
    told = describe_method(m)
    print(cleandoc(m.__doc__ or "").replace(m.summary, f"{m.name}: {m.summary}", 1))
    space = "weights" if m.space == "weights" else "task vectors (model − base)"
    if m.space == "weights" and m.base == "optional":
        space += ", or task vectors where a base is given"
    print(f"\nworks on   {space}")
    print(f"models     {_arity(m)}, and a base: {m.base}")
    if m.per_task:
        print("output     one model a task")
    if m.aliases:
        print(f"aliases    {', '.join(m.aliases)}")
    if m.paper:
        print(f"paper      {m.paper}")
    for tool, values in m.compat.items():
        print(f"compat     {tool}: {', '.join(f'{k}={_value(v)}' for k, v in values.items())}")
    _show_parameters(m.params)
    print("\nsteps, with these defaults:\n    " + "\n  | ".join(told["steps"]))
    if told["notes"]:
        print(f"\n{told['notes']}")


def _show_parameters(params: dict[str, Parameter]) -> None:
    if not params:
        print("\nno parameters")
        return
    print()
    listed = table("parameter", "default", "values")
    for p in params.values():
        optional = ", or null" if p.optional else ""
        listed.add_row(p.name, "must be given" if p.required else _value(p.default), p.describe() + optional)
    console().print(listed)


def describe_method(m: Method) -> dict[str, Any]:
    """A method as plain data."""
    low, high = m.models
    module = sys.modules.get(m.build_fn.__module__)
    return {
        "name": m.name,
        "summary": m.summary,
        "space": m.space,
        "base": m.base,
        "models": {"min": low, "max": high},
        "per_task": m.per_task,
        "parameters": [describe_parameter(p) for p in m.params.values()],
        "paper": m.paper,
        "aliases": list(m.aliases),
        "compat": m.compat,
        "steps": _steps(m),
        "doc": cleandoc(m.__doc__ or ""),
        "notes": cleandoc(module.__doc__ or "") if module else "",
    }


def describe_step(step: Step) -> dict[str, Any]:
    """A step as plain data."""
    return {
        "name": step.name,
        "doc": cleandoc(step.__doc__ or ""),
        "reduces": step.reduces,
        "grain": step.grain({p.name: p.default for p in step.params.values()}),
        "measures": list(step.stat.provides) if step.stat else [],
        "parameters": [describe_parameter(p) for p in step.params.values()],
    }


def describe_parameter(p: Parameter) -> dict[str, Any]:
    """A parameter as plain data; a bound that there is not is null."""
    b = p.bounds
    return {
        "name": p.name,
        "type": p.kind,
        "required": p.required,
        "default": None if p.required else p.default,
        "choices": list(p.choices),
        "min": b.low if abs(b.low) != float("inf") else None,
        "max": b.high if abs(b.high) != float("inf") else None,
        "min_excluded": b.open_low,
        "per_model": p.per_model,
        "nullable": p.optional,
        "description": p.describe(),
    }


def _steps(m: Method) -> list[str]:
    """The pipeline with the defaults; a parameter that must be given stands as `…`."""
    required = [p for p in m.params.values() if p.required]
    made = m.pipeline(**{p.name: p.choices[0] if p.choices else _sample(p) for p in required})
    unknown = {p.name for p in required}

    def show(values: Mapping[str, Any]) -> str:
        return ", ".join(f"{k}={'…' if k in unknown else _value(v)}" for k, v in values.items())

    return [f"{b.step.name}({show(b.params)})" for b in made.steps]


def _sample(p: Parameter) -> Any:
    return {"bool": False, "str": ""}.get(p.kind, max(0, p.bounds.low) + (1 if p.bounds.open_low else 0))


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "null" if value is None else str(value)


def _arity(m: Method) -> str:
    low, high = m.models
    return str(low) if low == high else f"{low} or more" if high is None else f"{low} to {high}"
