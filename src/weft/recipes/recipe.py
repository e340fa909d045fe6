"""A recipe that has been checked: what `read` returns and `build` turns into a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from weft.checkpoints.dtypes import dtype_name
from weft.checkpoints.refs import Ref
from weft.methods.registry import Method
from weft.recipes.schedule import Schedules


@dataclass(frozen=True)
class Named:
    """Another document of the same file."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, repr=False)
class Recipe:
    """One merge: everything validated, nothing read."""

    method: Method
    models: tuple[Source, ...]
    base: Source | None
    params: Schedules
    name: str | None = None
    dtype: torch.dtype | None = None
    seed: int | None = None
    missing: Literal["error", "carry", "available"] = "error"
    mismatch: Literal["error", "carry"] = "error"
    nonfinite: Literal["error", "allow"] = "error"
    compat: Literal["mergekit"] | None = None
    mergekit_method: str | None = None
    """The method's name in MergeKit's dialect, where the recipe used it."""
    config_from: Source | None = None
    """Whose config and files the result takes, where it is neither the base nor the first model."""
    tokenizer_from: Source | Literal["union"] | None = None
    layers: int | None = None
    """How many blocks every model must have: a slice that must be the whole model."""
    given: frozenset[str] = frozenset()
    """Parameters the recipe gives a value; the others have their defaults."""
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    documents: dict[str, Recipe] = field(default_factory=dict, repr=False, compare=False)
    """The named documents of the file, which `Named` refers to."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """Base first, then the models."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def references(self) -> tuple[Source, ...]:
        """Every source the recipe mentions, each once: merged, or only asked for config or tokenizer."""
        extra = [s for s in (self.config_from, self.tokenizer_from) if s is not None and s != "union"]
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
            "parameters": self.params.describe(),
            "dtype": dtype_name(self.dtype) if self.dtype else None,
            "seed": self.seed,
            "missing": self.missing,
            "mismatch": self.mismatch,
            "compat": self.compat,
        }
        return {k: v for k, v in told.items() if v is not None}

    def __repr__(self) -> str:
        return f"<recipe {self.name or ''}: {show_source(self)}>"

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


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
    for source in recipe.references:
        if isinstance(source, Recipe):
            yield from walk(source)


def target(recipes: list[Recipe]) -> Recipe:
    """Which document of a file is meant when none is asked for: the one without a name, else the last."""
    return next((r for r in recipes if r.name is None), recipes[-1])
