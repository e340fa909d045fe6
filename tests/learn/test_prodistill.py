"""ProDistill: what a stage minimises, on which features, in which order."""

from __future__ import annotations

import pytest
import torch
from small_nets import Small, family, inputs
from torch import Tensor, nn

import weft
from weft.errors import Problems, UsageError
from weft.learn import Mergeable, prodistill
from weft.statistics.batches import as_batch

TASKS = ["a", "b"]
DATA = {"a": inputs(16, 1), "b": inputs(16, 2)}


def error_at(merged: Mergeable, layer: str) -> float:
    """How far a layer's outputs are from each expert's, over both tasks."""
    total = 0.0
    with torch.no_grad():
        for i, task in enumerate(TASKS):
            with merged.watched([layer]) as ours:
                merged(DATA[task], task=task)
            with merged.watched([layer]) as theirs:
                merged.expert(i, as_batch(DATA[task]))
            total += float((ours[layer] - theirs[layer]).square().mean())
    return total / 2


@pytest.mark.parametrize("parts", ["element", "tensor"])
def test_every_stage_comes_nearer_to_the_experts(parts: str) -> None:
    base, models = family(2)
    before = Mergeable(Small(), base, models, parts, tasks=TASKS)
    found = prodistill(Small(), base, models, DATA, tasks=TASKS, parts=parts, steps=60, lr=0.02)
    assert len(found.losses) == 4 * 60 and not found.test_time  # conv, two blocks, head
    for layer in ("conv", "layers.0", "layers.1", "head"):
        assert error_at(found.merged, layer) < 0.95 * error_at(before, layer)
    filled = weft.materialize(found.checkpoint(), Small())
    torch.testing.assert_close(filled(DATA["a"]), found.merged(DATA["a"]).detach())
    again = prodistill(Small(), base, models, DATA, tasks=TASKS, parts=parts, steps=60, lr=0.02)
    assert again.losses == found.losses


def test_the_first_loss_of_a_stage_is_the_formula_s() -> None:
    """½ ‖f(z; θ) − f(zᵢ; θᵢ)‖² + ½ ‖f(zᵢ; θ) − f(zᵢ; θᵢ)‖² as means, z behind what was learned before."""
    base, models = family(2)
    found = prodistill(
        Small(), base, models, DATA, tasks=TASKS, parts="tensor", steps=1, lr=0.0, batch=16,
        stages=["layers.0", "layers.1"],
    )  # fmt: skip
    start = Mergeable(Small(), base, models, "tensor", tasks=TASKS)
    weights = {n: w.detach() for n, w in start.weights().items()}
    expected = 0.0
    for x, expert in zip(DATA.values(), models, strict=True):
        merged = Small()
        merged.load_state_dict(weights)

        def behind(net: nn.Module, x: Tensor = x) -> Tensor:
            h = torch.tanh(net.conv(x)).flatten(1)  # type: ignore[operator]
            return torch.tanh(net.layers[0](h))  # type: ignore[index, operator]

        z, own = behind(merged), behind(expert)
        target = expert.layers[1](own)  # type: ignore[index, operator]
        for features in (z, own):
            expected += float((merged.layers[1](features) - target).square().mean().detach()) / 2 / 2
    assert found.losses[1] == pytest.approx(expected)


def test_stages_are_learned_in_the_order_of_their_calls() -> None:
    base, models = family(2)
    one, other = (
        prodistill(Small(), base, models, DATA, tasks=TASKS, steps=3, stages=stages)
        for stages in (["head", "layers.0"], ["layers.0", "head"])
    )
    assert one.losses == other.losses
    kept = one.coefficients["layers.1.weight"]
    assert torch.equal(kept, torch.full_like(kept, 0.3))  # in no stage


def test_private_parameters_within_a_stage_are_the_task_s() -> None:
    base, models = family(2)
    # the merge is expert a; with a's own bias task a has no error at all, so b's alone is left
    found = prodistill(
        Small(), base, models, DATA, tasks=TASKS, private=["layers.1.bias", "head.*"], steps=1, lr=0.0,
        parts="tensor", stages=["layers.1"], start=[1.0, 0.0], batch=16,
    )  # fmt: skip
    a, b = models
    x = DATA["b"]

    def features(net: nn.Module) -> Tensor:
        return torch.tanh(net.layers[0](torch.tanh(net.conv(x)).flatten(1)))  # type: ignore[index, operator]

    target = b.layers[1](features(b))  # type: ignore[index, operator]
    bias = b.layers[1].bias  # type: ignore[index, union-attr]
    made = [torch.nn.functional.linear(z, a.layers[1].weight, bias) for z in (features(a), features(b))]  # type: ignore[index, union-attr, arg-type]
    expected = sum(float((m - target).square().mean().detach()) for m in made) / 2 / 2
    assert found.losses[0] == pytest.approx(expected)


class Odd(nn.Module):
    """One layer twice, one never."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.block = nn.Linear(3, 3), nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(self.twice(self.twice(x)))
        return out


def test_stages_that_cannot_be_learned_one_by_one_are_refused() -> None:
    base = Odd()
    data = {"a": torch.randn(4, 3)}
    for stages, message in (
        (["twice"], "called more than once"), (["never", "block"], "never is never called"),
        (["block", "block.0"], r"block\.0 lies in another"), (["blok"], "did you mean 'block'"),
    ):  # fmt: skip
        with pytest.raises((UsageError, Problems), match=message):
            prodistill(Odd(), base, [base], data, tasks=["a"], stages=stages, steps=1)
    with pytest.raises(UsageError, match="share a coefficient but not a stage"):
        prodistill(Odd(), base, [base], data, tasks=["a"], stages=["block"], parts="model", steps=1)
    with pytest.raises(UsageError, match="no submodules with parameters"):
        prodistill(base.twice, base.twice, [base.twice], data, tasks=["a"])
    with pytest.raises(Problems, match="no data of b"):
        prodistill(Odd(), base, [base, base], data, tasks=["a", "b"], stages=["block"])
