"""Post-calibration on real digits: REPAIR, BatchNorm, representation surgery and the rest."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import pytest
import torch
from lab import UPRIGHT, Data, World, average, joined, score, tuned
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet
from weft.demo.tasks import examples


def reordered(a: DigitNet, b: DigitNet, x: Tensor) -> DigitNet:
    """b with its hidden units in the order in which their activations correlate most with a's."""
    made = copy.deepcopy(b)
    with torch.no_grad():
        for i in range(3):
            ha, hb = x, x
            for j in range(i + 1):
                ha = nn.functional.gelu(a.layers[j](ha))
                hb = nn.functional.gelu(made.layers[j](hb))
            corr = torch.corrcoef(torch.cat([ha, hb], 1).T)[: ha.shape[1], ha.shape[1] :].nan_to_num()
            order = torch.from_numpy(linear_sum_assignment(corr.numpy(), maximize=True)[1])
            layer, after = made.layers[i], made.layers[i + 1] if i < 2 else made.head
            assert isinstance(layer, nn.Linear) and isinstance(after, nn.Linear)
            layer.weight.copy_(layer.weight[order])
            layer.bias.copy_(layer.bias[order])
            after.weight.copy_(after.weight[:, order])
    return made


def spread(net: nn.Module, x: Tensor) -> list[Tensor]:
    """Standard deviations of the units of every hidden layer."""
    found: list[Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, a, y: found.append(y.std(0, correction=0))) for m in net.layers
    ]  # type: ignore[union-attr, operator]
    with torch.no_grad():
        net(x)
    for hook in hooks:
        hook.remove()
    return found


def test_repair_lifts_the_midpoint_of_independent_networks() -> None:
    data, x = (
        joined([examples(UPRIGHT, "pretrain"), examples(UPRIGHT, "train")]),
        examples(UPRIGHT, "train")[0],
    )
    for seed in (1, 2):
        a, b = (
            tuned(DigitNet(torch.Generator().manual_seed(10 * seed + i)), data, 10 * seed + i, epochs=12, rate=1e-3,
                  head=True) for i in range(2)
        )  # fmt: skip
        for other, gain in ((b, 0.05), (reordered(a, b, x), 0.0)):
            middle = weft.merge([a, other], "linear")
            mended = weft.calibrate(middle, [x], "repair", parents=[a, other], module=a)
            assert mended.added == 0
            before, after = score(middle, UPRIGHT), score(mended.checkpoint, UPRIGHT)
            assert after > before + gain, (seed, before, after)
            goals = [(p + q) / 2 for p, q in zip(spread(a, x), spread(other, x), strict=True)]
            shrunk = spread(as_network(middle), x)
            for goal, now, was in zip(goals, spread(as_network(mended.checkpoint), x), shrunk, strict=True):
                assert float((now / goal - 1).abs().max()) < 0.02
                assert float((was / goal).mean()) < 0.95  # the variance collapse that is mended
        # statistics of parents that are not in the merged model's order are the wrong goal
        wrong = weft.calibrate(middle, [x], "repair", parents=[a, b], module=a)
        assert score(wrong.checkpoint, UPRIGHT) < after


