"""LoraHub: weights for a library of adapters, found without gradients on a few examples.

Huang et al., COLM 2024, arXiv:2307.13269. Minimise over w ∈ [−1.5, 1.5]ᵏ

    L(merge(w)) + 0.05 · mean |wᵢ|

from w = 0, in few evaluations. The authors add factors, Â = Σ wᵢAᵢ and B̂ = Σ wᵢBᵢ (`how="factorwise"`: equal ranks,
cross-terms, quadratic in w); `how="svd"` or `"concat"` searches the exact sum instead. The authors use Nevergrad's
NGOpt, this CMA-ES (optuna).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from weft.adapters.factors import Adapter, as_adapter
from weft.adapters.merge import Source, merge_adapters
from weft.adapters.output import AdapterCheckpoint
from weft.errors import MissingExtra, UsageError


@dataclass(frozen=True)
class Hub:
    """What a search found."""

    weights: list[float]
    loss: float
    """The user's loss at these weights, without the penalty."""
    adapter: AdapterCheckpoint
    """The merge with these weights."""
    tried: list[tuple[list[float], float]]
    """Weights and loss of every evaluation, in order."""


def lorahub(
    adapters: Sequence[Source],
    loss: Callable[[AdapterCheckpoint], float],
    *,
    how: str = "factorwise",
    budget: int = 40,
    bound: float = 1.5,
    penalty: float = 0.05,
    start: Sequence[Sequence[float]] = (),
    seed: int = 0,
    **merging: Any,
) -> Hub:
    """Search the weights of `adapters` that make `loss(merged adapter)` small, in `budget` evaluations.

    The first is w = 0 (the base alone), then those of `start`. A loss that is not finite counts as the worst.
    The loss must be of validation data; report another split. `merging` goes to `merge_adapters`.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtra("optuna", "search", "LoraHub") from None
    found: list[Adapter] = [as_adapter(a) for a in adapters]
    k = len(found)
    if k < 1 or budget < 1 + len(start):
        raise UsageError(f"a search over {k} adapters in {budget} evaluations cannot be meant")
    if any(len(w) != k for w in start):
        raise UsageError(f"every start must have {k} weights")

    def merged(weights: Sequence[float]) -> AdapterCheckpoint:
        return merge_adapters(found, list(weights), how=how, seed=seed, **merging)

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    names = [f"w{i}" for i in range(k)]
    # it starts in the middle of the ranges, which is 0, with a standard deviation of a third of the bound
    sampler = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    study = optuna.create_study(sampler=sampler)
    for first in ([0.0] * k, *start):
        study.enqueue_trial(dict(zip(names, first)))
    tried: list[tuple[list[float], float]] = []
    best, least = 0, float("inf")
    for _ in range(budget):
        trial = study.ask()
        weights = [trial.suggest_float(n, -bound, bound) for n in names]
        value = float(loss(merged(weights)))
        whole = value + penalty * sum(map(abs, weights)) / k
        if not isfinite(whole):
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, whole)
            if whole < least:
                best, least = len(tried), whole
        tried.append((weights, value))
    if least == float("inf"):
        raise UsageError("the loss was finite for none of the weights tried; mend it")
    weights, value = tried[best]
    return Hub(weights, value, merged(weights), tried)
