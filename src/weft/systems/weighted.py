"""Section 2.2.3.2: who chooses the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import weft
from weft.systems import System

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint
    from weft.search.result import Result

GRID = tuple(round(0.05 * i, 2) for i in range(21))
"""0 to 1 by 0.05, the task arithmetic paper's."""


@dataclass(frozen=True)
class Choice:
    """What a grid search found."""

    value: float
    score: float
    checkpoint: Checkpoint
    tried: Mapping[float, float]
    """Every value's score."""


def grid_search(
    make: Callable[[float], Checkpoint], score: Callable[[Checkpoint], float], grid: Sequence[float] = GRID
) -> Choice:
    """The value of one coefficient whose merge scores highest; the smallest, where several do.

    `make(value)` is a lazy merge and costs nothing until `score` reads it. Score on validation data, never
    on what the result is reported on.
    """
    tried = {value: score(make(value)) for value in sorted(grid)}
    best = max(tried, key=lambda value: (tried[value], -value))
    return Choice(best, tried[best], make(best), tried)


def evolved_parameters(
    models: Sequence[Model],
    base: Model,
    score: Callable[[Checkpoint], float],
    *,
    validation: str,
    points: int = 4,
    trials: int = 200,
    seed: int = 0,
    **how: Any,
) -> Result:
    """DARE-TIES whose weight and density, a curve of `points` over the blocks for each model, CMA-ES evolves.

    Starts in the middle of the ranges with a sixth of them as standard deviation, as the paper does. The seed
    of the random masks stays, so that a candidate's score is its own. `score` is maximised, on the data that
    `validation` names; `how` goes to `weft.search`.
    """
    from weft.search.run import search

    known = {f"m{i}": weft.load(m) for i, m in enumerate(models)} | {"base": weft.load(base)}
    recipe = {
        "merge_method": "dare_ties", "base_model": "base", "seed": seed, "parameters": {"normalize": False},
        "models": [{"model": f"m{i}", "parameters": {"weight": 0.5, "density": 0.5}} for i in range(len(models))],
    }  # fmt: skip
    space = {
        "models[*].parameters.weight": {"low": 0.0, "high": 1.0, "curve": points},
        "models[*].parameters.density": {"low": 0.05, "high": 1.0, "curve": points},
    }
    return search(recipe, space, score, validation=validation, sampler="cmaes", trials=trials, seed=seed,
                  loader=lambda ref: known[str(ref)], **how)  # fmt: skip


def evolved_layers(
    models: Sequence[Model],
    score: Callable[[Checkpoint], float],
    *,
    validation: str,
    repeats: int = 1,
    scales: bool = True,
    trials: int = 200,
    seed: int = 0,
    **how: Any,
) -> Result:
    """The path through the layers of all models, and the scales along it, that CMA-ES finds best.

    Slots and scales are those of `weft.search.flow`. The models as they are come first, so the winner is at least
    as good as the best of them on the validation data. `score` is maximised.
    """
    from weft.search.flow import flow, slots
    from weft.search.run import search

    listed = slots([weft.load(m) for m in models], repeats)
    space: dict[str, Any] = {"use": {"low": -1.0, "high": 1.0, "curve": len(listed)}}
    if scales:
        space["scale"] = {"low": 0.5, "high": 1.5, "curve": len(listed)}
    owners = [source.model for source, _ in listed.picks]
    starts = []
    for model in dict.fromkeys(owners):
        first = next(t for t, o in enumerate(owners) if o is model)
        count = sum(o is model for o in owners) // repeats
        alone = [0.5 if first <= t < first + count else -0.5 for t in range(len(listed))]
        starts.append({"use": alone} | ({"scale": 1.0} if scales else {}))
    return search(
        lambda values: flow(listed, values["use"], values.get("scale")), space, score, validation=validation,
        sampler="cmaes", trials=trials, seed=seed, start=starts, **how,
    )  # fmt: skip


def merged_checkpoints(
    earlier: Model,
    later: Model,
    score: Callable[[Checkpoint], float],
    *,
    validation: str,
    low: float = 0.5,
    trials: int = 12,
    seed: int = 0,
    **how: Any,
) -> Result:
    """λ θ_t + (1−λ) θ_{t−1} of two neighbouring checkpoints of a run; a Gaussian process proposes λ ∈ [low, 1].

    λ = low and λ = 1 are tried first, so the winner is never worse than the later checkpoint on the validation
    data. `score` is maximised. The paper hedges between three acquisition functions; this is Optuna's one
    (logarithm of expected improvement).
    """
    from weft.search.run import search
    from weft.search.sampling import Sampler

    before, after = weft.load(earlier), weft.load(later)
    return search(
        lambda values: weft.merge([after, before], "linear", weight=[values["λ"], 1.0 - values["λ"]]),
        {"λ": {"low": low, "high": 1.0}}, score, validation=validation, sampler=Sampler("gp", startup=4),
        trials=trials, seed=seed, start=[{"λ": low}, {"λ": 1.0}], **how,
    )  # fmt: skip


def metagpt_weights(models: Sequence[Model], base: Model) -> list[float]:
    """λₜ = ‖τₜ‖² / Σ ‖τ‖², over all tensors; reads every model once, tensor by tensor."""
    start = weft.load(base)
    squares = []
    for model in models:
        delta = weft.load(model) - start
        floating = (n for n, i in delta.tensors.items() if i.dtype.is_floating_point)
        squares.append(sum(float(delta.tensor(n).double().square().sum()) for n in floating))
    total = sum(squares) or 1.0
    return [s / total for s in squares]


