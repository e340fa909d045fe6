"""Preferences: fronts and their volume against definitions, EPO against its conditions, and both on quadratics."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.errors import UsageError
from weft.learn.losses import Shot
from weft.routing import Front, front, pareto, train
from weft.routing.epo import epo_weights, non_uniformity
from weft.routing.preferences import hypervolume, simplex


def test_a_front_holds_what_nothing_dominates() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.4, 0.4], [0.0, 1.0], [0.5, 0.5], [1.0, -1.0]])
    assert front(scores).tolist() == [0, 1, 3]


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_volume_is_the_share_of_random_points_below_the_front(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    scores = torch.rand(12, count, generator=generator, dtype=torch.float64)
    darts = torch.rand(40_000, count, generator=generator, dtype=torch.float64)
    share = (darts[:, None] <= scores[None]).all(2).any(1).double().mean()
    assert hypervolume(scores, [0.0] * count) == pytest.approx(float(share), abs=0.01)
    assert hypervolume(scores - 2, [0.0] * count) == 0.0


def test_a_volume_of_boxes_is_exact() -> None:
    scores = torch.tensor([[3.0, 1.0], [1.0, 2.0], [0.0, 9.0]])
    assert hypervolume(scores, [0.0, 0.0]) == pytest.approx(4.0)
    assert hypervolume(torch.tensor([[2.0, 2.0, 2.0], [1.0, 3.0, 1.0]]), [0.0] * 3) == pytest.approx(9.0)
    with pytest.raises(UsageError, match="2 numbers"):
        hypervolume(scores, [0.0])


def test_a_simplex_grid_is_whole() -> None:
    grid = simplex(3, 4)
    assert len(grid) == 10 and torch.allclose(grid.sum(1), torch.ones(10))
    with pytest.raises(UsageError, match="10,000"):
        simplex(12, 12)


def gradients(seed: int, m: int = 3, d: int = 6) -> Tensor:
    return torch.randn(m, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("seed", range(8))
def test_a_balancing_step_lowers_what_is_too_large_and_raises_nothing_that_leads(seed: int) -> None:
    g = gradients(seed)
    losses = torch.tensor([3.0, 1.0, 0.4], dtype=torch.float64)
    r = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    alpha = epo_weights(losses, r, g @ g.T)
    assert alpha.sum() == pytest.approx(1.0) and bool((alpha >= -1e-9).all())
    after = losses - 1e-4 * g @ (g.T @ alpha)
    assert non_uniformity(after, r) < non_uniformity(losses, r) or after.max() < losses.max()


@pytest.mark.parametrize("seed", range(8))
def test_a_step_where_all_is_equal_raises_no_loss(seed: int) -> None:
    g = gradients(seed)
    r = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    losses = 1 / r
    assert non_uniformity(losses, r) == pytest.approx(0.0, abs=1e-12)
    change = (g @ g.T) @ epo_weights(losses, r, g @ g.T)
    assert bool((change >= -1e-8 * change.abs().max()).all())


class Point(nn.Module):
    """A point of the plane; what it is called with has no say."""

    def __init__(self) -> None:
        super().__init__()
        self.here = nn.Linear(2, 1, bias=False)
        nn.init.zeros_(self.here.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.here.weight.expand(len(x), 2)


def corner(values: list[float]) -> Point:
    made = Point()
    with torch.no_grad():
        made.here.weight.copy_(torch.tensor([values]))
    return made


def towards(shot: Shot) -> Tensor:
    """½‖here − the task's corner‖² + ¼, so that no loss is zero."""
    goal = shot.batch.args[0][:1]
    return 0.5 * (shot.outputs - goal).square().sum(-1).mean() + 0.25


@pytest.mark.parametrize("balance", ["ls", "epo"])
def test_one_gate_finds_the_front_of_two_quadratics(balance: str) -> None:
    ends = {"left": [1.0, 0.0], "right": [0.0, 1.0]}
    routed = weft.route(
        Point(),
        Point(),
        {n: corner(v) for n, v in ends.items()},
        shared="base",
        where="all",
        gate="preference",
    )
    data = {n: torch.tensor([v] * 4) for n, v in ends.items()}
    train(routed, towards, data, steps=300, lr=4e-2, balance=balance, batch=4, schedule="cosine")  # type: ignore[arg-type]
    x = torch.zeros(1, 2)

    def score(call, task: str) -> float:  # type: ignore[no-untyped-def]
        return -float(0.5 * (call(x)[0] - torch.tensor(ends[task])).square().sum() + 0.25)

    found = pareto(routed, score, points=7)
    assert isinstance(found, Front) and found.to_json()["tasks"] == ["left", "right"]
    losses = -found.scores
    if balance == "ls":  # the minimum of r₁l₁ + r₂l₂ is r₁ · left + r₂ · right
        for r, row in zip(found.preferences.double(), losses, strict=True):
            best = torch.stack([r[1] ** 2, r[0] ** 2]) + 0.25
            torch.testing.assert_close(row, best, rtol=0, atol=0.06)
        assert len(found.front) >= 5
    else:  # r₁l₁ = r₂l₂ as far as the front reaches
        middle = found.preferences.min(1).values > 0.3
        products = (found.preferences.double() * losses)[middle]
        torch.testing.assert_close(products[:, 0], products[:, 1], rtol=0.15, atol=0.02)
    order = found.preferences[:, 0].argsort()
    assert bool((losses[order, 0].diff() <= 0.02).all())  # the more a task is preferred, the less its loss
    static = routed.checkpoint(preference=[0.5, 0.5]).tensor("here.weight")
    torch.testing.assert_close(static[0], routed(x, preference=[0.5, 0.5])[0])
