"""MergeKit's dialect: its names for methods and parameters, and where weft does otherwise.

One table says everything. A method is known under MergeKit's name and, unless that means something else
there, under weft's. `compat: mergekit` takes the defaults of `Method.compat["mergekit"]` instead of the
paper's and gives the tensors outside the blocks the first value of every curve.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.checkpoints.dtypes import dtype_name
from weft.errors import UsageError, did_you_mean
from weft.methods.params import Parameter
from weft.methods.registry import METHODS, Method
from weft.recipes.recipe import Recipe, walk
from weft.recipes.schedule import Schedules

NO_EFFECT = {
    "int8_mask": "it changes a temporary of MergeKit's and no result",
}
"""Parameters that are accepted for any method and do nothing."""


@dataclass(frozen=True)
class Spelling:
    """What one of MergeKit's methods is called in weft."""

    method: str
    rename: Mapping[str, str] = field(default_factory=dict)
    """MergeKit's parameter → weft's, where they differ."""
    without: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    """Parameters weft's method does not have → the value that changes nothing, and what weft does."""
    base: Literal["", "model", "third", "ignored"] = ""
    """What `base_model` is, if not simply the base: one of the models, and then the first; a third model
    besides two; nothing to this method."""
    differs: tuple[str, ...] = ()
    """What weft does otherwise whatever the parameters."""
    differs_given: Mapping[str, str] = field(default_factory=dict)
    """Parameter → what weft does otherwise where the recipe gives it."""


_DELTAS = {"lambda": "scale"}
_DRAW = "the random masks are weft's, the same for a seed everywhere; MergeKit's are another draw"
_RANKS = "entries of fused experts [E, out, in] are ranked within their rows; MergeKit ranks along out"
_NO_RESCALE = {"rescale": (False, "weft does not restore the L1 norm here")}

SPELLINGS: dict[str, Spelling] = {
    "linear": Spelling("linear", base="ignored"),
    "slerp": Spelling("slerp", base="model"),
    "nuslerp": Spelling("nuslerp", base="third"),
    "multislerp": Spelling("multislerp", without={
        "normalize_weights": (True, "weft's weights always sum to one"),
        "eps": (1e-8, "weft needs no epsilon")}),
    "karcher": Spelling("karcher", base="ignored", differs_given={
        "weight": "the weights count; MergeKit's karcher has none"}),
    "task_arithmetic": Spelling("task_arithmetic", _DELTAS, without=_NO_RESCALE),
    "ties": Spelling("ties", _DELTAS, without=_NO_RESCALE),
    "dare_linear": Spelling("dare", _DELTAS, differs=(_DRAW,)),
    "dare_ties": Spelling("dare_ties", _DELTAS, differs=(_DRAW,)),
    "della": Spelling("della", _DELTAS, differs=(_DRAW, _RANKS)),
    "della_linear": Spelling("della_linear", _DELTAS, differs=(_DRAW, _RANKS)),
    "breadcrumbs": Spelling("breadcrumbs", _DELTAS, without=_NO_RESCALE),
    "breadcrumbs_ties": Spelling("breadcrumbs_ties", _DELTAS, without=_NO_RESCALE),
    "sce": Spelling("sce"),
    "ram": Spelling("ram"),
    "ramplus_tl": Spelling("ram_plus"),
    "model_stock": Spelling("model_stock", {"filter_wise": "row_wise"}, differs=(
        "small task vectors have their true angle; MergeKit bounds the product of norms by 1e-6",)),
    "nearswap": Spelling("nearswap"),
    "arcee_fusion": Spelling("arcee_fusion"),
    "passthrough": Spelling("passthrough", base="ignored"),
}  # fmt: skip

PARAMETERS = frozenset({
    "weight", "density", "normalize", "rescale", "lambda", "int8_mask", "t", "gamma", "epsilon",
    "select_topk", "filter_wise", "max_iter", "tol", "eps", "normalize_weights", "nuslerp_flatten",
    "nuslerp_row_wise", "r", "alpha", "scale",
})  # fmt: skip
"""Every parameter some method of MergeKit has. It ignores those of other methods, and recipes rely on it."""


def find(name: str) -> tuple[Method, Spelling]:
    """The method a name means in either dialect; UsageError with the nearest name if there is none."""
    spelling = SPELLINGS.get(name) or Spelling(name)
    if spelling.method in METHODS:
        return METHODS[spelling.method], spelling
    if name in METHODS:
        return METHODS[name], Spelling(name)
    if name in SPELLINGS:
        raise UsageError(f"this version of weft does not have MergeKit's {name} yet")
    hint = did_you_mean(name, names()) or "; `weft methods` lists them"
    raise UsageError(f"there is no method {name!r}{hint}")


