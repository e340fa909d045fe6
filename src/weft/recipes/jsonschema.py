"""`json_schema`: the recipe's JSON schema, for editors that complete and underline.

It comes from the very models and declarations the reader uses: keys from `schema.py`, parameters with their
types, bounds and defaults from the methods themselves. A recipe that it accepts may still be wrong in ways a
schema cannot say; `weft check` knows them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from weft._version import __version__
from weft.methods.params import Parameter
from weft.methods.registry import METHODS
from weft.methods.step import STEPS
from weft.recipes import mergekit
from weft.recipes.kinds import KINDS, SYNONYMS
from weft.recipes.mergekit import SPELLINGS, Spelling
from weft.recipes.schema import Recipe

Json = dict[str, Any]

IGNORED: Json = {"description": "MergeKit's; it has no effect on this method."}


def json_schema() -> Json:
    """The schema of one document of a recipe, JSON Schema draft 2020-12."""
    made: Json = Recipe.model_json_schema()
    recipe = made["$defs"].pop("Recipe", None) or {k: v for k, v in made.items() if k != "$defs"}
    names = mergekit.names()
    recipe["properties"]["merge_method"] = {"enum": sorted(names), "description": _of(recipe, "merge_method")}
    recipe["properties"]["method"] = {"enum": sorted(names), "description": _of(recipe, "method")}
    recipe["allOf"] = [
        *(_branch(name) for name in sorted(names)),
        {"oneOf": [{"required": [k]} for k in ("merge_method", "method", "steps")]},
        {"oneOf": [{"required": [k]} for k in ("models", "slices", "modules")]},
    ]
    definitions = {**made["$defs"], "Recipe": recipe, "Condition": _condition(), "ignored": IGNORED}
    for name in sorted(names):
        definitions |= _parameters(name, definitions)
    recipe["properties"]["steps"] = _steps(_of(recipe, "steps"), definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weft recipe",
        "description": f"A merge of neural networks (weft {__version__}).",
        "$ref": "#/$defs/Recipe",
        "$defs": definitions,
    }


def _to(definition: str) -> str:
    return f"#/$defs/{quote(definition, safe='')}"


def _of(recipe: Json, key: str) -> str:
    text: str = recipe["properties"][key].get("description", "")
    return text


def _branch(name: str) -> Json:
    """If the method is this one, its parameters are these."""
    shared = {"anyOf": [{"$ref": _to(f"parameters of {name}")}, {"type": "null"}]}
    own = {"anyOf": [{"$ref": _to(f"parameters of a model of {name}")}, {"type": "null"}]}
    inputs = {"items": {"properties": {"parameters": own}}}
    return {
        "if": {"anyOf": [
            {"properties": {key: {"const": name}}, "required": [key]} for key in ("merge_method", "method")
        ]},
        "then": {"properties": {"parameters": shared, "models": inputs}},
    }  # fmt: skip


def _parameters(name: str, definitions: Json) -> Json:
    method, spelling = mergekit.find(name)
    known = mergekit.parameter_names(method, spelling)
    every = {key: setting(method.params[own], definitions) for key, own in known.items()}
    passed_over = sorted(_passed_over(spelling) if name in SPELLINGS else mergekit.NO_EFFECT)
    ignored = {key: {"$ref": _to("ignored")} for key in passed_over}
    own = {key: value for key, value in every.items() if method.params[known[key]].per_model}
    return {
        f"parameters of {name}": _closed({**ignored, **every}, method.summary),
        f"parameters of a model of {name}": _closed({**ignored, **own}, "Values of this model."),
    }


def _passed_over(spelling: Spelling) -> set[str]:
    return {*mergekit.PARAMETERS, *mergekit.NO_EFFECT, *spelling.without}


def _closed(properties: Json, description: str) -> Json:
    return {
        "type": "object", "properties": properties, "additionalProperties": False,
        "description": description,
    }  # fmt: skip


def setting(parameter: Parameter, definitions: Json) -> Json:
    """A scalar, a curve, or rules whose values are either; defined once for all parameters of a type."""
    kind = replace(parameter, bounds=replace(parameter.bounds, per_model=False)).describe()
    if parameter.optional:
        kind += " or nothing"
    definitions.setdefault(kind, _values(parameter))
    made: Json = {"$ref": _to(kind), "description": parameter.describe()}
    if not parameter.required:
        made["default"] = parameter.default
    return made


def _values(parameter: Parameter) -> Json:
    leaf = _leaf(parameter)
    value = {"anyOf": [leaf, {"type": "array", "items": leaf, "minItems": 1}]}
    rule = {
        "allOf": [{"$ref": "#/$defs/Condition"}], "type": "object", "required": ["value"],
        "properties": {"value": value},
    }  # fmt: skip
    rules = {"type": "array", "items": rule, "minItems": 1}
    return {"anyOf": [*value["anyOf"], rule, rules]}


def _leaf(parameter: Parameter) -> Json:
    if parameter.kind == "choice":
        leaf: Json = {"enum": list(parameter.choices)}
        if parameter.name.rpartition(".")[2] == "rescale":
            leaf["enum"] += [True, False]  # MergeKit's spelling
    else:
        kind = {"float": "number", "int": "integer", "bool": "boolean", "str": "string"}[parameter.kind]
        leaf = {"type": kind}
        b = parameter.bounds
        if math.isfinite(b.low):
            leaf["exclusiveMinimum" if b.open_low else "minimum"] = b.low
        if math.isfinite(b.high):
            leaf["maximum"] = b.high
    return {"anyOf": [leaf, {"type": "null"}]} if parameter.optional else leaf


def _condition() -> Json:
    text = {"type": "string", "minLength": 1}
    kind = {"enum": [*KINDS, *SYNONYMS]}
    bound = {"type": ["integer", "null"]}
    layers = [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": r"^\s*\d+\s*(-\s*\d+\s*)?$"},
        {"type": "array", "items": bound, "minItems": 2, "maxItems": 2},
    ]
    kinds = {"anyOf": [kind, {"type": "array", "items": kind}]}
    return {
        "properties": {
            "filter": {**text, "description": "The name contains this."},
            "pattern": {**text, "description": "A glob over the name, or /a regular expression/."},
            "layers": {"anyOf": layers, "description": '[first, end) or "first-last".'},
            "kind": {**kinds, "description": "What the tensor is."},
            "block": {**kinds, "description": "The same as kind."},
            "stack": {**text, "description": "The name begins with this prefix."},
            "value": {},
        },
        "additionalProperties": False,
    }  # fmt: skip


def _steps(description: str, definitions: Json) -> Json:
    len(METHODS)  # declares every step
    items = [
        {
            "type": "object", "required": [name], "additionalProperties": False,
            "properties": {
                name: {"anyOf": [
                    _closed({k: setting(p, definitions) for k, p in s.params.items()}, ""), {"type": "null"}
                ]}
            },
        }
        for name, s in sorted(STEPS.items())
    ]  # fmt: skip
    return {
        "type": "array", "minItems": 1, "description": description,
        "items": {"anyOf": [{"enum": sorted(STEPS)}, *items]},
    }  # fmt: skip
