"""Runs that meet again and again: DART on digits, a branch an augmentation, four seeds."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from statistics import mean
from typing import Any

import pytest
import torch
from lab import UPRIGHT, Data, joined
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.network import DigitNet
from weft.demo.tasks import examples
from weft.errors import UsageError
from weft.systems.ood import dart
from weft.train import finetune

BATCH, STEPS, PERIOD = 32, 600, 50
Draw = Callable[[torch.Generator], Data]


def shifted(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image a pixel up or down and left or right, or not."""
    windows = nn.functional.pad(x.reshape(-1, 8, 8), (1, 1, 1, 1), value=-1.0).unfold(1, 8, 1).unfold(2, 8, 1)
    i, j = torch.randint(3, (2, len(x)), generator=g)
    return windows[torch.arange(len(x)), i, j].flatten(1)


def cut(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image without a square of 3×3."""
    place, at = torch.arange(8), torch.randint(6, (2, len(x), 1), generator=g)
    rows, columns = ((place >= a) & (place < a + 3) for a in at)
    return x.masked_fill((rows[:, :, None] & columns[:, None]).flatten(1), -1.0)


def noisy(x: Tensor, g: torch.Generator) -> Tensor:
    return x + 0.4 * torch.randn(x.shape, generator=g)


AUGMENTED = (shifted, cut, noisy)


def drawn(augment: Callable[[Tensor, torch.Generator], Tensor]) -> Draw:
    """Batches of the training images."""
    x, y = examples(UPRIGHT, "train")

    def draw(g: torch.Generator) -> Data:
        i = torch.randint(len(x), (BATCH,), generator=g)
        return augment(x[i], g), y[i]

    return draw


def mixed(x: Tensor, g: torch.Generator) -> Tensor:
    """Each image under one of the three."""
    which = torch.randint(3, (len(x),), generator=g)
    return torch.stack([a(x, g) for a in AUGMENTED])[which, torch.arange(len(x))]


def measured(model: Checkpoint) -> tuple[float, float]:
    """Loss and accuracy on all images that were not trained on."""
    x, y = joined([examples(UPRIGHT, s) for s in ("test", "validation", "pretrain")])  # type: ignore[arg-type]
    net = weft.materialize(model, DigitNet())
    with torch.no_grad():
        out = net(x)
    return float(nn.functional.cross_entropy(out, y)), float((out.argmax(1) == y).double().mean())


def test_branches_that_meet_again_and_again_are_ahead_of_one_mean_at_the_end_and_of_one_long_run() -> None:
    """Over eight seeds the losses were 0.070, 0.215 and 0.085, the accuracies 97.6, 93.6 and 97.5 %."""
    met, alone = [], []
    branches = [drawn(a) for a in AUGMENTED]
    for seed in (1, 2, 3):
        net = DigitNet(torch.Generator().manual_seed(seed))
        how: dict[str, Any] = {"lr": 0.1, "optimizer": "sgd", "seed": seed}
        met.append(measured(dart(net, branches, period=PERIOD, steps=STEPS, **how)))
        alone.append(measured(finetune(net, drawn(mixed), steps=3 * STEPS, **how).checkpoint))
    # the same budget in one run: a higher loss, at the same accuracy
    assert mean(v[0] for v in met) < 0.95 * mean(v[0] for v in alone)
    assert mean(v[1] for v in met) > mean(v[1] for v in alone) - 0.004
    once = measured(dart(net, branches, period=STEPS, steps=STEPS, **how))
    assert met[-1][0] < 0.6 * once[0] and met[-1][1] > once[1] + 0.01


def test_meeting_after_every_step_is_descent_along_the_mean_gradient() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    data = [(torch.randn(8, 5).double(), torch.randint(3, (8,))) for _ in range(3)]
    how: dict[str, Any] = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.3), "schedule": "constant"}
    made = dart(net, data, period=1, steps=4, batch=8, **how)
    want = deepcopy(net)
    for _ in range(4):
        losses = [nn.functional.cross_entropy(want(x), y) for x, y in data]
        grads = torch.autograd.grad(torch.stack(losses).mean(), list(want.parameters()))
        with torch.no_grad():
            for p, g in zip(want.parameters(), grads, strict=True):
                p -= 0.3 * g
    for name, p in want.named_parameters():
        torch.testing.assert_close(made.tensor(name), p.detach(), rtol=1e-10, atol=1e-12)
    with pytest.raises(UsageError, match="1 data sets, period 1"):
        dart(net, data[:1], period=1, steps=4)
    with pytest.raises(UsageError, match="period 5 of 4 steps"):
        dart(net, data, period=5, steps=4)