def names() -> dict[str, str]:
    """Every name a recipe may use → weft's name of the method."""
    ours = {name: own for own, made in METHODS.items() for name in (own, *made.aliases)}
    return {**ours, **{n: METHODS[s.method].name for n, s in SPELLINGS.items() if s.method in METHODS}}


def parameter_names(method: Method, spelling: Spelling) -> dict[str, str]:
    """Every spelling of a parameter in a recipe → the method's own name for it."""
    renamed = {theirs: ours for theirs, ours in spelling.rename.items() if ours in method.params}
    return {**renamed, **{n: n for n in method.params}}


def rewritten(mapping: Mapping[str, Any], spelling: Spelling) -> Mapping[str, Any]:
    """Parameters whose meaning in MergeKit hangs on one another, as weft's. Only NuSLERP has such."""
    if spelling.method != "nuslerp" or not mapping.keys() & {"nuslerp_flatten", "nuslerp_row_wise"}:
        return mapping
    rest = {k: v for k, v in mapping.items() if not k.startswith("nuslerp_")}
    flatten, columns = mapping.get("nuslerp_flatten"), mapping.get("nuslerp_row_wise")
    if flatten is None or flatten is True:
        return rest  # the whole tensor at once; row_wise says nothing then
    return {**rest, "column_wise" if columns else "row_wise": flatten is False or flatten}


def translated(parameter: Parameter, raw: Any, compat: str | None, theirs: Any) -> Any:
    """A raw value in weft's vocabulary, curves and rules leaf by leaf.

    MergeKit's `rescale: true` is weft's default way of rescaling, or with `compat` MergeKit's.
    """
    if parameter.kind != "choice" or parameter.name.rpartition(".")[2] != "rescale":
        return raw
    if isinstance(raw, bool):
        return (theirs if compat else parameter.default) if raw else "none"
    if isinstance(raw, list):
        return [translated(parameter, v, compat, theirs) for v in raw]
    if isinstance(raw, dict) and "value" in raw:
        return {**raw, "value": translated(parameter, raw["value"], compat, theirs)}
    return raw


def method_differences(
    method: Method, spelling: Spelling, params: Schedules, given: frozenset[str], compat: str | None
) -> list[str]:
    """What the method does otherwise than MergeKit's, for parameters the recipe leaves to the default."""
    told = [*spelling.differs, *(text for name, text in spelling.differs_given.items() if name in given)]
    if compat != "mergekit":
        for name, theirs in method.compat.get("mergekit", {}).items():
            parameter = method.params.get(name)
            if parameter is None or name in given or all(s.is_always(theirs) for s in params.each(name)):
                continue
            told.append(
                f"{name} is {parameter.default!r} unless given; MergeKit has {theirs!r} "
                f"(`compat: mergekit`, or {name}: {_yaml(theirs)}, reproduces it)"
            )
    return told


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def differences(recipe: Recipe) -> list[str]:
    """What weft does otherwise than MergeKit for this very recipe and those inside it.

    Nothing is said of recipes whose method is none of MergeKit's.
    """
    told: list[str] = []
    for inner in walk(recipe):
        if inner.mergekit_method is None:
            continue
        told += inner.differences
        schedules = [s for name in inner.params.by_name for s in inner.params.each(name)]
        if inner.compat is None and any(s.curved for s in schedules):
            told.append(
                "curves give the final norm and the head their last value; MergeKit gives them the first "
                "(`compat: mergekit` does, too)"
            )
        if inner.dtype is not None and inner.dtype.itemsize < 4:
            told.append(
                f"sums are taken in float32 at least and rounded to {dtype_name(inner.dtype)} once; MergeKit "
                f"computes in {dtype_name(inner.dtype)}"
            )
        if inner.config_from is not None and not any(inner.config_from == m for m in inner.models):
            told.append("base_model is not merged; MergeKit adds it to the models of this method")
        if len(set(map(_identity, inner.models))) < len(inner.models):
            told.append("a model that is listed twice counts twice; MergeKit counts it once")
    return list(dict.fromkeys(told))


def _identity(source: Any) -> Any:
    return id(source) if not isinstance(source, str) else source
