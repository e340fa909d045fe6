"""Section 2.2.3.3: which entries of a task vector take part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import weft
from weft.systems import System

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint


def magnitude_trim(model: Model, base: Model, density: float = 0.2) -> Checkpoint:
    """θ0 + the largest entries of τ, over the whole model; nothing is rescaled."""
    return weft.merge([model], "magnitude", base=base, density=density, scope="model")


def ties(models: Sequence[Model], base: Model, density: float = 0.2, scale: float = 1.0) -> Checkpoint:
    """Trim over the whole model, elect signs by mass, average what agrees, times λ (1 without data)."""
    return weft.merge(models, "ties", base=base, density=density, scale=scale)


def dare(models: Sequence[Model], base: Model, density: float = 0.1, seed: int = 0) -> Checkpoint:
    """θ0 + the mean of task vectors of which a random 90 % is dropped and the rest rescaled."""
    return weft.merge(models, "dare", base=base, density=density, normalize=True, seed=seed)


def breadcrumbs(models: Sequence[Model], base: Model, scale: float = 0.3) -> Checkpoint:
    """Drop the largest 0.7 % and the smallest 85 % of each tensor's task vector, add up, times α."""
    return weft.merge(models, "breadcrumbs", base=base, scale=scale)


def tall_masks(models: Sequence[Model], base: Model, threshold: float = 0.4) -> list[Checkpoint]:
    """One model a task out of one multi-task vector; the task must be known to pick it."""
    return [
        weft.merge(models, "tall_masks", base=base, task=t, threshold=threshold) for t in range(len(models))
    ]


def consensus(models: Sequence[Model], base: Model, scale: float = 0.3, min_tasks: int = 2) -> Checkpoint:
    """θ0 + λ times the multi-task vector where at least `min_tasks` tasks need it."""
    return weft.merge(models, "consensus", base=base, scale=scale, min_tasks=min_tasks)


def emr(models: Sequence[Model], base: Model) -> list[Checkpoint]:
    """One model a task: the elected vector, that task's mask and its rescaler."""
    return [weft.merge(models, "emr", base=base, task=t) for t in range(len(models))]


TESTS = "tests/systems/test_subspace.py::"
HERE = "weft.systems.subspace:"
DARE = HERE + "dare", TESTS + "test_nine_tenths_of_an_expert_can_be_dropped_if_the_rest_is_rescaled"
"""Entry and test, of two rows."""

SYSTEMS = (
    System("M48", "Magnitude trim", "2.2.3.3", "merge", "Han et al., NeurIPS 2015, arXiv:1506.02626",
           "Keeps the largest entries of a task vector.", entry=HERE + "magnitude_trim",
           test=TESTS + "test_the_largest_entries_carry_the_task"),
    System("M49", "TIES", "2.2.3.3", "merge", "Yadav et al., NeurIPS 2023, arXiv:2306.01708",
           "Trims small entries, elects a sign for each parameter, averages the entries that have it.",
           entry=HERE + "ties", test=TESTS + "test_ties_makes_a_multi_task_model_of_agreeing_entries"),
    System("M50", "DARE", "2.2.3.3", "merge", "Yu et al., ICML 2024, arXiv:2311.03099",
           "Drops entries at random and rescales the rest, before any merger.", aliases=("S30",),
           entry=DARE[0], test=DARE[1]),
    System("M51", "Breadcrumbs", "2.2.3.3", "merge",
           "Davari & Belilovsky, ECCV 2024, arXiv:2312.06795",
           "Drops the largest and the smallest entries of each task vector, then adds up.",
           aliases=("Model Breadcrumbs",), entry=HERE + "breadcrumbs",
           test=TESTS + "test_breadcrumbs_keeps_a_seventh_and_improves_on_the_base"),
    System("M52", "TALL masks", "2.2.3.3", "merge", "Wang et al., ICML 2024, arXiv:2405.07813",
           "Finds in one multi-task vector, with one bit a parameter, what each task needs.",
           aliases=("TALL-masks",), entry=HERE + "tall_masks",
           test=TESTS + "test_tall_masks_recover_the_experts_from_one_vector"),
    System("M53", "Consensus merging", "2.2.3.3", "merge", "Wang et al., ICML 2024, arXiv:2405.07813",
           "Drops what no task, or only one, needs.", aliases=("Consensus TA",), entry=HERE + "consensus",
           test=TESTS + "test_consensus_drops_selfish_entries_and_loses_little"),
    System("M54", "EMR", "2.2.3.3", "merge", "Huang et al., NeurIPS 2024, arXiv:2405.17461",
           "Elects one vector, and keeps a mask and a scale a task.", aliases=("EMR-Merging",),
           entry=HERE + "emr", test=TESTS + "test_emr_recovers_the_experts_from_one_vector"),
    System("M55", "Concrete TA / AM", "2.2.3.3", "search", "Tang et al., 2023, arXiv:2312.06173",
           "Learns one mask over all task vectors from unlabelled data, alone or with AdaMerging's weights.",
           aliases=("Concrete subspace learning",), entry="weft.learn.masks:concrete",
           test="tests/systems/test_learned.py::"
                "test_concrete_masks_lower_interference_alone_and_with_adamerging"),
)  # fmt: skip
