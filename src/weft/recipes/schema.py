"""The shape of a recipe: which keys there are and what kind of value each takes.

MergeKit's keys, unchanged, and weft's own beside them. Whether the values make sense together (the method's
parameters, how many models, which base) is `resolve.py`'s business. The same models give the JSON schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from weft.errors import did_you_mean
from weft.recipes.findings import Findings

Parameters = dict[str, Any]


class Strict(BaseModel):
    """No unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=(), allow_inf_nan=False)


class PathRef(Strict):
    """A model by path and revision; characters such as `@` and `+` in the path mean nothing here."""

    path: str = Field(min_length=1, description="Folder, file, Hub id or URL.")
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub id.")


def _text_or_path(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<path>" if isinstance(value, Mapping | PathRef) else None


Place = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[PathRef, Tag("<path>")],
    Discriminator(
        _text_or_path, custom_error_type="place", custom_error_message="must be a path, or {path, revision}"
    ),
]


class ModelRef(Strict):
    """MergeKit's long form of a model: {model: {path, revision}, lora: {path, revision}}."""

    model: Place
    lora: Place | None = None
    override_architecture: str | None = Field(None, description="MergeKit's; weft reads the tensors' names.")


RECIPE_KEYS = {"merge_method", "method", "steps", "models", "slices", "modules"}


def model_form(value: Any) -> str | None:
    """Which of the ways to name a model a value is, as the tag of its branch."""
    if isinstance(value, str):
        return "<text>"
    if isinstance(value, PathRef | ModelRef | Recipe):
        return {PathRef: "<path>", ModelRef: "<ref>", Recipe: "<recipe>"}[type(value)]
    if not isinstance(value, Mapping):
        return None
    if RECIPE_KEYS & value.keys():
        return "<recipe>"
    return "<ref>" if "model" in value else "<path>" if "path" in value else None


Model = Annotated[
    Annotated[str, Tag("<text>"), Field(min_length=1)]
    | Annotated[PathRef, Tag("<path>")]
    | Annotated[ModelRef, Tag("<ref>")]
    | Annotated["Recipe", Tag("<recipe>")],
    Discriminator(
        model_form,
        custom_error_type="model",
        custom_error_message="must be a path, Hub id, URL, the name of another document, "
        "{path, revision}, or a recipe of its own",
    ),
]


class Input(Strict):
    """One model to merge."""

    model: Model
    parameters: Parameters | None = Field(None, description="Values of this model: weight, density …")
    statistics: Place | None = Field(None, description="What weft measure made of this model.")


