"""Section 2.2.3.1 on real experts, over three seeds each."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import pytest
import torch
from lab import UPRIGHT, World, average, random_step, score
from language import Language, loss
from torch import nn

import weft
from weft.systems.basic import slerp, task_addition, task_analogy, task_negation, weight_average


def test_the_average_of_experts_serves_all_tasks_better_than_any_of_them(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        merged = average(weight_average(world.all), tasks)
        assert merged > average(world.base, tasks) + 0.05
        assert merged > max(average(e, tasks) for e in world.all) + 0.01


def test_the_average_of_copies_is_the_model_and_order_does_not_matter(shipped: World) -> None:
    one, *others = shipped.all
    for name, tensor in weight_average([one, one, one]).state_dict().items():
        assert torch.equal(tensor, weft.load(one).tensor(name, dtype=tensor.dtype))
    there, back = weight_average([one, *others]), weight_average([*reversed(others), one])
    for name, tensor in there.state_dict().items():
        torch.testing.assert_close(tensor.float(), back.tensor(name).float(), rtol=1e-3, atol=1e-6)


def test_slerp_serves_both_tasks_of_its_ends(worlds: list[World]) -> None:
    for world in worlds:
        (first, a), (second, b) = list(world.experts.items())[:2]
        between = slerp(a, b)
        assert score(between, first) > score(b, first) + 0.1
        assert score(between, second) > score(a, second) + 0.1
        assert average(between, (first, second)) > average(world.base, (first, second)) + 0.1


def test_slerp_keeps_the_norm_where_the_chord_shortens_it() -> None:
    a, b = {"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 3.0])}
    assert slerp(a, b).tensor("w").norm() == pytest.approx(3.0)
    assert weight_average([a, b]).tensor("w").norm() == pytest.approx(3 * 0.5**0.5)
    for t, end in ((0.0, a), (1.0, b)):
        torch.testing.assert_close(slerp(a, b, t).tensor("w", dtype=torch.float32), end["w"])


def test_added_task_vectors_make_a_multi_task_model(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        merged = task_addition(world.all, world.base, scale=0.4)
        assert average(merged, tasks) > average(world.base, tasks) + 0.1
        assert average(merged, tasks) > average(random_step(world.base, merged.state_dict(), 0), tasks) + 0.1
        assert average(task_addition(world.all, world.base), tasks) > average(world.base, tasks) + 0.05


def test_a_negated_task_vector_forgets_its_task_and_a_random_one_does_not(worlds: list[World]) -> None:
    for world in worlds:
        task, expert = next(iter(world.experts.items()))
        own, control = score(world.base, task), score(world.base, UPRIGHT)
        negated = task_negation(world.base, expert, scale=0.5)
        assert score(negated, task) < own - 0.08
        assert score(negated, UPRIGHT) > 0.95 * control
        for seed in range(3):
            assert score(random_step(world.base, expert, seed), task) > own - 0.03


def test_an_analogy_solves_a_combination_that_no_model_was_trained_on(languages: list[Language]) -> None:
    # lower-case text is to upper-case text as lower-case text with underscores is to upper-case with them
    for made in languages:
        answer = task_analogy(made.base, made.lower, made.upper, made.chat)
        found = loss(answer, made.held_out.formatted_upper)
        assert found < loss(made.chat, made.held_out.formatted_upper) - 0.15
        assert found < loss(made.upper, made.held_out.formatted_upper) - 0.5
        swapped = task_analogy(made.base, made.upper, made.lower, made.chat)
        assert loss(swapped, made.held_out.formatted_upper) > found + 1


def test_an_analogy_of_a_linear_model_with_additive_factors_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    base, domain, task = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(3))

    def model(*factors: torch.Tensor) -> Mapping[str, torch.Tensor]:
        linear = nn.Linear(4, 5, bias=False, dtype=torch.float64)
        linear.weight.data = base + sum(factors)
        return copy.deepcopy(linear.state_dict())

    made = task_analogy({"weight": base}, model(), model(domain), model(task))
    torch.testing.assert_close(made.tensor("weight"), base + domain + task, rtol=0, atol=1e-12)
