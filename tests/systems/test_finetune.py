"""Section 2.2.2.1, and its kin elsewhere: fine-tuning so that the results merge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from attentive import pretrained_rownet
from lab import UPRIGHT, Data
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.network import DigitNet
from weft.demo.tasks import TASKS, examples
from weft.demo.train import joined
from weft.statistics import measure
from weft.systems.continual import ita_iel
from weft.systems.linearised import l_lora, linear_layers_only, taft, tangent_task_arithmetic
from weft.train import load_linearised
from weft.train.loop import Finetuned, finetune

HEAD = ["head.*"]
SCALES = tuple(i / 10 for i in range(2, 11))


def right(model: Callable[[Tensor], Tensor], data: Data) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(-1) == data[1]).double().mean())


def scores(model: nn.Module, tasks: Sequence[str], split: str = "test") -> list[float]:
    return [right(model, examples(t, split)) for t in tasks]  # type: ignore[arg-type]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def experts(base: nn.Module, tasks: Sequence[str], seed: int, **settings: object) -> list[Finetuned]:
    """One a task, all with the same settings."""
    return [
        finetune(base, examples(t, "train"), freeze=HEAD, batch=50, seed=10 * seed + i, **settings)  # type: ignore[arg-type]
        for i, t in enumerate(tasks)
    ]


def best(at: Callable[[float], nn.Module], tasks: Sequence[str]) -> nn.Module:
    """The merge with the scale that validation data choose."""
    return at(max(SCALES, key=lambda s: mean(scores(at(s), tasks, "validation"))))


def normalised(merged: nn.Module, tuned: Sequence[Finetuned], tasks: Sequence[str]) -> float:
    """Accuracy of the merge by that of each task's own expert."""
    alone = [right(m.model, examples(t, "test")) for m, t in zip(tuned, tasks, strict=True)]
    return mean([a / b for a, b in zip(scores(merged, tasks), alone, strict=True)])


def plainly(base: nn.Module, tuned: Sequence[Finetuned]) -> Callable[[float], nn.Module]:
    """Task arithmetic in the network itself."""
    ready = [m.checkpoint for m in tuned]

    def at(scale: float) -> nn.Module:
        return weft.materialize(weft.merge(ready, "task_arithmetic", base=base, scale=scale), deepcopy(base))

    return at


def test_tangent_experts_add_up_better_than_plain_ones(bases: dict[int, DigitNet]) -> None:
    tasks, gains = list(TASKS), []
    for seed, base in bases.items():
        settings = {"epochs": 10, "lr": 3e-4, "weight_decay": 0.01}
        plain = experts(base, tasks, seed, mode="full", **settings)
        tangent = experts(base, tasks, seed, mode="tangent", **settings)
        alone = [
            mean([right(m.model, examples(t, "test")) for m, t in zip(k, tasks)]) for k in (plain, tangent)
        ]
        assert abs(alone[0] - alone[1]) < 0.02, "as good on one task"
        ready = [m.checkpoint for m in tangent]
        added = best(lambda s, r=ready, b=base: tangent_task_arithmetic(b, r, s), tasks)  # type: ignore[misc]
        usual = best(plainly(base, plain), tasks)
        gains.append(normalised(added, tangent, tasks) - normalised(usual, plain, tasks))
        assert mean(scores(added, tasks)) > mean(scores(base, tasks)) + 0.1
    assert min(gains) > 0.005 and mean(gains) > 0.01


def test_linearised_adapters_add_up_where_factors_do_not(bases: dict[int, DigitNet]) -> None:
    tasks, gains = list(TASKS), []
    for seed, base in list(bases.items())[:2]:
        lora = experts(base, tasks, seed, mode="lora", lora={"rank": 8}, epochs=8, lr=2e-3)
        linear = experts(base, tasks, seed, mode="tangent_lora", lora={"rank": 8}, epochs=8, lr=1e-2)
        alone = [
            mean([right(m.model, examples(t, "test")) for m, t in zip(k, tasks)]) for k in (lora, linear)
        ]
        assert abs(alone[0] - alone[1]) < 0.025, "as good on one task"
        merged = [best(lambda s, k=k: l_lora(k, s), tasks) for k in (lora, linear)]  # type: ignore[misc]
        gains.append(normalised(merged[1], linear, tasks) - normalised(merged[0], lora, tasks))
        # the sum of the factors of linearised adapters is the sum of their updates, in either scope
        held = experts(base, tasks[:2], seed, mode="tangent_lora", scope="module", lora={"rank": 8},
                       epochs=2, lr=1e-2)  # fmt: skip
        both = l_lora(held, 0.5)
        expected = plainly(base, held)(0.5)
        x = examples(tasks[0], "test")[0]
        assert torch.allclose(both(x), expected(x), atol=1e-4)
    assert min(gains) > 0.01 and mean(gains) > 0.025


