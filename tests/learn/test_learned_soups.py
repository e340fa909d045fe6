"""Soups by gradient: shares, spans, hyperplanes; and how little of it is in memory."""

from __future__ import annotations

import pytest
import torch
from small_nets import Small, family, inputs, labels, near
from torch.nn import functional as F

import weft
from weft.errors import UsageError
from weft.learn import learned_soup, mehl_soup, twa
from weft.learn.constraints import Span

DATA = (inputs(48, 1), labels(48, 2))


def test_shares_are_positive_and_sum_to_one() -> None:
    _, models = family(3)
    for parts in ("model", "tensor"):
        found = learned_soup(Small(), models, DATA, parts=parts, steps=20)
        for c in found.coefficients.values():
            assert float(c.min()) > 0 and float(c.sum(0)) == pytest.approx(1)
        assert found.losses[-1] < found.losses[0] and found.split == "validation"


def test_a_step_in_the_span_is_a_step_of_the_weights_projected() -> None:
    """θ ← θ − lr P Pᵀ ∇L, checked with a dense basis."""
    base, _ = family(1)
    run = [near(base, i, 0.05) for i in range(4)]
    names = list(base.state_dict())
    stack = torch.stack([torch.cat([m.state_dict()[n].flatten() for n in names]) for m in run], 1)
    basis = torch.linalg.qr(stack)[0]
    mean = weft.materialize(weft.merge(run, "linear"), Small())
    F.cross_entropy(mean(DATA[0]), DATA[1]).backward()
    theta = torch.cat([p.detach().flatten() for p in mean.parameters()])
    slope = torch.cat([p.grad.flatten() for p in mean.parameters()])  # type: ignore[union-attr]
    order = [n for n, _ in mean.named_parameters()]
    expected = theta - 0.5 * basis @ (basis.T @ slope)
    found = twa(Small(), run, DATA, steps=1, lr=0.5, batch=48, weight_decay=0.0).checkpoint()
    torch.testing.assert_close(torch.cat([found.tensor(n).flatten() for n in order]), expected)
    decayed = twa(Small(), run, DATA, steps=1, lr=0.5, batch=48, weight_decay=0.1).checkpoint()
    torch.testing.assert_close(
        torch.cat([decayed.tensor(n).flatten() for n in order]), expected - 0.5 * 0.1 * theta
    )


def test_checkpoints_that_repeat_add_nothing_to_a_span() -> None:
    base, _ = family(1)
    run = [near(base, i, 0.05) for i in range(3)]
    once, twice = (twa(Small(), r, DATA, steps=5, lr=0.1, batch=48) for r in (run, [*run, *run]))
    assert sum(p.numel() for p in twice.merged.parameters()) == 3
    for n in once.checkpoint():
        torch.testing.assert_close(once.checkpoint().tensor(n), twice.checkpoint().tensor(n))
    assert isinstance(once.merged.way.constraint, Span)  # type: ignore[attr-defined]


def test_the_coefficients_of_a_soup_by_batches_add_up_to_its_last_point() -> None:
    _, models = family(5)
    found = mehl_soup(Small(), models, DATA, model_batch=2, epochs=2, steps=4, lr=0.05)
    assert len(found.losses) == 2 * 3 * 4 and found.losses[-1] < found.losses[0]
    for c in found.coefficients.values():
        assert float(c.sum(0)) == pytest.approx(1)
    size = sum(p.nbytes for p in models[0].parameters())
    assert found.counted == {"resident_models": 2, "peak_bytes": 3 * size}
    assert found.to_json()["peak_bytes"] == 3 * size
    filled = weft.materialize(found.checkpoint(), Small())
    end = float(F.cross_entropy(filled(DATA[0]), DATA[1]).detach())
    assert end < found.losses[0]
    torch.testing.assert_close(filled(DATA[0]), found.merged(DATA[0]).detach())
    assert found.merged.sources.held_bytes == 0
    again = mehl_soup(Small(), models, DATA, model_batch=2, epochs=2, steps=4, lr=0.05)
    assert again.losses == found.losses


def test_one_batch_of_all_models_is_a_soup_on_the_hyperplane() -> None:
    """With every model in the batch: θ = c + Σ Pᵢ Xᵢ, one AdamW step by hand."""
    _, models = family(3)
    found = mehl_soup(Small(), models, DATA, model_batch=3, epochs=1, steps=1, lr=0.01, batch=48)
    mean = weft.materialize(weft.merge(models, "linear"), Small())
    F.cross_entropy(mean(DATA[0]), DATA[1]).backward()
    for name, p in mean.named_parameters():
        assert p.grad is not None
        expected = p.detach().clone()
        for m in models:
            away = m.state_dict()[name] - p.detach()
            unit = away / away.norm()
            expected = expected - 0.01 * (p.grad * unit).sum().sign() * unit  # Adam's first step
        torch.testing.assert_close(found.checkpoint().tensor(name), expected, rtol=1e-4, atol=1e-6)


def test_models_that_are_all_the_same_stay() -> None:
    base, _ = family(1)
    found = mehl_soup(Small(), [base, base], DATA, model_batch=2, epochs=1, steps=2)
    for n, t in base.state_dict().items():
        torch.testing.assert_close(found.checkpoint().tensor(n), t)


def test_soups_that_cannot_be_meant() -> None:
    _, models = family(2)
    for settings in ({"model_batch": 0}, {"epochs": 0}):
        with pytest.raises(UsageError, match="must be 1 or more"):
            mehl_soup(Small(), models, DATA, **settings)
    with pytest.raises(UsageError, match="needs labels"):
        learned_soup(Small(), models, DATA[0], steps=1)
