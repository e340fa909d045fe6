"""Concrete masks: their law, their gradient, both levels, and what is saved."""

from __future__ import annotations

import pytest
import torch
from small_nets import Small, family, inputs
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.errors import UsageError
from weft.learn import Masked, Mergeable, Weighed, concrete
from weft.learn.losses import Shot
from weft.learn.masks import _two_levels
from weft.learn.sources import Sources

TASKS = ["a", "b"]
DATA = {"a": inputs(24, 1), "b": inputs(24, 2)}


def masked(seed: int = 0, temperature: float = 0.5) -> Mergeable:
    base, models = family(2)

    def way(sources: Sources, names: list[str]) -> Masked:
        return Masked(Weighed(sources, names, "tensor", "box", 0.3), temperature, seed)

    return Mergeable(Small(), base, models, way=way, tasks=TASKS)


def test_masks_are_relaxed_bernoulli_of_mean_1_in_every_tensor() -> None:
    way = masked().way
    assert isinstance(way, Masked)
    drawn = way.sample()
    assert all(
        float(m.mean().detach()) == pytest.approx(1) and float(m.min().detach()) >= 0 for m in drawn.values()
    )
    with torch.no_grad():
        way.logits[way.names.index("layers.0.weight")].fill_(2.0)
    samples = torch.stack([way.sample()["layers.0.weight"].detach() for _ in range(50)])
    # P(m > 1/2) = σ(x) before the division by the mean, which is the same for all entries of a draw
    scale = samples.amax((1, 2), keepdim=True)
    above = float((samples / scale > 0.5).double().mean())
    assert above == pytest.approx(float(torch.sigmoid(torch.tensor(2.0))), abs=0.02)
    assert torch.equal(masked(3).way.sample()["head.bias"], masked(3).way.sample()["head.bias"])  # type: ignore[attr-defined]


def test_gradients_of_the_logits_are_finite_differences() -> None:
    merged = masked()
    way = merged.way
    assert isinstance(way, Masked)
    way.double()
    state = way._generator.get_state()

    def loss() -> Tensor:
        way._generator.set_state(state)  # the same u
        return merged(inputs(), task="a").square().mean()

    loss().backward()
    x = way.logits[way.names.index("head.weight")]
    assert x.grad is not None
    for i in (0, 7):
        ends = []
        for h in (-1e-5, 1e-5):
            with torch.no_grad():
                x.view(-1)[i] += h
                ends.append(float(loss().detach()))
                x.view(-1)[i] -= h
        assert float(x.grad.view(-1)[i]) == pytest.approx((ends[1] - ends[0]) / 2e-5, rel=1e-4, abs=1e-9)


class Constant(nn.Module):
    """y = w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        return self.w.expand(len(x), 10)


def test_a_coordinate_in_conflict_is_masked() -> None:
    """Both tasks want 1 everywhere but in the last entry, where the experts' sum is wrong for both."""
    ones = torch.ones(9)
    experts = [{"w": torch.cat([ones, torch.tensor([v])])} for v in (3.0, -1.0)]
    wanted = torch.cat([ones, torch.zeros(1)])
    data = {t: torch.zeros(4, 1) for t in TASKS}
    found = concrete(
        Constant(), {"w": torch.zeros(10)}, experts, data, tasks=TASKS, scale=0.5, steps=400, lr=0.05,
        loss=lambda shot: (shot.outputs - wanted).square().mean(),
    )  # fmt: skip
    x = found.merged.way.logits[0].detach()  # type: ignore[attr-defined]
    assert float(x[9]) < -2 < 1 < float(x[:9].min())


def test_the_masked_checkpoint_is_the_masked_module_and_no_recipe() -> None:
    for adaptive in (False, True):
        base, models = family(2)
        found = concrete(
            Small(), base, models, DATA, tasks=TASKS, adaptive=adaptive, steps=4, then_steps=3, lr=0.05
        )
        assert found.test_time and len(found.losses) == 4 + 3 * adaptive
        filled = weft.materialize(found.checkpoint(), Small())
        torch.testing.assert_close(filled(inputs()), found.merged(inputs()).detach())
        with pytest.raises(UsageError, match="masked merge does not fit a recipe"):
            found.recipe("base", ["a", "b"])
        again = concrete(
            Small(), base, models, DATA, tasks=TASKS, adaptive=adaptive, steps=4, then_steps=3, lr=0.05
        )
        assert again.losses == found.losses
        for n in found.checkpoint():
            assert torch.equal(found.checkpoint().tensor(n), again.checkpoint().tensor(n))


def test_without_adamerging_the_weights_stay_and_with_it_they_start_anew_each_step() -> None:
    base, models = family(2)
    alone = concrete(Small(), base, models, DATA, tasks=TASKS, steps=3, lr=0.1)
    assert all(torch.equal(c, torch.full_like(c, 0.3)) for c in alone.coefficients.values())
    merged = masked()
    way = merged.way
    assert isinstance(way, Masked)
    seen = []

    def loss(shot: Shot) -> Tensor:
        if shot.task == "a":
            seen.append([float(p.detach()[0]) for p in way.inside.phi])
        return F.cross_entropy(shot.outputs, shot.outputs.argmax(-1))

    _two_levels(merged, way, loss, DATA, 0.3, 2, 0.1, 1.0, 16, 0)
    inner, outer, again, _ = seen
    assert inner == again == [pytest.approx(0.3)] * len(inner)
    assert set(outer) <= {0.0, 1.0}  # one step of Adam at rate 1, clamped


def test_masks_need_a_base_and_are_not_saved_while_random() -> None:
    _, models = family(2)
    with pytest.raises(UsageError, match="give a base"):
        concrete(Small(), None, models, DATA, tasks=TASKS)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="still random"):
        masked().checkpoint()
    with pytest.raises(UsageError, match="temperature must be above 0"):
        masked(temperature=0.0)