class ConvNet(nn.Module):
    """Three convolutions with BatchNorm: pixels [n, 64] to logits [n, 10]."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(
                nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            )  # fmt: skip
            self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x.reshape(-1, 1, 8, 8)).flatten(1))
        return out


def trained(start: nn.Module, data: Data, epochs: int, seed: int) -> nn.Module:
    net, generator = copy.deepcopy(start).train().requires_grad_(True), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for i in torch.randperm(len(data[0]), generator=generator).split(50):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(data[0][i]), data[1][i]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


def right(net: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((net(data[0]).argmax(1) == data[1]).double().mean())


def test_batchnorm_anew_lifts_the_midpoint_of_convolutional_networks() -> None:
    data, test = (
        joined([examples(UPRIGHT, "pretrain"), examples(UPRIGHT, "train")]),
        examples(UPRIGHT, "test"),
    )
    for seed in (1,):
        a, b = (trained(ConvNet(10 * seed + i), data, 5, 10 * seed + i) for i in range(2))
        middle = weft.merge([a, b], "linear")
        before = right(weft.materialize(middle, ConvNet(0)).eval(), test)
        found = weft.calibrate(middle, [data[0]], "batchnorm", module=a)
        repaired = weft.calibrate(middle, [data[0]], "repair", parents=[a, b], module=a)
        assert found.added == repaired.added == 0
        for mended in (found, repaired):
            assert right(mended.module, test) > before + 0.1, (before, right(mended.module, test))


def unlabelled(tasks: Sequence[str]) -> dict[str, list[Tensor]]:
    return {t: list(examples(t, "train")[0].split(50)) for t in tasks}  # type: ignore[arg-type]


def by_task(module: nn.Module, tasks: Mapping[str, object]) -> float:
    """Mean accuracy of a network that is told the task."""
    found = []
    for t in tasks:
        x, y = examples(t, "test")
        with torch.no_grad():
            found.append(float((module(x, task=t).argmax(1) == y).double().mean()))
    return sum(found) / len(found)


def arithmetic(world: World) -> Checkpoint:
    return weft.merge(world.all, "task_arithmetic", base=world.base, scale=0.3)


def test_surgery_brings_a_merge_near_its_experts(worlds: list[World]) -> None:
    for world in worlds[:2]:
        tasks, net = list(world.experts), as_network(world.base)
        merged = arithmetic(world)
        alone = sum(score(e, t) for t, e in world.experts.items()) / len(tasks)
        before = average(merged, tasks)
        found = weft.calibrate(
            merged, unlabelled(tasks), "surgery", experts=world.experts, module=net, rank=16, steps=150, lr=3e-3,
            split="train",
        )  # fmt: skip
        after = by_task(found.module, world.experts)
        assert after > before + 0.6 * (alone - before), (before, after, alone)
        assert all(last < 0.6 * first for first, last in found.told["losses"].values())
        assert found.added == len(tasks) * 2 * 16 * 256 and not found.told["test_time"]


def test_surgery_at_every_layer_does_no_worse_with_the_same_rank(shipped: World) -> None:
    tasks, net = ("rotated", "swapped"), as_network(shipped.base)
    experts = {t: shipped.experts[t] for t in tasks}
    how = {"experts": experts, "module": net, "rank": 8, "steps": 150, "lr": 3e-3, "split": "train"}
    one, deep = (
        weft.calibrate(arithmetic(shipped), unlabelled(tasks), "surgery", at=at, **how)
        for at in (None, "layers.*")
    )  # fmt: skip
    assert by_task(deep.module, experts) > by_task(one.module, experts) - 0.01
    assert deep.told["places"] == ["layers.0", "layers.1", "layers.2"]


def test_magnitude_gives_back_what_small_scales_take(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        merged, net = arithmetic(world), as_network(world.base)
        before = average(merged, tasks)
        gains = {}
        for space in ("weights", "features", "both"):
            found = weft.calibrate(merged, unlabelled(tasks), "magnitude", experts=world.experts, base=world.base,
                                   module=net, space=space)  # fmt: skip
            gains[space] = average(found.checkpoint, tasks) - before
        assert min(gains.values()) > 0, gains


@pytest.mark.parametrize("fit", ["ridge", "logistic"])
def test_a_head_fitted_anew_to_the_merged_features(shipped: World, fit: str) -> None:
    tasks, net = list(shipped.experts), as_network(shipped.base)
    merged = arithmetic(shipped)
    few = joined([examples(t, "validation") for t in tasks])  # type: ignore[arg-type]
    found = weft.calibrate(merged, [few], "head", fit=fit, ridge=0.01, module=net)
    assert average(found.checkpoint, tasks) > average(merged, tasks) + 0.1
    test = joined([examples(t, "test") for t in tasks])  # type: ignore[arg-type]
    sure = weft.calibrate(found.checkpoint, [few], "temperature", module=net)
    assert sure.told["ece_after"] <= sure.told["ece_before"]
    assert right(sure.module, test) == right(found.module, test)
