"""Section 2.2.3.2: who chooses the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import weft
from weft.systems import System

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint

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

SYSTEMS = (
    System("M35", "Grid search", "2.2.3.2", "search", "folklore; e.g. Ilharco et al., arXiv:2212.04089",
           "Tries every coefficient of a grid on validation data.", entry="weft.systems.weighted:grid_search",
           test=TESTS + "test_a_grid_search_on_validation_data_pays_on_test_data"),
    System("M36", "Evolutionary PS", "2.2.3.2", "search", "Akiba et al., 2024, arXiv:2403.13187",
           "Evolves density and weight of every layer (CMA-ES) for a task's metric."),
    System("M37", "Evolutionary DFS", "2.2.3.2", "search", "Akiba et al., 2024, arXiv:2403.13187",
           "Evolves the order in which the layers of several models are run."),
    System("M38", "Checkpoint merging (BO)", "2.2.3.2", "search", "Liu et al., 2024, arXiv:2403.19390",
           "Weighs two neighbouring checkpoints of one training run by Bayesian optimisation.",
           aliases=("S22",)),
    System("M39", "AdaMerging task-wise", "2.2.3.2", "search", "Yang et al., ICLR 2024, arXiv:2310.02575",
           "Learns one coefficient a task by minimising the entropy of outputs on unlabelled data."),
    System("M40", "AdaMerging layer-wise, ++", "2.2.3.2", "search",
           "Yang et al., ICLR 2024, arXiv:2310.02575",
           "The same with one coefficient a task and tensor; ++ starts from TIES-trimmed vectors."),
    System("M41", "MetaGPT", "2.2.3.2", "merge", "Zhou et al., EMNLP 2024, arXiv:2406.11385",
           "Weighs each task vector by its share of the squared norms.", aliases=("S32",),
           entry=METAGPT[0], test=METAGPT[1]),
    System("M42", "aTLAS", "2.2.3.2", "search", "Zhang et al., NeurIPS 2024",
           "Learns one coefficient a task vector and block of parameters from few labels."),
    System("M43", "RegMean", "2.2.3.2", "merge", "Jin et al., ICLR 2023, arXiv:2212.09849",
           "Solves for the linear layers whose outputs differ least from every model's on its own inputs."),
    System("M44", "Fisher merging", "2.2.3.2", "merge",
           "Matena & Raffel, NeurIPS 2022, arXiv:2111.09832",
           "A mean of weights in which each counts as much as the output depends on it."),
    System("M45", "Fisher-nodes", "2.2.3.2", "merge", "Thennal et al., LREC-COLING 2024",
           "Fisher merging with the information of masks over heads and neurons."),
    System("M46", "MaTS", "2.2.3.2", "merge", "Tam et al., TMLR 2024",
           "Matches models in their task subspaces by solving a linear system with conjugate gradients."),
    System("M47", "UBGM (Daheim)", "2.2.3.2", "merge", "Daheim et al., ICLR 2024",
           "Weighs task vectors by Hessians so that the gradients of the joint and single losses agree."),
)  # fmt: skip
