"""Averages along a run: digits with a fifth of the labels wrong, SGD at a constant rate, three seeds."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import mean

import pytest
import torch
from lab import UPRIGHT, Data
from torch import nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.network import DigitNet
from weft.demo.tasks import examples
from weft.systems.ood import ensemble_of_averages, periodic_swa
from weft.train import Trace, Valley, finetune
from weft.train.hooks import State

SEEDS = (1, 2, 3)
STEPS, SLOW, FAST = 300, 0.01, 0.03


def noisy(data: Data, seed: int) -> Data:
    """A fifth of the labels drawn at random."""
    g = torch.Generator().manual_seed(seed)
    x, y = data
    return x, torch.where(torch.rand(len(y), generator=g) < 0.2, torch.randint(10, (len(y),), generator=g), y)


def losses(model: Checkpoint | nn.Module, split: str = "test") -> tuple[float, float]:
    """Cross-entropy and accuracy."""
    x, y = examples(UPRIGHT, split)  # type: ignore[arg-type]
    net = model if isinstance(model, nn.Module) else weft.materialize(model, DigitNet())
    with torch.no_grad():
        out = net(x)
        return float(nn.functional.cross_entropy(out, y)), float((out.argmax(1) == y).double().mean())


def validated(model: Checkpoint) -> float:
    return losses(model, "validation")[0]


def run(seed: int, rate: float = FAST, steps: int = STEPS, **hooks: object) -> Checkpoint:
    net = DigitNet(torch.Generator().manual_seed(seed))
    data = noisy(examples(UPRIGHT, "train"), seed)
    settings = {"batch": 16, "lr": rate, "optimizer": "sgd", "schedule": "constant", "seed": seed}
    return finetune(net, data, steps=steps, **settings, **hooks).checkpoint  # type: ignore[arg-type]


@dataclass
class Run:
    last: Checkpoint
    averages: dict[str, Trace]
    curve: dict[str, list[float]]
    """Test loss every 30 steps of the weights and of the latest average."""


def watched(seed: int, rate: float) -> Run:
    averages = {
        "swa": Trace("mean", start=0.5, every=10),
        "ema": Trace("ema", decay=0.98),
        "latest": Trace("last", every=10, size=6),
        "near": Trace("last", every=1, size=6),
    }
    curve: dict[str, list[float]] = {"weights": [], "latest": []}

    def look(state: State) -> None:
        now = weft.load(state.weights())
        curve["weights"].append(losses(now)[0])
        curve["latest"].append(losses(averages["latest"].checkpoint())[0])

    last = run(seed, rate, on_step=list(averages.values()), on_checkpoint=look, checkpoint_every=30)
    return Run(last, averages, curve)


@pytest.fixture(scope="module")
def fast() -> list[Run]:
    return [watched(s, FAST) for s in SEEDS]


@pytest.fixture(scope="module")
def slow() -> list[Run]:
    return [watched(s, SLOW) for s in SEEDS]


def gain(runs: list[Run], which: str) -> float:
    """How much lower the test loss of an average is than that of the last weights, over the seeds."""
    return mean(losses(r.last)[0] - losses(r.averages[which].checkpoint())[0] for r in runs)


def test_averages_along_a_run_are_better_than_its_end(fast: list[Run]) -> None:
    last = mean(losses(r.last)[1] for r in fast)
    for which in ("swa", "ema"):
        assert mean(losses(r.averages[which].checkpoint())[1] for r in fast) > last + 0.02, which
        assert gain(fast, which) > 0.05, which


def test_the_latest_average_gets_there_earlier(fast: list[Run]) -> None:
    for r in fast:
        target = mean(r.curve["weights"][-4:])
        reached = {n: next(i for i, v in enumerate(c) if v <= target) for n, c in r.curve.items()}
        assert reached["latest"] <= reached["weights"]
    area = {n: mean(sum(r.curve[n]) for r in fast) for n in ("weights", "latest")}
    assert area["latest"] < 0.9 * area["weights"]


def test_averaging_gains_more_at_a_high_rate(fast: list[Run], slow: list[Run]) -> None:
    assert gain(fast, "latest") > 2 * gain(slow, "latest")
    assert gain(fast, "latest") > gain(fast, "near")  # far apart


def test_restarts_from_averages_are_ahead_of_plain_training() -> None:
    """Early in a run, at the same number of steps."""
    plain = [losses(run(s, steps=100))[0] for s in SEEDS]
    restarted = []
    for s in SEEDS:
        net = DigitNet(torch.Generator().manual_seed(s))
        made, _ = periodic_swa(net, noisy(examples(UPRIGHT, "train"), s), period=25, steps=100, batch=16, lr=FAST,
                               optimizer="sgd", schedule="constant", seed=s)  # fmt: skip
        restarted.append(losses(made.checkpoint)[0])
    assert mean(restarted) < mean(plain) - 0.03


def test_an_average_that_validation_accepts_leaves_out_bad_states() -> None:
    """A run that goes astray after 150 steps: the plain mean follows it, the accepted one hardly."""
    g = torch.Generator().manual_seed(0)

    def astray(state: State) -> None:
        if state.step == 150:
            assert state.optimizer is not None
            for group in state.optimizer.param_groups:
                group["lr"] = group["initial_lr"] = 0.0
            for p in state.parameters.values():
                p.add_(2 * p.std() * torch.randn(p.shape, generator=g))

    for seed in SEEDS[:2]:
        chosen, plain = Trace("mean", every=10, accept=lambda m: -validated(m)), Trace("mean", every=10)
        last = run(seed, on_step=[astray, chosen, plain])
        assert len([s for s in chosen.steps if s >= 150]) <= 1 and chosen.scores == sorted(chosen.scores)
        best = losses(chosen.checkpoint())[0]
        assert best < losses(plain.checkpoint())[0] and best < losses(last)[0]


def test_the_valley_leaves_out_where_the_run_overfits() -> None:
    """On 100 images with wrong labels the validation loss falls, then rises."""
    x, y = examples(UPRIGHT, "train")
    for seed in SEEDS:
        swad, swa = Valley(validated, 10, ratio=0.1), Trace("mean", start=0.5, every=10)
        net = DigitNet(torch.Generator().manual_seed(seed))
        last = finetune(net, noisy((x[:100], y[:100]), seed), steps=250, batch=16, lr=SLOW, optimizer="sgd",
                        schedule="constant", seed=seed, on_step=[swad, swa]).checkpoint  # fmt: skip
        assert losses(swad.checkpoint())[0] < losses(swa.checkpoint())[0] < losses(last)[0]


def test_an_ensemble_of_averages_is_better_than_one_of_last_iterates() -> None:
    from weft.analysis.ensemble import Ensemble

    net = DigitNet(torch.Generator().manual_seed(0))
    averaged, runs = ensemble_of_averages(
        net, noisy(examples(UPRIGHT, "train"), 0), runs=3, start=60, steps=200, batch=16, lr=FAST, optimizer="sgd",
        schedule="constant",
    )  # fmt: skip
    plain = Ensemble([r.model for r in runs])
    assert losses(averaged)[0] < losses(plain)[0] - 0.02
    assert losses(averaged)[1] > mean(losses(r.checkpoint)[1] for r in runs)
