"""Section 2.4.3: robustness to corrupted images, which fine-tuning on clean ones costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from lab import UPRIGHT, Data, correct, tuned
from torch.nn import functional as F

from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet, network
from weft.demo.tasks import Split, examples
from weft.demo.train import fit, joined
from weft.learn import learned_soup
from weft.systems.ood import diwa, greedy_soup, model_stock, uniform_soup, wise_ft


def corrupted(data: Data, seed: int) -> list[Data]:
    """Noise, blur, low contrast, a shift."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    blurred = F.conv2d(x.reshape(-1, 1, 8, 8), torch.ones(1, 1, 3, 3) / 9, padding=1).flatten(1)
    shifted = x.reshape(-1, 8, 8).roll(1, 2).flatten(1)
    noisy = x + 0.9 * torch.randn(x.shape, generator=generator)
    return [(noisy, y), (blurred, y), (0.35 * x - 0.3, y), (shifted, y)]


SPLITS: tuple[Split, ...] = ("train", "validation", "test")
CLEAN = examples(UPRIGHT, "test")
VALIDATION = examples(UPRIGHT, "validation")
SHIFTED = corrupted(CLEAN, 99)
RUNS = ((3e-4, 8), (1e-3, 8), (1e-3, 12), (2e-3, 8), (1.5e-2, 8))
"""Rate and epochs of the fine-tunes in a soup; the last rate is far too high."""


def robust(model: object) -> float:
    """Mean accuracy on the corrupted test images."""
    return sum(correct(model, d) for d in SHIFTED) / len(SHIFTED)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Runs:
    """A model trained a little on everything, and fine-tunes of it on clean images."""

    zero_shot: DigitNet
    long: DigitNet
    soup: list[DigitNet]


@pytest.fixture(scope="module")
def runs() -> list[Runs]:
    made = []
    few: Data = tuple(v[:250] for v in examples(UPRIGHT, "pretrain"))  # type: ignore[assignment]
    train = examples(UPRIGHT, "train")
    for seed in (1, 2, 3):
        net = DigitNet(torch.Generator().manual_seed(seed))
        fit(net, joined([few, *corrupted(few, seed)]), epochs=15, rate=1e-3, seed=seed, head=True)
        start = network(net.state_dict())
        long = tuned(start, train, seed, epochs=25, rate=1e-3)
        soup = [
            tuned(start, train, 10 * seed + i, epochs=epochs, rate=rate)
            for i, (rate, epochs) in enumerate(RUNS)
        ]
        made.append(Runs(start, long, soup))
    return made


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_wise_ft_regains_robustness_at_little_cost(runs: list[Runs]) -> None:
    over_zero_shot = []
    for r in runs:
        made = wise_ft(r.zero_shot, r.long)
        assert correct(r.long, CLEAN) > correct(r.zero_shot, CLEAN) + 0.02
        assert robust(made) > robust(r.long) + 0.01
        assert correct(made, CLEAN) > correct(r.long, CLEAN) - 0.02
        assert correct(made, CLEAN) > correct(r.zero_shot, CLEAN) + 0.015
        over_zero_shot.append(robust(made) - robust(r.zero_shot))
    assert mean(over_zero_shot) > 0


def validated(model: Checkpoint) -> float:
    return correct(model, VALIDATION)


def validation_loss(model: Checkpoint) -> float:
    inputs, labels = VALIDATION
    with torch.no_grad():
        return float(F.cross_entropy(as_network(model)(inputs), labels))


def test_a_greedy_soup_leaves_out_a_bad_run_and_a_learned_one_lowers_the_loss(runs: list[Runs]) -> None:
    outlier = len(RUNS) - 1
    for r in runs:
        uniform = uniform_soup(r.soup)
        greedy, kept = greedy_soup(r.soup, validated)
        assert outlier not in kept
        assert validated(greedy) >= max(correct(m, VALIDATION) for m in r.soup)
        assert correct(greedy, CLEAN) > correct(uniform, CLEAN) + 0.01
        assert correct(greedy, CLEAN) > max(correct(m, CLEAN) for m in r.soup) - 0.01

        # from equal weights; a run in another basin would lead the gradient astray
        good = r.soup[:outlier]
        found = learned_soup(DigitNet(), good, VALIDATION, steps=50, batch=250)
        learned, weights = found.checkpoint(), found.coefficients["all"].tolist()
        assert sum(weights) == pytest.approx(1) and max(weights) - min(weights) > 0.01
        assert validation_loss(learned) < validation_loss(uniform_soup(good))
        assert correct(learned, CLEAN) > correct(uniform, CLEAN) + 0.01


def test_an_average_of_diverse_runs_serves_an_unseen_domain_better_than_the_chosen_one() -> None:
    """Trained on blurred, faint and shifted images; noise is the domain that no run has seen."""
    over_chosen, over_mean = [], []
    few: Data = tuple(v[:250] for v in examples(UPRIGHT, "pretrain"))  # type: ignore[assignment]
    train, held_out, test = (corrupted(examples(UPRIGHT, s), 5 + i) for i, s in enumerate(SPLITS))
    data, validation = joined([tuple(v[:250] for v in d) for d in train[1:]]), joined(held_out[1:])  # type: ignore[misc]
    for seed in (1, 2, 3):
        net = DigitNet(torch.Generator().manual_seed(seed))
        fit(net, few, epochs=20, rate=1e-3, seed=seed, head=True)
        start, generator = network(net.state_dict()), torch.Generator().manual_seed(seed)
        made = []
        for i in range(6):
            rate = 10 ** (-2.8 + 0.5 * float(torch.rand(1, generator=generator)))
            epochs = int(torch.randint(8, 16, (1,), generator=generator))
            made.append(tuned(start, data, 100 * seed + i, epochs=epochs, rate=rate))
        average, kept = diwa(made)
        assert kept == list(range(6))
        alone = [correct(r, test[0]) for r in made]
        chosen = max(range(6), key=lambda i: correct(made[i], validation))
        over_chosen.append(correct(average, test[0]) - alone[chosen])
        over_mean.append(correct(average, test[0]) - mean(alone))
        restricted, few_kept = diwa(made, lambda m: correct(m, validation))
        assert chosen in few_kept and correct(restricted, validation) >= correct(made[chosen], validation)
    assert min(over_chosen) > 0 and mean(over_chosen) > 0.015
    assert min(over_mean) > 0 and mean(over_mean) > 0.005


def test_the_stock_of_two_runs_is_more_robust_than_their_mean(runs: list[Runs]) -> None:
    gains, costs = [], []
    for r in runs:
        two = r.soup[2:4]
        stock, average = model_stock(two, r.zero_shot), uniform_soup(two)
        gains.append(robust(stock) - robust(average))
        costs.append(correct(average, CLEAN) - correct(stock, CLEAN))
    assert min(gains) > -0.002 and mean(gains) > 0.004
    assert mean(costs) < 0.01


def test_the_stock_of_equals_is_they_and_of_strangers_the_base() -> None:
    base = {"w": torch.zeros(2)}
    a, b = {"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}
    torch.testing.assert_close(model_stock([a, dict(a)], base).tensor("w").float(), a["w"])
    torch.testing.assert_close(model_stock([a, b], base).tensor("w").float(), base["w"])
