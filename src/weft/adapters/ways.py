"""The ways to merge the updates of one weight, by name: functions from factors and weights to factors.

A way is exact (`concat`, `svd`), works on the factors themselves (PEFT's, LoraHub's, RobustMerge, LoRA-LEGO),
in a basis common to all (KnOTS, Core Space), or, by the name of one of weft's methods, on the products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, Literal

from weft.adapters.factors import Factors
from weft.adapters.lego import lego
from weft.adapters.peft_ways import factorwise, linear, on_factors
from weft.adapters.robust import robustmerge
from weft.adapters.spaces import BASES
from weft.errors import UsageError, did_you_mean
from weft.methods.registry import METHODS, Method

Kind = Literal["sum", "factors", "basis", "products"]

SUMS = ("concat", "svd")
FACTOR_WAYS: dict[str, Callable[..., Factors]] = {
    "linear": linear,
    "ties_factors": partial(on_factors, kind="ties"),
    "dare_linear_factors": partial(on_factors, kind="dare_linear"),
    "dare_ties_factors": partial(on_factors, kind="dare_ties"),
    "magnitude_prune_factors": partial(on_factors, kind="magnitude_prune"),
    "factorwise": factorwise,
    "robustmerge": robustmerge,
    "lego": lego,
}
EQUAL_RANKS = tuple(name for name in FACTOR_WAYS if name != "lego")
"""Ways that add A's to A's and B's to B's."""
_FILLED = ("factors", "weights", "kind", "scales", "name", "seed", "rank")
"""What the merge fills in, not the user."""


def kind_of(how: str) -> Kind:
    """What a way works on; UsageError with the nearest name if there is none."""
    if how in SUMS:
        return "sum"
    if how in FACTOR_WAYS:
        return "factors"
    if how in BASES:
        return "basis"
    if how in METHODS:
        _entrywise(METHODS[how])
        return "products"
    known = [*SUMS, *FACTOR_WAYS, *BASES, *(m for m in METHODS if METHODS[m].space == "deltas")]
    hint = did_you_mean(how, known) or f"; there are {', '.join(known)}"
    raise UsageError(f"there is no way {how!r} to merge adapters{hint}")


def _entrywise(method: Method) -> None:
    if method.space != "deltas" or any(b.step.wants_base for b in _sample(method)):
        raise UsageError(
            f"{method.name} needs the weights of whole models, and adapters have updates only: load each "
            f"adapter over its base and use weft.merge"
        )


def _sample(method: Method) -> Sequence[Any]:
    given = {n: 0 for n, p in method.params.items() if p.required}
    return method.pipeline(**given).steps


def check_factor_params(how: str, params: dict[str, Any]) -> None:
    """UsageError for a parameter that a way on factors does not have."""
    known = [n for n in signature(FACTOR_WAYS[how]).parameters if n not in _FILLED]
    for name in params:
        if name not in known:
            hint = did_you_mean(name, known) or f"; it has {', '.join(known) or 'none'}"
            raise UsageError(f"{how} has no parameter {name!r}{hint}")


def on_weight(
    how: str, factors: Sequence[Factors], weights: Sequence[float], filled: dict[str, Any],
    params: dict[str, Any],
) -> Factors:  # fmt: skip
    """One of `FACTOR_WAYS` on one weight; those of `filled` that it knows are filled in."""
    way = FACTOR_WAYS[how]
    known = signature(way).parameters
    return way(factors, weights, **{n: v for n, v in filled.items() if n in known}, **params)


def merged_in(
    nodes: Sequence[Any], base: Any, method: str, weights: Sequence[float] | None, k: int, *, seed: int,
    params: dict[str, Any],
) -> Any:  # fmt: skip
    """`weft.merge` of updates as checkpoints: products or coordinates. Lazy."""
    import weft

    made = METHODS[method]
    _entrywise(made)
    if "weight" in made.params:
        params = {"weight": list(weights) if weights is not None else [1 / k] * k, **params}
    elif weights is not None:
        raise UsageError(f"{method} has no weights; leave them out")
    return weft.merge(nodes, method, base=base, seed=seed, **params)
