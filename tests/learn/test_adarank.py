"""Components of task vectors chosen by gradient: the merge, the straight-through slope, what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_nets import Small, family, inputs
from torch import nn

import weft
from weft.errors import UsageError
from weft.learn import Mergeable, Weighed, adarank
from weft.learn.ranks import Ranked
from weft.learn.sources import Sources

TASKS = ["a", "b"]
DATA = {"a": inputs(24, 1), "b": inputs(24, 2)}


def ranked(keep: float | None = None, scale: float = 0.4) -> tuple[Mergeable, Ranked]:
    base, models = family(2)

    def way(sources: Sources, names: list[str]) -> Ranked:
        return Ranked(Weighed(sources, names, "tensor", "free", scale), keep)

    merged = Mergeable(Small(), base, models, way=way, tasks=TASKS)
    assert isinstance(merged.way, Ranked)
    return merged, merged.way


def test_all_components_are_task_arithmetic_and_half_of_them_the_best_approximation() -> None:
    base, models = family(2)
    whole, _ = ranked(keep=1.0)
    added = weft.merge(models, "task_arithmetic", base=base, scale=0.4)
    for n, theta in whole.weights().items():
        torch.testing.assert_close(theta.detach(), added.tensor(n), rtol=1e-9, atol=1e-12)
    half, way = ranked()
    assert float(way.chosen()["layers.0.weight"].detach().mean()) == 0.5  # 1/k
    start = base.state_dict()
    for n in ("layers.0.weight", "conv.weight"):
        expected = start[n].clone()
        for m in models:
            tau = (m.state_dict()[n] - start[n]).flatten(1)
            u, s, vh = torch.linalg.svd(tau, full_matrices=False)
            r = len(s) // 2
            expected += 0.4 * ((u[:, :r] * s[:r]) @ vh[:r]).reshape(expected.shape)
        torch.testing.assert_close(half.weights()[n].detach(), expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(half.weights()["head.bias"].detach(), whole.weights()["head.bias"].detach())


def test_the_gradient_is_that_of_the_components_through_the_sigmoid() -> None:
    merged, way = ranked()
    merged(inputs(), task="a").square().mean().backward()
    n = "layers.1.weight"
    x = way.logits[way.matrices.index(n)]
    slope = torch.sigmoid(x) * (1 - torch.sigmoid(x))
    left, right = way._left[n], way._right[n]
    for i, j in ((0, 0), (1, 9)):  # one that is chosen, one that is not

        def moved(h: float, i: int = i, j: int = j) -> float:
            with torch.no_grad():
                weights = merged.weights()
                component = 0.4 * torch.outer(left[i, :, j], right[i, j])
                return float(
                    merged.at({**weights, n: weights[n] + h * component}, (inputs(),)).square().mean()
                )

        expected = (moved(1e-5) - moved(-1e-5)) / 2e-5 * float(slope[i, j].detach())
        assert x.grad is not None and float(x.grad[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-10)


def test_a_component_that_hurts_is_left_out_and_one_that_helps_comes_in() -> None:
    """Task vectors of two components: the smaller is what all want, the larger what nobody does."""
    net = nn.Linear(4, 4, bias=False).double()
    good, bad = (torch.diag(torch.eye(4, dtype=torch.float64)[i]) for i in (0, 1))
    base = {"weight": torch.zeros(4, 4, dtype=torch.float64)}
    experts = [{"weight": 0.2 * good + bad}, {"weight": 0.2 * good + 2 * bad}]
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(2)).double()
    found = adarank(
        net, base, experts, {"a": x, "b": x}, tasks=TASKS, keep=0.25, steps=200, lr=0.05, batch=64,
        loss=lambda shot: (shot.outputs - shot.batch.args[0] @ (0.4 * good).T).square().mean(),
    )  # fmt: skip
    assert float(found.losses[-1]) < 1e-12
    torch.testing.assert_close(found.checkpoint().tensor("weight"), 0.4 * good)


def test_what_is_saved_is_what_runs(tmp_path: Path) -> None:
    base, models = family(2)
    found = adarank(
        Small(), base, models, DATA, tasks=TASKS, private=["head.*"], steps=8, lr=0.3, weights=True
    )
    assert found.test_time
    masks = {n: c for n, c in found.coefficients.items() if n.endswith("components")}
    assert len(masks) == 3 and 0 < float(torch.cat([m.flatten() for m in masks.values()]).double().mean()) < 1
    for task in TASKS:
        weft.save(found.checkpoint(task), tmp_path / task)
        filled = weft.materialize(weft.load(tmp_path / task), Small())
        torch.testing.assert_close(filled(inputs()), found.merged(inputs(), task=task).detach())
    with pytest.raises(UsageError, match="does not fit a recipe"):
        found.recipe("base", TASKS)
    again = adarank(
        Small(), base, models, DATA, tasks=TASKS, private=["head.*"], steps=8, lr=0.3, weights=True
    )
    assert again.losses == found.losses
    held = adarank(Small(), base, models, DATA, tasks=TASKS, steps=2)
    assert all(float(c[0]) == 1.0 for n, c in held.coefficients.items() if not n.endswith("components"))


def test_components_need_task_vectors_and_matrices() -> None:
    base, models = family(2)
    with pytest.raises(UsageError, match="give a base"):
        adarank(Small(), None, models, DATA, tasks=TASKS)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0 up to 1"):
        adarank(Small(), base, models, DATA, tasks=TASKS, keep=0.0)
    norm = nn.LayerNorm(3)
    with pytest.raises(UsageError, match="no matrices"):
        adarank(norm, norm, [norm], {"a": torch.randn(2, 3)}, tasks=["a"])
    with pytest.raises(UsageError, match="choose other parts"):
        Ranked(Weighed(Sources(Small(), base, models), ["head.weight"], "row"))
