"""Coefficients chosen by gradient, on real experts: what each method sees, and what it gains by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from lab import Data, World, average, score, tuned
from torch import Tensor
from torch.nn import functional as F

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet
from weft.demo.tasks import Split, examples
from weft.learn import Blocks, Learned, adamerging, atlas, concrete, learned_soup, mehl_soup, twa
from weft.learn.adaptive import elected

TASK = "mirrored"


def inputs(world: World, split: Split, n: int | None = None) -> dict[str, Tensor]:
    """Images of every task, without labels."""
    return {t: examples(t, split)[0][:n] for t in world.experts}


def labelled(world: World, split: Split, n: int) -> Data:
    """`n` labelled images of every task, together."""
    parts = [examples(t, split) for t in world.experts]
    return torch.cat([x[:n] for x, _ in parts]), torch.cat([y[:n] for _, y in parts])


def added(world: World, scale: float, vectors: Sequence[object] | None = None) -> Checkpoint:
    """Task arithmetic, of the experts or of others."""
    return weft.merge(vectors or world.all, "task_arithmetic", base=world.base, scale=scale)  # type: ignore[arg-type]


def best_sum(world: World, split: Split = "validation") -> Checkpoint:
    """Task arithmetic whose one λ, of a grid, is the best on labelled data."""
    tasks = tuple(world.experts)
    return max((added(world, i / 10) for i in range(1, 13)), key=lambda m: average(m, tasks, split))


def entropy_on(model: object, data: Mapping[str, Tensor]) -> float:
    """Mean entropy of the outputs."""
    net = as_network(model)  # type: ignore[arg-type]
    with torch.no_grad():
        logs = [net(x).log_softmax(-1) for x in data.values()]
    return sum(float(-(q.exp() * q).sum(-1).mean()) for q in logs) / len(logs)


def loss_on(model: object, data: Data) -> float:
    """Cross-entropy."""
    with torch.no_grad():
        return float(F.cross_entropy(as_network(model)(data[0]), data[1]))  # type: ignore[arg-type]


def accuracy(world: World, model: object) -> float:
    return average(model, tuple(world.experts))  # type: ignore[arg-type]


def adapted(world: World, split: Split, **settings: object) -> Learned:
    """AdaMerging on a split's images."""
    data = inputs(world, split)
    return adamerging(
        DigitNet(), world.base, world.all, data, tasks=list(data), steps=100, lr=3e-3,
        split="test-time" if split == "test" else split, **settings,
    )  # type: ignore[arg-type]  # fmt: skip


def test_task_wise_adamerging_finds_by_entropy_what_labels_would_choose(worlds: list[World]) -> None:
    for world in worlds:
        start, best = accuracy(world, added(world, 0.3)), accuracy(world, best_sum(world))
        for split in ("test", "validation"):
            found = adapted(world, split, parts="model")  # type: ignore[arg-type]
            made = found.checkpoint()
            data = inputs(world, split)  # type: ignore[arg-type]
            assert found.test_time is (split == "test")
            assert list(found.coefficients) == ["all"] and len(found.coefficients["all"]) == len(data)
            assert entropy_on(made, data) < entropy_on(added(world, 0.3), data) - 0.1
            reached = accuracy(world, made)
            assert reached > start + 0.05
            assert reached > best - 0.04


def test_layer_wise_adamerging_does_so_for_every_tensor_also_of_elected_vectors(
    worlds: list[World],
) -> None:
    for world in worlds:
        data = inputs(world, "validation")
        for plus in (False, True):
            vectors = elected(world.base, world.all) if plus else None
            start = added(world, 0.3, vectors)
            found = adapted(world, "validation", plus=plus)
            made = found.checkpoint()
            assert len(found.coefficients) == 8  # tensors, each with one a task
            spread = torch.stack(list(found.coefficients.values())).std(0)
            assert float(spread.min()) > 1e-3
            assert entropy_on(made, data) < entropy_on(start, data) - 0.04
            assert accuracy(world, made) > accuracy(world, start) + 0.015


def test_atlas_uses_few_labels_better_than_one_scale_for_all(worlds: list[World]) -> None:
    gains = []
    for world in worlds:
        few = labelled(world, "validation", 32)
        best = accuracy(world, best_sum(world))  # one λ, chosen on all validation labels
        by_tensor = atlas(DigitNet(), world.base, world.all, few, steps=100)
        by_block = atlas(DigitNet(), world.base, world.all, few, parts=Blocks(8), steps=100)
        assert by_block.split == "few-shot" and not by_block.test_time
        assert min(float(c.min()) for c in by_tensor.coefficients.values()) < 0.3  # free, and far apart
        gains.append([accuracy(world, f.checkpoint()) - best for f in (by_tensor, by_block)])
    for found in zip(*gains, strict=True):
        assert min(found) > 0 and sum(found) / len(found) > 0.008
    assert gains[0][1] > gains[0][0] + 0.02  # five tasks are crowded: finer parts help


