"""Section 2.2.3.4 and its kin on real experts: merging anew for each input, a task, or a preference.

Gates are made from validation images, accuracies are of the test split; no gate is told the task unless it says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from attentive import RowNet, pretrained_rownet
from lab import UPRIGHT, Data, World, average, correct, pretrained, tuned
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.demo.evaluate import as_network
from weft.demo.tasks import TASKS, examples
from weft.routing import Gating, Routed, pareto
from weft.routing.preferences import hypervolume
from weft.systems import routing
from weft.systems.continual import Increments, dynammo
from weft.train.loop import finetune

LAYERS = ["layers.*"]
Route = Callable[..., Routed]


def network(world: World) -> nn.Module:
    return as_network(world.base)


def unlabelled(tasks: Sequence[str], samples: int | None = None) -> dict[str, Tensor]:
    return {t: examples(t, "validation")[0][:samples] for t in tasks}  # type: ignore[arg-type]


def labelled(tasks: Sequence[str]) -> dict[str, Data]:
    return {t: examples(t, "validation") for t in tasks}  # type: ignore[arg-type]


def routed_score(routed: Routed, tasks: Sequence[str], told: bool = False) -> float:
    """Mean accuracy over the tasks' test images."""
    found = []
    for t in tasks:
        x, y = examples(t, "test")  # type: ignore[arg-type]
        with torch.no_grad():
            out = routed(x, task=t) if told else routed(x)
        found.append(float((out.argmax(1) == y).double().mean()))
    return sum(found) / len(found)


def expert_score(world: World) -> float:
    return sum(average(m, [t]) for t, m in world.experts.items()) / len(world.experts)


def merged_score(world: World, method: str = "task_arithmetic", **params: Any) -> float:
    given = {"weight": 0.3} if method == "task_arithmetic" and not params else params
    return average(weft.merge(world.all, method, base=world.base, **given), list(world.experts))


# -- told the task: what every expert's own residual costs ------------------------------------------------------


def test_masks_and_thin_residuals_bring_a_told_expert_back(worlds: list[World]) -> None:
    for world in worlds:
        tasks, best = list(world.experts), expert_score(world)
        for residual, loses, size in (("emr", 0.05, 2.3), ("tall:0.4", 0.04, 2.3), ("lowrank", 0.01, 3.0)):
            routed = weft.route(network(world), world.base, world.experts, shared="base", residual=residual)
            assert routed_score(routed, tasks, told=True) > best - loses
            assert routed.cost().ratio < size and any("told" in n for n in routed.cost().notes)
        one = weft.route(network(world), world.base, world.experts, shared="base", residual="emr")
        by_method = weft.merge(world.all, "emr", base=world.base, task=1, dtype=torch.float32)
        x = examples(tasks[1], "test")[0]  # type: ignore[arg-type]
        torch.testing.assert_close(one(x, task=tasks[1]), as_network(by_method)(x), rtol=1e-3, atol=1e-3)


# -- catalogue ------------------------------------------------------------------------------------------------


