"""Section 2.2.3.3 on real experts. Nothing here demands that sparse mergers beat task arithmetic."""

from __future__ import annotations

import pytest
import torch
from lab import World, average, score

import weft
from weft.systems.basic import task_addition
from weft.systems.subspace import breadcrumbs, consensus, dare, emr, magnitude_trim, tall_masks, ties


def one(world: World) -> tuple[str, object]:
    """A task and its expert."""
    return next(iter(world.experts.items()))


def changed(made: weft.Checkpoint, base: object) -> dict[str, float]:
    """Fraction of each tensor's entries that differ from the base's."""
    delta = made - weft.load(base)
    return {n: float((delta.tensor(n) != 0).double().mean()) for n in delta}


def test_the_largest_entries_carry_the_task(worlds: list[World]) -> None:
    for world in worlds:
        task, expert = one(world)
        full, start = score(expert, task), score(world.base, task)
        assert score(magnitude_trim(expert, world.base, density=0.5), task) > full - 0.04
        largest = score(magnitude_trim(expert, world.base), task)
        at_random = score(weft.merge([expert], "dare", base=world.base, density=0.2, rescale="none"), task)
        assert largest > at_random + 0.05 and largest > start + 0.1


def test_ties_makes_a_multi_task_model_of_agreeing_entries(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        assert average(ties(world.all, world.base), tasks) > average(world.base, tasks) + 0.03
        untrimmed = average(ties(world.all, world.base, density=1.0), tasks)
        assert untrimmed > max(average(e, tasks) for e in world.all) + 0.04


def test_ties_by_hand() -> None:
    base = {"w": torch.zeros(5)}
    models = [
        {"w": torch.tensor([5.0, 4.0, 0.1, 0.0, 0.0])},
        {"w": torch.tensor([3.0, -6.0, 0.0, 0.2, 0.0])},
        {"w": torch.tensor([-1.0, 1.5, 0.0, 0.0, 0.3])},
    ]
    # two of five kept each; signs +, −; the mean is over those that agree
    made = ties(models, base, density=0.4).tensor("w", dtype=torch.float32)
    torch.testing.assert_close(made, torch.tensor([4.0, -6.0, 0.0, 0.0, 0.0]))


def test_nine_tenths_of_an_expert_can_be_dropped_if_the_rest_is_rescaled(worlds: list[World]) -> None:
    for world in worlds:
        task, expert = one(world)
        full, start = score(expert, task), score(world.base, task)
        for seed in range(2):
            kept = dare([expert], world.base, seed=seed)
            assert score(kept, task) > full - 0.05
            bare = weft.merge([expert], "dare", base=world.base, density=0.1, rescale="none", seed=seed)
            assert score(bare, task) < start + 0.15 < score(kept, task)
        share = changed(dare([expert], world.base), world.base)["layers.1.weight"]
        assert share == pytest.approx(0.1, abs=0.01)
        tasks = list(world.experts)
        assert average(dare(world.all, world.base), tasks) > average(world.base, tasks) + 0.04


def test_breadcrumbs_keeps_a_seventh_and_improves_on_the_base(worlds: list[World]) -> None:
    for world in worlds:
        tasks, expert = list(world.experts), one(world)[1]
        assert average(breadcrumbs(world.all, world.base), tasks) > average(world.base, tasks) + 0.01
        assert average(breadcrumbs(world.all, world.base, 1.0), tasks) > average(world.base, tasks) + 0.03
        base32 = {n: t.double() for n, t in weft.load(world.base).state_dict().items()}
        expert32 = {n: t.double() for n, t in weft.load(expert).state_dict().items()}
        kept = breadcrumbs([expert32], base32, scale=1.0) - weft.load(base32)
        n = kept.tensor("layers.1.weight").numel()
        survivors = int((kept.tensor("layers.1.weight") != 0).sum())
        assert survivors == pytest.approx(int(0.143 * n), rel=0.02)  # entries of one size are all kept
        delta = (expert32["layers.1.weight"] - base32["layers.1.weight"]).abs().flatten()
        assert kept.tensor("layers.1.weight").abs().max() < delta.max()


def test_tall_masks_recover_the_experts_from_one_vector(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        made = tall_masks(world.all, world.base)
        merged = task_addition(world.all, world.base, scale=0.4)
        for task, model in zip(tasks, made, strict=True):
            assert score(model, task) > 0.94 * score(world.experts[task], task)
            assert score(model, task) > score(merged, task) + 0.03
    alone = tall_masks(shipped_one := [worlds[0].all[0]], worlds[0].base)[0]
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(tensor, weft.load(shipped_one[0]).tensor(name, dtype=tensor.dtype))


def test_consensus_drops_selfish_entries_and_loses_little(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        made, full = consensus(world.all, world.base, 0.4), task_addition(world.all, world.base, 0.4)
        assert 0.3 < changed(made, world.base)["layers.1.weight"] < 0.95
        assert average(made, tasks) > average(world.base, tasks) + 0.08
        assert average(made, tasks) > average(full, tasks) - 0.08
        none = consensus(world.all, world.base, min_tasks=len(tasks) + 1)
        assert all(v == 0 for v in changed(none, world.base).values())


def test_emr_recovers_the_experts_from_one_vector(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        merged = task_addition(world.all, world.base, scale=0.4)
        for task, model in zip(tasks, emr(world.all, world.base), strict=True):
            assert score(model, task) > 0.93 * score(world.experts[task], task)
            assert score(model, task) > score(merged, task) + 0.03