def _input_form(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<input>"


ListedModel = Annotated[
    Annotated[str, Tag("<text>"), Field(min_length=1)] | Annotated[Input, Tag("<input>")],
    Discriminator(_input_form),
]


class SliceSource(Input):
    """One model of a slice."""

    layer_range: list[int] | None = Field(None, min_length=2, max_length=2, description="[first, end)")


class Slice(Strict):
    """Layers that are merged together."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Parameters | None = None
    residual_weight: Any = Field(None, description="MergeKit's; it has no effect there either.")


class Module(Strict):
    """One part of a model of several: its language model, a tower, an encoder."""

    models: list[ListedModel] | None = Field(None, min_length=1, description="The models to merge.")
    slices: list[Slice] | None = Field(None, min_length=1, description="Or their layers, slice by slice.")
    merge_method: str | None = Field(None, description="The recipe's, if not given here.")
    method: str | None = Field(None, description="The same as merge_method, under weft's name.")
    base_model: Model | None = None
    parameters: Parameters | None = None


class TokenEmbedding(Strict):
    """The row of a token of some model, or zero."""

    kind: Literal["model_token", "zero"]
    model: Model | None = None
    token: str | None = Field(None, description="Which token of the model, by its text.")
    token_id: int | None = Field(None, ge=0, description="The same by its number.")


def _row_form(value: Any) -> str | None:
    if isinstance(value, TokenEmbedding) or (isinstance(value, Mapping) and "kind" in value):
        return "<row>"
    return None if model_form(value) is None else "<model>"


class TokenRule(Strict):
    """Where the row of one token comes from."""

    source: Annotated[
        Annotated[TokenEmbedding, Tag("<row>")] | Annotated[Model, Tag("<model>")],
        Discriminator(
            _row_form, custom_error_type="row",
            custom_error_message="must be a model, or {kind: model_token | zero, …}",
        ),
    ] | None = None  # fmt: skip
    force: bool = Field(False, description="Also for models that have the token.")


class Tokenizer(Strict):
    """Where the tokenizer comes from."""

    source: Model | None = Field(None, description="base, union (the default) or a model.")
    tokens: dict[str, TokenRule] | None = Field(None, description="Where rows of single tokens come from.")
    pad_to_multiple_of: int | None = Field(None, ge=1, description="Round the number of rows up.")
    force: bool = Field(False, description="Also where the tokenizers are of different kinds.")


def _tokenizer_form(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<tokenizer>"


class Recipe(Strict):
    """A merge: a method, the models it merges, and its parameters."""

    name: str | None = Field(None, description="What other documents of this file call the result.")
    merge_method: str | None = Field(None, description="The method, under weft's or MergeKit's name.")
    method: str | None = Field(None, description="The same as merge_method, under weft's name.")
    steps: list[Any] | None = Field(
        None, min_length=1, description="A method made of steps: names, or {name: {parameter: value}}."
    )
    models: list[ListedModel] | None = Field(None, min_length=1, description="The models to merge.")
    slices: list[Slice] | None = Field(
        None, min_length=1, description="Layers that are merged slice by slice."
    )
    modules: dict[str, Module] | None = Field(
        None, description="What becomes of each part of a model of several (encoder, vision_tower)."
    )
    frame: Model | None = Field(
        None,
        description="The model whose other parts are kept: a vision-language model around a language model.",
    )
    base_model: Model | None = Field(None, description="The model the others were fine-tuned from.")
    base: Model | None = Field(None, description="The same as base_model.")
    base_statistics: Place | None = Field(None, description="What weft measure made of the base.")
    parameters: Parameters | None = Field(None, description="Parameters of the method, for all models.")
    dtype: str | None = Field(None, description="dtype of the output; weft computes in float32 at least.")
    out_dtype: str | None = Field(None, description="dtype of the output; goes before dtype.")
    tokenizer_source: Model | None = Field(None, description="base, union or a model.")
    tokenizer: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[Tokenizer, Tag("<tokenizer>")],
        Discriminator(_tokenizer_form),
    ] | None = Field(None, description="Where the tokenizer comes from.")  # fmt: skip
    chat_template: str | None = Field(
        None, description="auto, alpaca, chatml, exaone, llama3, mistral, or a Jinja template."
    )
    seed: int | None = Field(None, ge=0, lt=2**63, description="For methods that draw random numbers.")
    missing: Literal["error", "carry", "available"] = Field(
        "error", description="Tensors not all models have: an error, carried over, or merged from the rest."
    )
    mismatch: Literal["error", "carry"] = Field("error", description="Tensors whose shapes differ.")
    architectures: Literal["error", "allow"] = Field(
        "error", description="Models of different classes (model_type) whose tensors have the same names."
    )
    nonfinite: Literal["error", "allow"] = Field("error", description="NaN and infinity in a model.")
    compat: Literal["mergekit"] | None = Field(None, description="Reproduce another tool's choices.")


Input.model_rebuild()

TOP = tuple(Recipe.model_fields)
_BELOW: dict[str, type[Strict]] = {
    "models": Input, "slices": Slice, "sources": SliceSource, "modules": Module,
    "<recipe>": Recipe, "<path>": PathRef, "<ref>": ModelRef, "<input>": Input,
    "<tokenizer>": Tokenizer, "tokens": TokenRule, "<row>": TokenEmbedding,
}  # fmt: skip
_EXPECTED = {
    "string_type": "text", "int_type": "a whole number", "list_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping of keys to values", "model_attributes_type": "a mapping of keys to values",
    "mapping_type": "a mapping of keys to values",
}  # fmt: skip


def validate(data: Any, found: Findings, prefix: tuple[str | int, ...] = ()) -> Recipe | None:
    """The recipe in `data`, or None after reporting everything that is wrong with its shape."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=True):
            loc = problem["loc"]
            path = tuple(p for p in loc if not _is_tag(p))
            found.problem((*prefix, *path), _explained(problem, keys_at(loc[:-1])))
    except RecursionError:
        found.problem(prefix, "is nested too deeply")
    return None


def keys_at(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    """The keys known at a place pydantic names."""
    model: type[Strict] = Recipe
    for part in loc:
        if isinstance(part, str):
            model = _BELOW.get(part, model)
    return tuple(model.model_fields)


def _is_tag(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("<") and part.endswith(">")


def _explained(problem: Any, known: tuple[str, ...]) -> str:
    kind, value = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        key = str(problem["loc"][-1])
        return f"unknown key{did_you_mean(key, known) or '; known are ' + ', '.join(known)}"
    if kind == "missing":
        return "is missing"
    if kind in _EXPECTED:
        hint = "; quote it" if kind == "string_type" and isinstance(value, int | float) else ""
        return f"must be {_EXPECTED[kind]}, not {_brief(value)}{hint}"
    if kind == "literal_error":
        choices = problem["ctx"]["expected"]
        return f"must be {choices}, not {_brief(value)}{did_you_mean(str(value), _words(choices))}"
    message: str = problem["msg"]
    return message[:1].lower() + message[1:]


def _words(choices: str) -> list[str]:
    return [w.strip(" '") for w in choices.replace(" or ", ",").split(",")]


def _brief(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