def test_parameters_averaged_by_a_trained_router_beat_one_expert_of_the_cost(worlds: list[World]) -> None:
    """SMEAR against the same network without routing, trained as long on the same labels from the experts' mean."""
    steps = 60
    for world in worlds[1:]:
        tasks, data = list(world.experts), labelled(list(world.experts))
        routed = routing.smear(
            network(world), world.base, world.experts, data, steps=steps, lr=1e-3, batch=32
        )
        mean = as_network(weft.merge(world.all, "linear"))
        joined = tuple(torch.cat(v) for v in zip(*data.values(), strict=True))
        epochs = -(-steps * 32 * len(tasks) // len(joined[0]))
        plain = finetune(
            deepcopy(mean).requires_grad_(True), joined, epochs=epochs, batch=32 * len(tasks), lr=1e-3
        )
        alone = average(plain.model.weights(), tasks)
        assert routed_score(routed, tasks) > alone > average(mean, tasks) + 0.1
        w = routed.weights_for(examples(tasks[0], "test")[0])  # type: ignore[arg-type]
        assert isinstance(w, dict) and all(torch.allclose(v.sum(1), torch.ones(len(v))) for v in w.values())
        for i, t in enumerate(
            tasks
        ):  # each is still an expert of its task, moved by gradients from all of them
            kept = as_network(routed.checkpoint(weights=torch.eye(len(tasks))[i]))
            assert correct(kept, examples(t, "test")) > 0.9  # type: ignore[arg-type]
            assert average(kept, tasks) > average(world.experts[t], tasks)


def test_thin_knowledge_added_by_a_router_nearly_reaches_the_experts(worlds: list[World]) -> None:
    for world in worlds:
        tasks = list(world.experts)
        routed = routing.twin_merging(network(world), world.base, world.experts, unlabelled(tasks), steps=150)
        found = routed_score(routed, tasks)
        assert found > expert_score(world) - 0.04
        assert found > merged_score(world) + 0.08 and found > merged_score(world, "tsv")
        cost = routed.cost()
        assert cost.passes == 1 and cost.ratio < 1 + 0.5 * len(tasks) and not cost.test_time


def test_gates_at_the_mlps_learn_to_weigh_task_vectors(worlds: list[World]) -> None:
    """With labels they serve every task; by entropy alone they may collapse, so only the mechanism is asserted."""
    world = worlds[1]
    tasks = list(world.experts)
    start = merged_score(world)
    made = routing.wemoe(
        network(world), world.base, world.experts, labelled(tasks), loss="cross_entropy", steps=150, lr=1e-2,
        where=LAYERS, batch=32, split="validation",
    )  # fmt: skip
    assert routed_score(made, tasks) > start + 0.05
    tests = {t: examples(t, "test")[0] for t in tasks}  # type: ignore[arg-type]

    def entropy(routed: Routed) -> float:
        with torch.no_grad():
            logs = torch.cat([routed(x) for x in tests.values()]).log_softmax(1)
        return float(-(logs.exp() * logs).sum(1).mean())

    untrained = routing.wemoe(network(world), world.base, world.experts, tests, steps=0, where=LAYERS)
    adapted = routing.wemoe(network(world), world.base, world.experts, tests, steps=60, lr=1e-3, where=LAYERS)
    assert routed_score(untrained, tasks) == pytest.approx(start, abs=0.02)
    assert entropy(adapted) < entropy(untrained) - 0.05
    assert adapted.cost().test_time and "test-time" in str(adapted.cost()) and not made.cost().test_time


def conflicting() -> tuple[nn.Module, dict[str, nn.Module], dict[str, Data], dict[str, Data]]:
    """Two experts that cannot both be right: one says the digit, the other the digit that comes after it."""

    def shifted(split: str, by: int) -> Data:
        x, y = examples(UPRIGHT, split)  # type: ignore[arg-type]
        return x, (y + by) % 10

    base = pretrained(1, epochs=15)
    names = ("digit", "next")
    experts: dict[str, nn.Module] = {
        n: tuned(base, shifted("train", i), 1 + i, epochs=12) for i, n in enumerate(names)
    }
    both = [{n: shifted(s, i) for i, n in enumerate(names)} for s in ("validation", "test")]
    return base, experts, both[0], both[1]


conflict = cache(conflicting)


def log_likelihood(call: Callable[[Tensor], Tensor], data: Data) -> float:
    with torch.no_grad():
        return -float(F.cross_entropy(call(data[0]), data[1]))


@cache
def swept() -> Tensor:
    """Log likelihoods [n, 2] of task arithmetic along its front, and at common scales."""
    base, experts, _, test = conflict()
    weights = [[i / 10, 1 - i / 10] for i in range(11)] + [[s, s] for s in (0.1, 0.3, 0.5, 0.7)]
    rows = []
    for w in weights:
        net = as_network(weft.merge(list(experts.values()), "task_arithmetic", base=base, weight=w))
        rows.append([log_likelihood(net, d) for d in test.values()])
    return torch.tensor(rows, dtype=torch.float64)


@cache
def preferring() -> Routed:
    """One model for both, trained on Σ rₜlₜ."""
    base, experts, val, _ = conflict()
    return routing.pwemoe(base, base, experts, val, steps=400, where=LAYERS, batch=32)


def test_one_model_turns_a_preference_into_weights() -> None:
    _, _, _, test = conflict()
    routed = preferring()
    found = pareto(routed, lambda call, t: log_likelihood(call, test[t]), points=5)
    order = found.preferences[:, 0].argsort()
    assert bool((found.scores[order, 0].diff() > 0).all()) and bool((found.scores[order, 1].diff() < 0).all())
    for r, row in zip(found.preferences[1:-1].double(), found.scores[1:-1], strict=True):
        assert (r * row).sum() > (r * swept()).sum(1).max()  # better than every merge at what it minimises
    static = as_network(routed.checkpoint(preference=[0.7, 0.3]))
    x = test["digit"][0]
    torch.testing.assert_close(static(x), routed(x, preference=[0.7, 0.3]), rtol=1e-4, atol=1e-4)


def test_a_pareto_set_from_one_model_covers_more_than_a_sweep_of_merges() -> None:
    _, _, _, test = conflict()
    found = pareto(preferring(), lambda call, t: log_likelihood(call, test[t]), points=9)
    reference = [-4.0, -4.0]
    assert found.hypervolume(reference) > hypervolume(swept(), reference)
    assert len(found.front) == 9


@cache
def rownets(seed: int = 0) -> tuple[nn.Module, Mapping[str, nn.Module]]:
    """A small transformer and three experts of it."""
    base = pretrained_rownet(seed)
    made = {}
    for i, task in enumerate(list(TASKS)[:3]):
        net = RowNet(seed)
        net.load_state_dict(base.state_dict())
        trained = finetune(net, examples(task, "train"), epochs=8, batch=50, lr=1e-3, seed=i)
        kept = RowNet(seed)
        kept.load_state_dict(base.state_dict() | trained.model.weights())
        made[task] = kept.eval()
    return base, made


def test_gates_where_experts_differ_serve_nearly_like_gates_everywhere() -> None:
    base, experts = rownets()
    tasks = list(experts)
    where = ["embed", "blocks.layers.*.self_attn", "blocks.layers.*.linear?", "blocks.layers.*.norm?", "norm"]

    def gated(share: float) -> Routed:
        return routing.gated_where_dissimilar(
            base, base, experts, unlabelled(tasks), share=share, where=where, at="blocks.layers.0"
        )

    every, few, fewest = gated(1.0), gated(0.6), gated(0.3)
    assert len(few.blocks) <= 0.6 * len(every.blocks)
    assert routed_score(few, tasks) > routed_score(every, tasks) - 0.01
    assert routed_score(every, tasks) - 0.01 > routed_score(fewest, tasks) - 0.01 > 0.8
    assert few.cost().bytes < 0.95 * every.cost().bytes


class Adapted(nn.Module):
    """The demo's network with a bottleneck behind each layer; up projections start at zero."""

    def __init__(self, net: nn.Module, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = deepcopy(net).requires_grad_(False)
        self.adapters = nn.ModuleList(
            nn.Sequential(nn.Linear(256, width), nn.GELU(), nn.Linear(width, 256)) for _ in range(3)
        )
        for a in self.adapters:
            nn.init.zeros_(a[2].weight)  # type: ignore[index]
            nn.init.zeros_(a[2].bias)  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        for layer, adapter in zip(self.trunk.layers, self.adapters, strict=True):  # type: ignore[arg-type]
            x = F.gelu(layer(x))
            x = x + adapter(x)
        out: Tensor = self.trunk.head(x)  # type: ignore[operator]
        return out


def test_adapters_merged_by_distance_beat_their_average(bases: Mapping[int, nn.Module]) -> None:
    """Domains arrive one after the other, each adapter starting from the one before; DAM tells them apart."""
    start = Adapted(bases[1])
    tasks, experts, last = ("rotated", "mirrored", "inverted"), {}, start
    for i, task in enumerate(tasks):
        net = deepcopy(last)
        made = finetune(
            net, examples(task, "train"), which="adapters.*", epochs=12, batch=50, lr=3e-3, seed=i
        )
        net.load_state_dict(net.state_dict() | made.model.weights())
        experts[task] = last = net.eval()
    alone = sum(correct(experts[t], examples(t, "test")) for t in tasks) / 3
    mean = weft.materialize(weft.merge(list(experts.values()), "linear"), deepcopy(start))
    uniform = sum(correct(mean, examples(t, "test")) for t in tasks) / 3
    newest = sum(correct(last, examples(t, "test")) for t in tasks) / 3
    routed = routing.dam(start, start, experts, unlabelled(tasks), where=["adapters.*"], at="trunk.layers.2")
    found = routed_score(routed, tasks)
    assert found > max(uniform, newest) + 0.05 and found > alone - 0.08
    x = torch.cat([examples(t, "test")[0][:4] for t in tasks])
    loop = torch.cat([routed(x[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(routed(x), loop, rtol=1e-4, atol=1e-4)


def test_averaged_adapters_serve_nearly_like_one_a_task(bases: Mapping[int, nn.Module]) -> None:
    """DynaMMo: ten digits in five steps of two, told apart at the end. At this size the last adapter alone does as
    well as the mean; what is asserted is that one forward pass nearly keeps what five adapters give."""
    start = Adapted(bases[1])
    start.trunk.head = nn.Identity()

    def step(split: str, i: int, each: int | None = None) -> Data:
        x, y = examples("rotated", split)  # type: ignore[arg-type]
        chosen = torch.cat([(y == 2 * i + c).nonzero()[:each, 0] for c in (0, 1)])
        return x[chosen], y[chosen] % 2

    memory = [step("train", i, 20) for i in range(5)]
    made = dynammo(start, "adapters.*", 256, [step("train", i) for i in range(5)], memory)
    x, y = examples("rotated", "test")

    def accuracy(one: Increments) -> float:
        with torch.no_grad():
            task, inside = one(x)
        return float((2 * task + inside == y).double().mean())

    def refitted(features: Sequence[nn.Module]) -> float:
        """With heads fitted to features of each task's own."""
        shares = []
        for i, net in enumerate(features):
            rest = [m[0] for j, m in enumerate(memory) if j != i]
            labels = torch.cat([memory[i][1], torch.full((sum(map(len, rest)),), 2)])
            torch.manual_seed(i)
            joint = nn.Sequential(deepcopy(net), nn.Linear(256, 3))
            data = (torch.cat([memory[i][0], *rest]), labels)
            found = finetune(joint, data, which=["1.*"], epochs=12, batch=50, lr=3e-3, seed=0)
            joint.load_state_dict(joint.state_dict() | found.model.weights())
            with torch.no_grad():
                shares.append(joint.eval()(x).softmax(-1))
        task = torch.stack([s[:, -1] for s in shares], 1).argmin(1)
        inside = torch.stack([s[:, :-1].argmax(1) for s in shares], 1).gather(1, task[:, None])[:, 0]
        return float((2 * task + inside == y).double().mean())

    found = accuracy(made)
    assert found > refitted(made.kept) - 0.05
    assert found > refitted([start] * 5) + 0.01
    assert sum(p.numel() for p in made.features.parameters()) == sum(p.numel() for p in start.parameters())


# -- without a row of their own -------------------------------------------------------------------------------


def test_projection_energies_find_experts_without_data(worlds: list[World]) -> None:
    """SMILE and MASS: nothing is learned, and both pass the best merge."""
    for world in worlds[1:]:
        tasks, best = list(world.experts), merged_score(world, "tsv")
        by_token = routing.smile(network(world), world.base, world.experts, where=LAYERS)
        by_subset = routing.mass(network(world), world.base, world.experts, at="layers.0", rank=12)
        for routed in (by_token, by_subset):
            assert routed_score(routed, tasks) > best + 0.01
            assert not routed.cost().learned
        assert by_token.cost().products < 1.5 and by_token.cost().passes == 0


def test_the_surest_expert_counts_most(worlds: list[World]) -> None:
    """DaWin above the merge with the same mean weights, for as many passes as there are experts."""
    for world in worlds:
        tasks = list(world.experts)
        routed = routing.dawin(network(world), world.base, world.experts)
        assert routed_score(routed, tasks) > merged_score(world) + 0.03
        assert routed.cost().passes == len(tasks)


def test_prototypes_and_essential_residuals_repair_an_essential_merge(worlds: list[World]) -> None:
    """ESM++ from 32 unlabelled images a task, above ESM itself at the same scale."""
    for world in worlds[:2]:
        tasks = list(world.experts)
        scale = 0.2 if len(tasks) == 5 else 0.3
        routed = routing.esm_plus(
            network(world), world.base, world.experts, unlabelled(tasks, 32), scale=scale, temperature=0.02
        )
        alone = {t: examples(t, "test") for t in tasks}  # type: ignore[arg-type]
        merged = sum(
            float((routed(x, weights=[0.0] * len(tasks)).argmax(1) == y).double().mean()) for x, y in alone.values()
        ) / len(tasks)  # fmt: skip
        found = routed_score(routed, tasks)
        assert found > merged + 0.02 and found > expert_score(world) - 0.06


def test_a_leak_through_the_batch_is_as_large_as_it_is_told(worlds: list[World]) -> None:
    """Mean weights over batches of one task look better than the same gate on single images."""
    world = worlds[0]
    tasks = list(world.experts)
    gating = Gating.of("entropy", scale=1.5, per="batch")
    leaking = weft.route(network(world), world.base, world.experts, shared="base", gate=gating)
    honest = routing.dawin(network(world), world.base, world.experts)
    assert routed_score(leaking, tasks) != routed_score(honest, tasks)
    assert leaking.cost().test_time and any("leak" in n for n in leaking.cost().notes)