def metagpt(models: Sequence[Model], base: Model) -> Checkpoint:
    """θ0 + Σ λₜτₜ with MetaGPT's closed-form coefficients: no data, no search."""
    return weft.merge(models, "task_arithmetic", base=base, weight=metagpt_weights(models, base))


TESTS = "tests/systems/test_weighted.py::"
METAGPT = (
    "weft.systems.weighted:metagpt",
    TESTS + "test_metagpt_weighs_by_squared_norm_and_improves_on_the_base",
)
"""Entry and test, of two rows."""
SEARCHED = "tests/systems/test_search.py::"
EVOLVED = (
    "weft.systems.weighted:evolved_parameters",
    SEARCHED + "test_evolved_curves_beat_the_best_single_weight",
)
CHECKPOINTS = (
    "weft.systems.weighted:merged_checkpoints",
    SEARCHED + "test_twelve_evaluations_find_what_a_fine_grid_finds",
)

MEASURED = "tests/systems/test_statistics.py::"
LEARNED = "tests/systems/test_learned.py::"

SYSTEMS = (
    System("M35", "Grid search", "2.2.3.2", "search", "folklore; e.g. Ilharco et al., arXiv:2212.04089",
           "Tries every coefficient of a grid on validation data.", entry="weft.systems.weighted:grid_search",
           test=TESTS + "test_a_grid_search_on_validation_data_pays_on_test_data"),
    System("M36", "Evolutionary PS", "2.2.3.2", "search", "Akiba et al., 2024, arXiv:2403.13187",
           "Evolves density and weight of every layer (CMA-ES) for a task's metric.",
           aliases=("S27",), entry=EVOLVED[0], test=EVOLVED[1]),
    System("M37", "Evolutionary DFS", "2.2.3.2", "search", "Akiba et al., 2024, arXiv:2403.13187",
           "Evolves the order in which the layers of several models are run.",
           entry="weft.systems.weighted:evolved_layers",
           test=SEARCHED + "test_an_evolved_path_serves_both_tasks_better_than_either_model"),
    System("M38", "Checkpoint merging (BO)", "2.2.3.2", "search", "Liu et al., 2024, arXiv:2403.19390",
           "Weighs two neighbouring checkpoints of one training run by Bayesian optimisation.",
           aliases=("S22",), entry=CHECKPOINTS[0], test=CHECKPOINTS[1]),
    System("M39", "AdaMerging task-wise", "2.2.3.2", "search", "Yang et al., ICLR 2024, arXiv:2310.02575",
           "Learns one coefficient a task by minimising the entropy of outputs on unlabelled data.",
           entry="weft.learn.adaptive:adamerging",
           test=LEARNED + "test_task_wise_adamerging_finds_by_entropy_what_labels_would_choose"),
    System("M40", "AdaMerging layer-wise, ++", "2.2.3.2", "search",
           "Yang et al., ICLR 2024, arXiv:2310.02575",
           "The same with one coefficient a task and tensor; ++ starts from TIES-trimmed vectors.",
           entry="weft.learn.adaptive:adamerging",
           test=LEARNED + "test_layer_wise_adamerging_does_so_for_every_tensor_also_of_elected_vectors"),
    System("M41", "MetaGPT", "2.2.3.2", "merge", "Zhou et al., EMNLP 2024, arXiv:2406.11385",
           "Weighs each task vector by its share of the squared norms.", aliases=("S32",),
           entry=METAGPT[0], test=METAGPT[1]),
    System("M42", "aTLAS", "2.2.3.2", "search", "Zhang et al., NeurIPS 2024",
           "Learns one coefficient a task vector and block of parameters from few labels.",
           entry="weft.learn.adaptive:atlas",
           test=LEARNED + "test_atlas_uses_few_labels_better_than_one_scale_for_all"),
    System("M43", "RegMean", "2.2.3.2", "merge", "Jin et al., ICLR 2023, arXiv:2212.09849",
           "Solves for the linear layers whose outputs differ least from every model's on its own inputs.",
           entry="weft.methods.regmean:regmean",
           test=MEASURED + "test_regression_on_inputs_needs_no_labels_and_comes_close_to_the_experts"),
    System("M44", "Fisher merging", "2.2.3.2", "merge",
           "Matena & Raffel, NeurIPS 2022, arXiv:2111.09832",
           "A mean of weights in which each counts as much as the output depends on it.",
           entry="weft.methods.fisher:fisher",
           test=MEASURED + "test_fisher_information_says_whose_weights_to_take"),
    System("M45", "Fisher-nodes", "2.2.3.2", "merge", "Thennal et al., LREC-COLING 2024",
           "Fisher merging with the information of masks over heads and neurons.",
           entry="weft.methods.fisher:fisher_nodes",
           test=MEASURED + "test_fisher_information_of_masks_improves_the_average_for_less"),
    System("M46", "MaTS", "2.2.3.2", "merge", "Tam et al., TMLR 2024",
           "Matches models in their task subspaces by solving a linear system with conjugate gradients.",
           entry="weft.methods.mats:mats",
           test=MEASURED + "test_matching_in_task_subspaces_beats_averaging_by_the_diagonal"),
    System("M47", "UBGM (Daheim)", "2.2.3.2", "merge", "Daheim et al., ICLR 2024",
           "Weighs task vectors by Hessians so that the gradients of the joint and single losses agree.",
           entry="weft.methods.ubgm:ubgm", test=MEASURED + "test_gradient_matching_needs_no_scale"),
)  # fmt: skip