def test_linear_layers_of_attention_alone_learn_more_than_the_tangent_and_merge_as_all_do() -> None:
    tasks, merged, alone = list(TASKS)[:3], [], []
    for seed in (1, 2):
        base = pretrained_rownet(seed)
        full = experts(base, tasks, seed, mode="full", epochs=8, lr=1e-3)
        part = [
            linear_layers_only(base, examples(t, "train"), epochs=8, batch=50, lr=2e-3, seed=10 * seed + i)
            for i, t in enumerate(tasks)
        ]
        ends = {
            f"blocks.layers.{i}.self_attn.{w}"
            for i in range(2)
            for w in ("in_proj_weight", "out_proj.weight")
        }
        own = base.state_dict()
        for made in part:
            assert {n for n in made if not torch.equal(made.tensor(n), own[n])} == ends
        networks = [weft.materialize(m, deepcopy(base)).eval() for m in part]
        line = finetune(
            base, examples(tasks[0], "train"), freeze=HEAD, mode="tangent", epochs=8, batch=50, lr=1e-3
        )
        data = examples(tasks[0], "test")
        alone.append(right(networks[0], data) - right(line.model, data))

        def at(scale: float, part: list[weft.Checkpoint] = part, base: nn.Module = base) -> nn.Module:
            return weft.materialize(
                weft.merge(part, "task_arithmetic", base=base, scale=scale), deepcopy(base)
            )

        attention, whole = best(at, tasks), best(plainly(base, full), tasks)
        merged.append(mean(scores(attention, tasks)) - mean(scores(whole, tasks)))
        assert mean(scores(attention, tasks)) > mean(scores(base, tasks)) + 0.05
    assert min(alone) > 0, "better on its task than the tangent model"
    assert mean(merged) > -0.02, "and merged as good as all layers, with a fraction of them"


def test_tangent_transformers_of_shards_compose_and_forget_exactly() -> None:
    base = pretrained_rownet(1)
    x, y = joined([examples(t, "train") for t in list(TASKS)[:3]])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    shards = [(x[i], y[i]) for i in order.chunk(3)]
    settings = {"scale": 5.0, "epochs": 8, "batch": 50, "lr": 2e-3, "which": ["blocks.layers.1.*", "norm.*"]}
    tuned = [taft(base, shard, seed=i, **settings) for i, shard in enumerate(shards)]
    models = [load_linearised(t, base) for t in tuned]
    composed = load_linearised(weft.merge(tuned), base)
    test = joined([examples(t, "test") for t in list(TASKS)[:3]])
    with torch.no_grad():
        outputs = [m(test[0]) for m in models]
        assert torch.allclose(composed(test[0]), sum(outputs) / 3, atol=1e-4), (
            "the mean of the shards' outputs"
        )
        without = load_linearised(weft.merge(tuned[:2]), base)
        forgot = (3 * composed(test[0]) - outputs[2]) / 2
        assert torch.allclose(without(test[0]), forgot, atol=1e-4), "removal is as if it had never been there"
    alone = [right(m, test) for m in models]
    joint = right(load_linearised(taft(base, (x, y), seed=9, **settings), base), test)
    assert right(composed, test) > max(alone)
    assert right(composed, test) > right(base, test) + 0.15
    assert right(composed, test) > joint - 0.08


def test_weights_held_where_the_loss_is_quadratic_add_up_better(bases: dict[int, DigitNet]) -> None:
    tasks, gains, coupled = list(TASKS), [], []
    data = [examples(t, "train") for t in tasks]
    for seed, base in list(bases.items())[:2]:
        few: list[Data] = [tuple(v[:40] for v in examples(t, "pretrain")) for t in tasks]  # type: ignore[misc]
        seen = joined([examples(UPRIGHT, "pretrain"), *few])
        fisher = measure(base, seen[0].split(100), "fisher")
        settings: dict[str, Any] = {"freeze": HEAD, "epochs": 8, "batch": 50, "lr": 1e-3, "seed": seed}

        def added(
            made: Sequence[Checkpoint],
            scale: float,
            base: nn.Module = base,
            weight: Sequence[float] = (1.0,) * 5,
        ) -> nn.Module:
            merged = weft.merge(made, "task_arithmetic", base=base, scale=scale, weight=list(weight))
            return weft.materialize(merged, deepcopy(base))

        free = ita_iel(base, data, fisher, strength=0.0, **settings)
        alone = finetune(base, data[0], **settings)
        assert all(torch.equal(free[0].tensor(n), alone.checkpoint.tensor(n)) for n in free[0]), (
            "β = 0 is plain"
        )
        held = ita_iel(base, data, fisher, strength=300.0, **settings)
        best_free, best_held = (best(partial(added, made), tasks) for made in (free, held))
        gains.append(mean(scores(best_held, tasks)) - mean(scores(best_free, tasks)))
        together = ita_iel(base, data, fisher, strength=3.0, how="iel", **settings)
        coupled.append(mean(scores(added(together, 0.2), tasks)) - mean(scores(added(free, 0.2), tasks)))
        # a task is taken out by leaving its vector out: its accuracy falls, more than any other's
        whole, rest = added(held, 0.4), added(held, 0.4, weight=(0.0, 1.0, 1.0, 1.0, 1.0))
        drops = [a - b for a, b in zip(scores(whole, tasks), scores(rest, tasks), strict=True)]
        assert drops[0] == max(drops) and drops[0] > 0.05
    assert min(gains) > 0.01 and mean(gains) > 0.02
    assert min(coupled) > 0.02, "trained through their mean, they make a better mean"
