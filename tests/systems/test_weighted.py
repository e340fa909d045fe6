"""Section 2.2.3.2: searched and closed-form coefficients."""

from __future__ import annotations

import pytest
import torch
from lab import World, average

from weft.systems.basic import task_addition
from weft.systems.weighted import grid_search, metagpt, metagpt_weights


def test_a_grid_search_on_validation_data_pays_on_test_data(worlds: list[World]) -> None:
    grid = (0.1, 0.3, 0.5, 0.7, 1.0)
    for world in worlds:
        tasks = list(world.experts)
        found = grid_search(
            lambda scale, w=world: task_addition(w.all, w.base, scale),
            lambda made, t=tasks: average(made, t, "validation"),
            grid,
        )
        assert found.tried.keys() == set(grid)
        assert found.score == found.tried[found.value] == max(found.tried.values())
        tested = {scale: average(task_addition(world.all, world.base, scale), tasks) for scale in grid}
        assert average(found.checkpoint, tasks) == tested[found.value] > tested[0.1] + 0.1
        assert tested[found.value] >= max(tested.values()) - 0.02


def test_a_grid_search_takes_the_smallest_of_equals(shipped: World) -> None:
    found = grid_search(lambda scale: task_addition(shipped.all, shipped.base, scale), lambda _: 1.0)
    assert found.value == 0.0 and len(found.tried) == 21


def test_metagpt_weighs_by_squared_norm_and_improves_on_the_base(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        weights = metagpt_weights(world.all, world.base)
        assert sum(weights) == pytest.approx(1.0)
        assert average(metagpt(world.all, world.base), tasks) > average(world.base, tasks) + 0.05


def test_a_task_vector_of_twice_the_length_weighs_four_times_as_much() -> None:
    base, a = {"w": torch.zeros(3), "steps": torch.tensor(7)}, torch.tensor([1.0, -2.0, 0.5])
    models = [{"w": a, "steps": torch.tensor(9)}, {"w": 2 * a, "steps": torch.tensor(9)}]
    assert metagpt_weights(models, base) == pytest.approx([0.2, 0.8])
    made = metagpt(models, base).state_dict()
    torch.testing.assert_close(made["w"], 1.8 * a)
    assert made["steps"] == 7
