"""Losses against their formulas, and what each asks for."""

from __future__ import annotations

import pytest
import torch
from small_nets import Small, family, inputs, labels
from torch import Tensor
from torch.nn import functional as F

from weft.errors import Problems, UsageError
from weft.learn import Mergeable
from weft.learn.losses import Shot, align, distill, entropy, self_label, supervised, trusted, ufm
from weft.statistics.batches import as_batch


def shot(task: str | None = "a", data: object = None) -> Shot:
    base, models = family(2)
    merged = Mergeable(Small(), base, models, "tensor", tasks=["a", "b"])
    return Shot(merged, merged.weights(), as_batch(inputs() if data is None else data), task)


def expert(i: int = 0) -> Tensor:
    return family(2)[1][i](inputs()).detach()


def test_entropy_is_of_each_position_s_distribution() -> None:
    s = shot()
    p = s.outputs.softmax(-1)
    torch.testing.assert_close(entropy(s), -(p * p.log()).sum(-1).mean())
    certain = Shot(s.merged, s.weights, s.batch, "a")
    certain._outputs = torch.tensor([[1e4, 0.0]])
    assert float(entropy(certain)) == 0.0  # and not NaN from 0 · log 0


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_is_the_divergence_from_the_expert(temperature: float) -> None:
    s = shot("b")
    p, q = ((x / temperature).softmax(-1) for x in (expert(1), s.outputs))
    expected = temperature**2 * F.kl_div(q.log(), p, reduction="batchmean")
    torch.testing.assert_close(distill(temperature)(s), expected)
    itself = Shot(s.merged, dict(family(2)[1][1].named_parameters()), s.batch, "b")
    assert abs(float(distill()(itself).detach())) < 1e-12


def test_self_labels_are_those_that_the_expert_is_sure_of() -> None:
    s, taught = shot(), expert()
    sure, label = taught.softmax(-1).max(-1)
    threshold = float(sure.detach().median())
    chosen = sure >= threshold
    assert 0 < int(chosen.sum()) < len(chosen)
    torch.testing.assert_close(self_label(threshold)(s), F.cross_entropy(s.outputs[chosen], label[chosen]))
    nothing = self_label(1.1)(s)
    assert float(nothing.detach()) == 0.0 and nothing.requires_grad


def test_alignment_is_relative_error_of_hidden_states_and_divergence() -> None:
    s = shot()
    found = align(["conv", "layers.1"], hidden=2.0, logits=0.5)(s)
    expected = 0.5 * distill()(s)
    with torch.no_grad():
        for name in ("conv", "layers.1"):
            with s.merged.watched([name]) as ours:
                s.run()
            with s.merged.watched([name]) as theirs:
                s.merged.expert(0, s.batch)
            error = (ours[name] - theirs[name]).square().sum() / theirs[name].square().sum()
            expected = expected + 2.0 * error / 2
    torch.testing.assert_close(found, expected)
    with pytest.raises(Problems, match="did you mean 'conv'"):
        align(["cnv"])(s)


def test_weak_views_teach_strong_ones_where_sure_and_trusted_labels_stay() -> None:
    torch.manual_seed(0)
    fixed = torch.full((12,), -1)
    fixed[:3] = labels()[:3]
    s = shot(data=(inputs(), fixed))
    sure, label = s.outputs.softmax(-1).max(-1)
    threshold = float(sure.detach().median())
    label = torch.where(fixed >= 0, fixed, label)
    chosen = (fixed >= 0) | (sure > threshold)
    seen = s.run((0.5 * inputs(),))
    torch.testing.assert_close(
        ufm(lambda x: 0.5 * x, threshold)(s), F.cross_entropy(seen[chosen], label[chosen])
    )


def test_the_surest_of_each_class_are_trusted_and_all_in_the_released_code() -> None:
    g = torch.Generator().manual_seed(0)
    p = (3 * torch.randn(90, 3, generator=g)).softmax(-1)
    found = trusted(p)
    assert [int((found == c).sum()) for c in range(3)] == [3, 3, 3]  # 90 / (10 · 3)
    for c in range(3):
        assert set((found == c).nonzero()[:, 0].tolist()) == set(p[:, c].topk(3)[1].tolist())
    assert torch.equal(trusted(p, compat=True), p.argmax(1))
    flat = torch.full((4, 3), 1 / 3)  # every class claims the same example
    assert int((trusted(flat) >= 0).sum()) == 1


def test_losses_on_labels_are_those_of_fine_tuning() -> None:
    s = shot(data=(inputs(), labels()))
    torch.testing.assert_close(supervised("cross_entropy")(s), F.cross_entropy(s.outputs, labels()))
    torch.testing.assert_close(
        supervised("squared")(shot(data=(inputs(), torch.ones(12, 3)))), (s.outputs - 1).square().mean()
    )


def test_losses_that_ask_an_expert_need_a_task() -> None:
    for loss in (distill(), self_label(), align()):
        with pytest.raises(UsageError, match="name the tasks"):
            loss(shot(None))
    with pytest.raises(UsageError, match="temperature must be above 0"):
        distill(0.0)
