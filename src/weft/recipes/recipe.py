"""A recipe that has been checked: what `read` returns and `build` turns into a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.checkpoints.dtypes import DType
from weft.checkpoints.refs import Ref
from weft.methods.registry import Method
from weft.recipes.schedule import Schedules


@dataclass(frozen=True)
class Named:
    """Another document of the same file."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TokenRow:
    """Where the row of one token comes from: a model's row of it (or of another token of the model), or zero."""

    model: Source | None = None
    token: str | int | None = None
    force: bool = False
    """Also where a model has a row of its own for the token."""
    given: bool = True
    """False where the recipe says only `force`."""


@dataclass(frozen=True)
class TokenizerChoice:
    """The one vocabulary that all models of a recipe are brought to."""

    source: Source | Literal["union"]
    base: Source | None = None
    """Whose row a model gets for a token that it lacks."""
    tokens: tuple[tuple[str, TokenRow], ...] = ()
    pad_to_multiple_of: int | None = None
    force: bool = False
    """Also where the tokenizers are of different kinds."""
    of_base: bool = False
    """True where the recipe says `base` rather than the model's name."""

    def describe(self) -> dict[str, Any]:
        """The choice as plain data."""
        told = {
            "source": "base" if self.of_base else show_source(self.source), "force": self.force,
            "tokens": [t for t, _ in self.tokens], "pad_to_multiple_of": self.pad_to_multiple_of,
        }  # fmt: skip
        return {k: v for k, v in told.items() if v}


@dataclass(frozen=True, repr=False)
class Recipe:
    """One merge: everything validated, nothing read."""

    method: Method
    models: tuple[Source, ...]
    base: Source | None
    params: Schedules
    name: str | None = None
    dtype: DType | None = None
    seed: int | None = None
    missing: Literal["error", "carry", "available"] = "error"
    mismatch: Literal["error", "carry"] = "error"
    nonfinite: Literal["error", "allow"] = "error"
    architectures: Literal["error", "allow"] = "error"
    compat: Literal["mergekit"] | None = None
    mergekit_method: str | None = None
    """The method's name in MergeKit's dialect, where the recipe used it."""
    statistics: tuple[Source, ...] = ()
    """What was measured of each model; empty where none is given."""
    base_statistics: Source | None = None
    config_from: Source | None = None
    """Whose config and files the result takes, where it is neither the base nor the first model."""
    tokenizer: TokenizerChoice | None = None
    chat_template: str | None = None
    slices: tuple[Slice, ...] = ()
    """What the blocks are made of, slice by slice; empty where the models are merged whole. The recipe's own
    method, base and parameters are then those of the first slice, its models those of all."""
    modules: Mapping[str, Recipe] = field(default_factory=dict)
    """What the parts of the model are made of, where it has several; else as with slices."""
    frame: Source | None = None
    """The model whose parts the others lack are kept."""
    given: frozenset[str] = frozenset()
    """Parameters the recipe gives a value; the others have their defaults."""
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    documents: dict[str, Recipe] = field(default_factory=dict, repr=False, compare=False)
    """The named documents of the file, which `Named` refers to."""

    @property
    def pieces(self) -> tuple[Recipe, ...]:
        """The recipes of the slices or modules; empty where the models are merged whole."""
        return (*(s.recipe for s in self.slices), *self.modules.values())

    @property
    def tokenizer_from(self) -> Source | Literal["union"] | None:
        """Whose tokenizer the result takes: a source, "union", or None for the base's or as it comes."""
        return None if self.tokenizer is None or self.tokenizer.of_base else self.tokenizer.source

    @property
    def sources(self) -> tuple[Source, ...]:
        """Base first, then the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def measured(self) -> tuple[Source, ...]:
        """Every checkpoint of statistics."""
        return self.statistics if self.base_statistics is None else (*self.statistics, self.base_statistics)

    @property
    def references(self) -> tuple[Source, ...]:
        """Every source the recipe mentions, each once: merged, or only asked for config or tokenizer."""
        rows = [] if self.tokenizer is None else [row.model for _, row in self.tokenizer.tokens]
        named = (self.frame, self.config_from, self.tokenizer_from, *rows)
        extra = [s for s in named if s is not None and s != "union"]
        found: list[Source] = []
        for source in (*self.sources, *extra):
            if source not in found:
                found.append(source)
        return tuple(found)

    def describe(self) -> dict[str, Any]:
        """The recipe as resolved, as plain data: for `weft check`, `--dry-run` and the manifest."""
        told: dict[str, Any] = {
            "name": self.name,
            "method": self.method.name,
            "steps": self.method.summary if self.method.name == "steps" else None,
            "base": None if self.base is None else show_source(self.base),
            "models": [show_source(m) for m in self.models],
            "statistics": [show_source(s) for s in self.measured] or None,
            "parameters": None if self.pieces else self.params.describe(),
            "slices": [s.describe() for s in self.slices] or None,
            "modules": {name: r.describe() for name, r in self.modules.items()} or None,
            "frame": None if self.frame is None else show_source(self.frame),
            "dtype": self.dtype.name if self.dtype else None,
            "seed": self.seed,
            "missing": self.missing,
            "mismatch": self.mismatch,
            "compat": self.compat,
            "tokenizer": None if self.tokenizer is None else self.tokenizer.describe(),
            "chat_template": self.chat_template,
        }
        return {k: v for k, v in told.items() if v is not None}

    def __repr__(self) -> str:
        return f"<recipe {self.name or ''}: {show_source(self)}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Slice:
    """Layers that are merged together, as a recipe with the range of each of its models."""

    recipe: Recipe
    ranges: tuple[Range, ...]
    base_range: Range = None

    def describe(self) -> dict[str, Any]:
        """The slice as plain data: models with their layers, and parameters."""
        told = self.recipe.describe()
        named = zip(self.recipe.models, self.ranges, strict=True)
        models = [show_source(m) + ("" if r is None else f" {list(r)}") for m, r in named]
        return {"models": models, **{k: told[k] for k in ("base", "parameters") if k in told}}


Range = tuple[int, int] | None
"""Layers [first, end); None for all of them."""
Source = str | Ref | Named | Recipe
"""What a recipe may name as a model: a reference, another document, or a recipe inside it."""


def show_source(source: Source) -> str:
    """A source as messages and plans call it."""
    if isinstance(source, Recipe):
        return f"{source.method.name}({', '.join(show_source(s) for s in source.models)})"
    return str(source)


def walk(recipe: Recipe) -> Iterator[Recipe]:
    """The recipe and those inside it, not those it only names."""
    yield recipe
    for piece in recipe.pieces:
        yield from walk(piece)
    for source in recipe.references:
        if isinstance(source, Recipe):
            yield from walk(source)


def target(recipes: list[Recipe]) -> Recipe:
    """Which document of a file is meant when none is asked for: the one without a name, else the last."""
    return next((r for r in recipes if r.name is None), recipes[-1])