def test_concrete_masks_lower_interference_alone_and_with_adamerging(worlds: list[World]) -> None:
    """With three experts; five of them this small network confuses, and entropy falls for the wrong reason."""
    for world in worlds[1:]:
        data = inputs(world, "test")

        def learned(steps: int, world: World = world, data: object = data, **settings: object) -> Checkpoint:
            found = concrete(
                DigitNet(), world.base, world.all, data, tasks=list(world.experts), steps=steps, lr=0.1,
                **settings,
            )  # type: ignore[arg-type]  # fmt: skip
            assert found.test_time
            return found.checkpoint()

        random, mask = learned(0, scale=0.5), learned(100, scale=0.5)
        assert entropy_on(mask, data) < entropy_on(random, data) - 0.3
        assert accuracy(world, mask) > accuracy(world, random) + 0.025
        assert accuracy(world, mask) > accuracy(world, added(world, 0.5)) + 0.025
        weights = learned(0, adaptive=True, then_steps=100, then_lr=2e-3)
        both = learned(40, adaptive=True, then_steps=100, then_lr=2e-3)
        assert entropy_on(both, data) < entropy_on(weights, data) - 0.2
        assert accuracy(world, both) > accuracy(world, weights) + 0.015


@dataclass(frozen=True)
class Run:
    """Epochs of one slow run, and the data it saw."""

    epochs: list[dict[str, Tensor]]
    data: Data


@pytest.fixture(scope="module")
def slow_runs(bases: dict[int, DigitNet]) -> list[Run]:
    made = []
    for seed, base in bases.items():
        x, y = examples(TASK, "train")
        net = deepcopy(base).train().requires_grad_(True)
        net.head.requires_grad_(False)
        generator, epochs = torch.Generator().manual_seed(seed), []
        optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.03)
        for _ in range(12):
            for batch in torch.split(torch.randperm(len(x), generator=generator), 25):
                optimizer.zero_grad()
                F.cross_entropy(net(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            epochs.append({n: p.detach().clone() for n, p in net.state_dict().items()})
        made.append(Run(epochs, (x, y)))
    return made


def test_training_in_the_span_of_half_a_run_reaches_its_end(slow_runs: list[Run]) -> None:
    over_mean, over_whole = [], []
    for run in slow_runs:
        half = run.epochs[:6]
        found = twa(DigitNet(), half, run.data, steps=60, batch=64)
        made, mean = found.checkpoint(), weft.merge(half, "linear")
        assert loss_on(made, run.data) < 0.5 * loss_on(mean, run.data)
        over_mean.append(score(made, TASK) - score(mean, TASK))
        over_whole.append(score(made, TASK) - score(weft.merge(run.epochs, "linear"), TASK))
        # nothing has left the span
        stack = torch.stack([torch.cat([s[n].double().flatten() for n in s]) for s in half], 1)
        theta = torch.cat([made.tensor(n, dtype=torch.float64).flatten() for n in half[0]])
        rest = theta - stack @ torch.linalg.lstsq(stack, theta[:, None]).solution[:, 0]
        assert float(rest.norm() / theta.norm()) < 1e-5
    assert min(over_mean) > 0.005 and sum(over_mean) / len(over_mean) > 0.01
    assert sum(over_whole) / len(over_whole) > -0.002


def test_a_signed_soup_of_twelve_runs_needs_four_in_memory(bases: dict[int, DigitNet]) -> None:
    validation = examples(TASK, "validation")
    to_soup = []
    for seed, base in list(bases.items())[1:]:
        few: Data = tuple(v[:250] for v in examples(TASK, "train"))  # type: ignore[assignment]
        settings = [(r, e) for r in (2e-4, 1e-3, 4e-3, 8e-3) for e in (4, 8, 12)]
        runs = [tuned(base, few, 100 * seed + i, epochs=e, rate=r) for i, (r, e) in enumerate(settings)]
        soup = learned_soup(DigitNet(), runs, validation, parts="tensor")
        found = mehl_soup(DigitNet(), runs, validation, model_batch=4, epochs=3)
        made = found.checkpoint()
        assert loss_on(made, validation) < loss_on(soup.checkpoint(), validation)
        to_soup.append(score(made, TASK) - score(soup.checkpoint(), TASK))
        size = sum(p.nbytes for p in base.parameters())
        assert found.counted == {"resident_models": 4, "peak_bytes": 5 * size}
        assert found.merged.sources.held_bytes == 0 and soup.merged.sources.held_bytes == 12 * size
        table = torch.stack(list(found.coefficients.values()))
        torch.testing.assert_close(table.sum(1), torch.ones(len(table)), rtol=0, atol=1e-4)
        assert float(table.min()) < 0
    assert sum(to_soup) / len(to_soup) > -0.005
