"""The recipe of a mixture: MergeKit's `mergekit-moe` YAML unchanged, and `layout`, `seed`, `compat` beside it.

What can be known without opening a model is checked here, and all problems are told at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError

from weft.checkpoints.dtypes import dtype_name, parse_dtype
from weft.errors import UsageError
from weft.recipes import schema
from weft.recipes.findings import Findings, raise_problems
from weft.recipes.overrides import override
from weft.recipes.read import Readable, _documents
from weft.recipes.recipe import Source, show_source
from weft.recipes.resolve import Around, _source
from weft.recipes.yaml import Path

GateMode = Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"]
Layout = Literal["split", "fused"]
RANDOM: tuple[GateMode, ...] = ("random", "uniform_random")


class ExpertKeys(schema.Strict):
    """One expert, as the file writes it."""

    source_model: schema.Model
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    residual_scale: float | None = None
    noise_scale: float | None = Field(None, ge=0)


class MixtureKeys(schema.Strict):
    """The whole file."""

    base_model: schema.Model
    experts: list[ExpertKeys] = Field(min_length=1)
    shared_experts: list[ExpertKeys] | None = None
    experts_per_token: int = Field(2, ge=1)
    gate_mode: GateMode = "hidden"
    dtype: str | None = None
    architecture: str | None = None
    layout: Layout = "split"
    seed: int = Field(0, ge=0, lt=2**63)
    compat: Literal["mergekit"] | None = None


for _keys in (ExpertKeys, MixtureKeys):  # "Recipe", which Model names, is defined there and not here
    _keys.model_rebuild(_types_namespace={"Recipe": schema.Recipe})


@dataclass(frozen=True)
class Expert:
    """One expert: the model its MLPs come from, and what its router rows are made of."""

    source: Source
    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()
    residual_scale: float = 1.0
    """Factor of the down-projection, so of all that the expert adds to the residual stream."""
    noise_scale: float = 0.0
    """Standard deviation of the normal noise added to every weight of the expert."""


@dataclass(frozen=True)
class MixtureRecipe:
    """A recipe that has been checked; nothing is read yet."""

    base: Source
    experts: tuple[Expert, ...]
    shared: tuple[Expert, ...]
    experts_per_token: int
    gate_mode: GateMode
    dtype: torch.dtype | None
    architecture: str | None
    layout: Layout
    seed: int
    compat: Literal["mergekit"] | None
    notes: tuple[str, ...] = ()

    @property
    def prompted(self) -> bool:
        """Whether router rows are made of prompts."""
        return self.gate_mode not in RANDOM

    def describe(self) -> dict[str, Any]:
        """As plain data, for the manifest."""
        return {
            "moe": {
                "base_model": show_source(self.base),
                "experts": [show_source(e.source) for e in self.experts],
                "shared_experts": [show_source(e.source) for e in self.shared],
                "experts_per_token": self.experts_per_token,
                "gate_mode": self.gate_mode,
                "dtype": dtype_name(self.dtype) if self.dtype else None,
                "layout": self.layout,
                "seed": self.seed,
                "compat": self.compat,
            }
        }


def read_mixture(source: Readable, set: Sequence[str] = ()) -> MixtureRecipe:
    """The recipe in a file, a text or data; `set` holds overrides such as `experts_per_token=1`.

    Raises Problems with everything that is wrong with it, UsageError where it is no YAML, DataError where
    the file cannot be read.
    """
    origin, documents = _documents(source)
    if len(documents) != 1:
        raise UsageError(f"{origin} has {len(documents)} documents; the recipe of a mixture is one")
    override(documents, set)
    found = Findings(documents[0])
    raw = _validated(documents[0].data, found)
    recipe = None if raw is None else _resolved(raw, found)
    raise_problems(origin, found.problems)
    assert recipe is not None
    return recipe


def _validated(data: Any, found: Findings) -> MixtureKeys | None:
    try:
        return MixtureKeys.model_validate(data)
    except ValidationError as error:
        for problem in error.errors(include_url=False, include_context=True):
            loc = problem["loc"]
            path = tuple(p for p in loc if not (isinstance(p, str) and p.startswith("<")))
            found.problem(path, schema._explained(problem, _keys_at(loc[:-1])))
    except RecursionError:
        found.problem((), "is nested too deeply")
    return None


def _keys_at(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    """The keys known at a place: the file's, an expert's, or a nested recipe's."""
    if "<recipe>" in loc:
        return schema.keys_at(loc[loc.index("<recipe>") :])
    inside = any(part in ("experts", "shared_experts") for part in loc)
    return tuple((ExpertKeys if inside else MixtureKeys).model_fields)


def _resolved(raw: MixtureKeys, found: Findings) -> MixtureRecipe | None:
    base = _source(raw.base_model, ("base_model",), found, Around(compat=raw.compat))
    experts = _experts(raw.experts, "experts", raw, found)
    shared = _experts(raw.shared_experts or [], "shared_experts", raw, found)
    if raw.experts_per_token > len(raw.experts):
        found.problem(
            ("experts_per_token",),
            f"is {raw.experts_per_token}, but there are {len(raw.experts)} experts to choose from",
        )
    if len(shared) > 1:
        found.problem(("shared_experts", 1), "one shared expert at most is supported")
    if raw.gate_mode in RANDOM:
        for key, listed in (("experts", raw.experts), ("shared_experts", raw.shared_experts or [])):
            for i, expert in enumerate(listed):
                if expert.positive_prompts or expert.negative_prompts:
                    found.note((key, i), f"its prompts have no effect with gate_mode {raw.gate_mode}")
    dtype = None
    if raw.dtype is not None:
        try:
            dtype = parse_dtype(raw.dtype)
        except UsageError as error:
            found.problem(("dtype",), str(error))
    if base is None or found.problems:
        return None
    return MixtureRecipe(
        base, tuple(experts), tuple(shared), raw.experts_per_token, raw.gate_mode, dtype, raw.architecture,
        raw.layout, raw.seed, raw.compat, tuple(found.notes),
    )  # fmt: skip


def _experts(listed: list[ExpertKeys], key: str, raw: MixtureKeys, found: Findings) -> list[Expert]:
    made = []
    for i, expert in enumerate(listed):
        path: Path = (key, i)
        source = _source(expert.source_model, (*path, "source_model"), found, Around(compat=raw.compat))
        positive, negative = expert.positive_prompts or [], expert.negative_prompts or []
        for name, prompts in (("positive_prompts", positive), ("negative_prompts", negative)):
            for j, prompt in enumerate(prompts):
                if not prompt.strip():
                    found.problem((*path, name, j), "is empty")
        if raw.gate_mode not in RANDOM:
            if negative and not positive:
                found.problem((*path, "negative_prompts"), "say what the expert is not for; "
                              "positive_prompts must say what it is for")  # fmt: skip
            elif not positive and key == "experts":
                found.problem(path, f"positive_prompts are missing: gate_mode {raw.gate_mode} makes the router "
                              f"of them (or choose {' or '.join(RANDOM)}, and train it)")  # fmt: skip
        if source is not None:
            scale = 1.0 if expert.residual_scale is None else expert.residual_scale
            made.append(Expert(source, tuple(positive), tuple(negative), scale, expert.noise_scale or 0.0))
    return made
