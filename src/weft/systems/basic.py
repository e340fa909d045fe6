"""Section 2.2.3.1: averages, spheres, and arithmetic on task vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import weft
from weft.systems import System

if TYPE_CHECKING:
    from weft.api import Model
    from weft.checkpoints.base import Checkpoint


def weight_average(models: Sequence[Model], weight: float | Sequence[float] = 1.0) -> Checkpoint:
    """Σ wᵢθᵢ / Σ wᵢ."""
    return weft.merge(models, "linear", weight=weight)


def slerp(a: Model, b: Model, t: float = 0.5) -> Checkpoint:
    """Turn `a` towards `b` by a fraction t of the angle between them, tensor by tensor."""
    return weft.merge([a, b], "slerp", t=t)


def task_addition(models: Sequence[Model], base: Model, scale: float = 0.3) -> Checkpoint:
    """θ0 + λ Σ τᵢ. Choose λ on validation data; 0.3 is customary for eight tasks, 0.4 to 0.5 for few."""
    return weft.merge(models, "task_arithmetic", base=base, scale=scale)


def task_negation(base: Model, model: Model, scale: float = 1.0) -> Checkpoint:
    """θ0 − λτ: the base without what `model` has learned."""
    start = weft.load(base)
    return start - (weft.load(model) - start) * scale


def task_analogy(base: Model, a: Model, b: Model, c: Model, scale: float = 1.0) -> Checkpoint:
    """θ0 + λ(τc + τb − τa): what stands to c as b stands to a. All four share the base."""
    start, *known = (weft.load(m) for m in (base, a, b, c))
    ta, tb, tc = (m - start for m in known)
    return start + (tc + (tb - ta)) * scale


ARITHMETIC = "Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv:2212.04089"
TESTS = "tests/systems/test_basic.py::"

SYSTEMS = (
    System("M29", "Weight averaging", "2.2.3.1", "merge",
           "Utans, AAAI workshop 1996; Wortsman et al., arXiv:2203.05482",
           "The (weighted) mean of the weights.", aliases=("linear", "uniform soup"),
           entry="weft.systems.basic:weight_average",
           test=TESTS + "test_the_average_of_experts_serves_all_tasks_better_than_any_of_them"),
    System("M30", "SLERP", "2.2.3.1", "merge", "Shoemake, SIGGRAPH 1985",
           "Interpolates along the arc between two models instead of the chord.",
           entry="weft.systems.basic:slerp", test=TESTS + "test_slerp_serves_both_tasks_of_its_ends"),
    System("M31", "TA addition", "2.2.3.1", "merge", ARITHMETIC,
           "Adds several task vectors to the base: one model for all tasks.", aliases=("task_arithmetic",),
           entry="weft.systems.basic:task_addition",
           test=TESTS + "test_added_task_vectors_make_a_multi_task_model"),
    System("M32", "TA negation", "2.2.3.1", "merge", ARITHMETIC,
           "Subtracts a task vector: the model forgets that task and little else.",
           entry="weft.systems.basic:task_negation",
           test=TESTS + "test_a_negated_task_vector_forgets_its_task_and_a_random_one_does_not"),
    System("M33", "TA analogy", "2.2.3.1", "merge", ARITHMETIC,
           "A is to B as C is to D: makes a model for D out of those for A, B and C.",
           entry="weft.systems.basic:task_analogy",
           test=TESTS + "test_an_analogy_solves_a_combination_that_no_model_was_trained_on"),
    System("M34", "PEM composition", "2.2.3.1", "merge", "Zhang et al., NeurIPS 2023, arXiv:2306.14870",
           "Adds and negates adapters (LoRA, (IA)3) in their own parameters.", aliases=("S11",),
           entry="weft.adapters.arithmetic:Combined",
           test="tests/systems/test_adapters.py::test_adapters_add_and_negate_as_lora_and_as_ia3"),
)  # fmt: skip
