"""Averages along a run against their formulas, and where the valley of a loss begins and ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import weft
from weft.errors import DataError, UsageError
from weft.train import Trace, Valley, finetune
from weft.train.hooks import State
from weft.train.valley import valley


def steps(count: int) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"w": torch.randn(3, 2, generator=g).bfloat16(), "n": torch.tensor(i)} for i in range(count)]


def fed(trace: Trace, count: int = 9) -> Trace:
    for i, weights in enumerate(steps(count), 1):
        trace.add(weights, i)
    return trace


def test_a_mean_is_the_mean_in_float32_and_rounded_once() -> None:
    found = fed(Trace()).checkpoint()
    right = torch.stack([s["w"].float() for s in steps(9)]).mean(0)
    torch.testing.assert_close(found.tensor("w"), right.bfloat16())
    assert found.tensor("w").dtype == torch.bfloat16 and int(found.tensor("n")) == 8  # the latest


def test_an_exponential_average_begins_as_a_mean() -> None:
    trace = Trace("ema", decay=0.75)
    right = torch.zeros(3, 2, dtype=torch.float64)
    for n, weights in enumerate(steps(9), 1):
        trace.add(weights)
        decay = min(1 - 1 / n, 0.75)
        right = decay * right + (1 - decay) * weights["w"].double()
        torch.testing.assert_close(trace.average["w"].double(), right, atol=1e-6, rtol=1e-6)


def test_the_last_are_kept_and_no_more() -> None:
    trace = fed(Trace("last", size=4))
    assert trace.count == 4 and trace.steps[-4:] == [6, 7, 8, 9]
    right = torch.stack([s["w"].float() for s in steps(9)[-4:]]).mean(0)
    torch.testing.assert_close(trace.checkpoint().tensor("w"), right.bfloat16())
    torch.testing.assert_close(trace.states()[0].tensor("w"), steps(9)[5]["w"].float())
    assert fed(Trace("all")).count == 9


def test_snapshots_do_not_follow_the_run() -> None:
    live = {"w": torch.ones(2)}
    for keep in ("mean", "ema", "last", "all"):
        trace = Trace(keep)  # type: ignore[arg-type]
        trace.add(live)
        live["w"].fill_(7)
        assert trace.checkpoint().tensor("w").tolist() == [1, 1], keep
        live["w"].fill_(1)


def test_what_is_not_accepted_leaves_the_average_bit_for_bit() -> None:
    scores = iter([1.0, 0.5, 0.4])  # the first; the second with it, and alone
    trace = Trace(accept=lambda m: next(scores))
    first, second = steps(2)
    trace.add(first, 1)
    before = {n: t.clone() for n, t in trace.average.items()}
    trace.add(second, 2)
    assert all(torch.equal(t, trace.average[n]) for n, t in before.items())
    assert trace.count == 1 and trace.steps == [1] and trace.scores == [1.0, 1.0]


def test_when_weights_are_taken() -> None:
    module = nn.Linear(2, 2)
    data = (torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1] * 4))
    late, share = Trace(start=4, every=3), Trace(start=0.5, every=2)
    made = finetune(module, data, steps=10, batch=4, on_step=[late, share])
    assert late.steps == [4, 7, 10] and share.steps == [5, 7, 9]
    assert set(late.checkpoint()) == set(weft.load(made.checkpoint))
    with pytest.raises(UsageError, match="how long the run is"):
        Trace(start=0.5)(State(1, None, 0.0, 0.0, {}, {}, None, module))


@pytest.mark.parametrize("settings", [
    {"keep": "meen"}, {"every": 0}, {"keep": "last", "size": 0}, {"start": -1}, {"start": 1.5},
    {"keep": "ema", "decay": 1.0}, {"keep": "ema", "accept": lambda m: 0.0},
])  # fmt: skip
def test_settings_that_cannot_be_meant(settings: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Trace(**settings)  # type: ignore[arg-type]


def test_nothing_taken_and_scores_that_are_no_numbers() -> None:
    with pytest.raises(DataError, match="no weights were taken"):
        Trace().checkpoint()
    with pytest.raises(DataError, match="finite"):
        Trace(accept=lambda m: float("nan")).add(steps(1)[0])


@pytest.mark.parametrize(("losses", "found"), [
    ([5, 4, 3, 2, 2.1, 2.2, 2.0, 2.1, 5, 5, 5, 5, 5, 5], range(3, 8)),
    ([5, 4, 3, 2, 1], range(0)),  # still falling
    ([1, 1, 1, 1], range(4)),
    ([3, 1, 2, 2, 9, 9, 9, 9, 9, 1], range(1, 10)),  # six bad ones in a row end it, five do not
    ([3, 1, 2, 2, 9, 9, 9, 9, 9, 9], range(1, 4)),
])  # fmt: skip
def test_where_the_valley_is(losses: list[float], found: range) -> None:
    assert valley(losses) == found


def test_a_valley_is_the_mean_of_its_iterates_and_then_looks_no_further() -> None:
    module, seen = nn.Linear(2, 1, bias=False), []
    curve = iter([3.0, 1.0, 2.0, 2.0, *[9.0] * 6])
    hook = Valley(lambda m: next(curve), every=2)
    for step in range(1, 40):
        with torch.no_grad():
            module.weight.fill_(step)
        seen.append(float(step))
        hook(State(step, 40, 0.0, 0.0, {}, {}, None, module))
    assert hook.over and hook.segments == range(1, 4) and len(hook.losses) == 10
    assert hook.checkpoint().tensor("weight").tolist() == [[sum(seen[2:8]) / 6] * 2]
    with pytest.raises(DataError, match="never settled"):
        Valley(lambda m: 1.0, every=2).checkpoint()
