"""Section 2.4.1: sequences of tasks, patches, cocktails."""

from __future__ import annotations

import pytest
import torch
from lab import UPRIGHT, World, as_network, average, score, tuned
from torch.nn import functional as F

import weft
from weft.demo.network import DigitNet
from weft.demo.tasks import TASKS, examples
from weft.systems.basic import weight_average
from weft.systems.continual import lm_cocktail, magmax, paint


def test_largest_changes_of_a_sequence_beat_the_mean_of_independent_experts(
    bases: dict[int, DigitNet],
) -> None:
    tasks = ("rotated", "mirrored", "swapped")
    for seed, base in bases.items():
        sequence, independent, last = [], [], base
        for i, task in enumerate(tasks):
            last = tuned(last, examples(task, "train"), seed + i, epochs=6)
            sequence.append(last)
            independent.append(tuned(base, examples(task, "train"), seed + i, epochs=6))
        merged = average(magmax(sequence, base), tasks)
        assert merged > average(weight_average(independent), tasks) + 0.03
        assert merged > average(magmax(independent, base), tasks) + 0.03
        assert merged > average(base, tasks) + 0.1


def test_magmax_can_keep_one_running_vector(shipped: World) -> None:
    whole = magmax(shipped.all, shipped.base, scale=1.0)
    start = weft.load(shipped.base)
    for name in start:
        running = torch.zeros(start.info(name).shape, dtype=torch.float64)
        for model in shipped.all:
            delta = weft.load(model).tensor(name).double() - start.tensor(name).double()
            running = torch.where(delta.abs() >= running.abs(), delta, running)
        expected = (start.tensor(name).double() + running).to(torch.float16)
        assert torch.equal(whole.tensor(name, dtype=torch.float16), expected)


def test_two_point_interpolation_passes_between_its_ends(worlds: list[World]) -> None:
    for world in worlds:
        task, expert = next(iter(world.experts.items()))
        path = [
            score(weft.merge([expert], "wise_ft", base=world.base, alpha=a), task)
            for a in (0.0, 0.25, 0.5, 0.75, 1.0)
        ]
        assert path[0] == pytest.approx(score(world.base, task), abs=0.005)
        assert path[-1] == pytest.approx(score(expert, task), abs=0.005)
        assert path == sorted(path), "no barrier between a model and its fine-tune"
        assert path[2] > (path[0] + path[-1]) / 2, "half the way is more than half the gain"


def test_paint_patches_a_task_and_keeps_what_was_supported(shipped: World) -> None:
    gains = []
    for task in ("rotated", "mirrored", "interleaved"):
        expert, both = shipped.experts[task], (task, UPRIGHT)
        found = paint(
            shipped.base, expert, patch=lambda m, t=task: score(m, t, "validation"),
            supported=lambda m: score(m, UPRIGHT, "validation"), grid=[i / 10 for i in range(11)],
        )  # fmt: skip
        before, after = score(shipped.base, task), score(expert, task)
        kept = score(shipped.base, UPRIGHT)
        assert 0 < found.value < 1
        assert score(found.checkpoint, task) - before > 0.6 * (after - before)
        assert score(found.checkpoint, UPRIGHT) > max(kept - 0.07, score(expert, UPRIGHT) + 0.01)
        ends = max(average(shipped.base, both), average(expert, both))
        gains.append(average(found.checkpoint, both) - ends)
        # some way between, most of the task costs at most one point of what was supported
        between = [weft.merge([expert], "wise_ft", base=shipped.base, alpha=a) for a in (0.4, 0.5)]
        assert any(
            score(m, task) - before > 0.6 * (after - before) and score(m, UPRIGHT) > kept - 0.0101
            for m in between
        )
    assert min(gains) > 0 and sum(gains) / len(gains) > 0.01


def losses_on(models: list[object], task: str, n: int = 5) -> list[float]:
    """Cross-entropy of each model on the first few validation examples of the task."""
    inputs, labels = (v[:n] for v in examples(task, "validation"))
    with torch.inference_mode():
        return [float(F.cross_entropy(as_network(m)(inputs), labels)) for m in models]


@pytest.mark.parametrize("task", TASKS)
def test_a_cocktail_keeps_general_accuracy_and_most_of_the_target(shipped: World, task: str) -> None:
    expert = shipped.experts[task]
    others = [shipped.base, *(e for t, e in shipped.experts.items() if t != task)]
    made = lm_cocktail(others, losses_on(others, task), expert)
    everything = (*TASKS, UPRIGHT)
    assert average(made, everything) > average(expert, everything) + 0.01
    gain = score(expert, task) - score(shipped.base, task)
    assert score(made, task) > score(shipped.base, task) + 0.5 * gain


def test_a_cocktails_temperature_goes_from_the_best_model_to_all_of_them() -> None:
    models = [{"w": torch.tensor([float(i == j) for j in range(3)])} for i in range(3)]
    tuned_model = {"w": torch.zeros(3)}
    for temperature, expected in ((1e-3, [0.0, 1.0, 0.0]), (1e6, [1 / 3] * 3)):
        made = lm_cocktail(models, [2.0, 1.0, 3.0], tuned_model, alpha=0.0, temperature=temperature)
        torch.testing.assert_close(made.tensor("w", dtype=torch.float32), torch.tensor(expected))
    shares = lm_cocktail(models, [2.0, 1.0, 3.0], tuned_model).tensor("w")
    assert shares.argsort(descending=True).tolist() == [1, 0, 2], "the less loss, the more weight"
    assert shares.sum() == pytest.approx(0.5)
