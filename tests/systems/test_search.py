"""Sections 2.2.3.2 and 2.3.1: coefficients and layers that a search on validation data chooses."""

from __future__ import annotations

import copy

import pytest
import torch
from lab import World, average
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("optuna")

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet
from weft.demo.tasks import TASKS, examples
from weft.systems.weighted import evolved_layers, evolved_parameters, grid_search, merged_checkpoints


def test_evolved_curves_beat_the_best_single_weight(shipped: World) -> None:
    """CMA-ES over weight and density by depth against the best of 21 shared weights, 150 candidates."""
    tasks = ("rotated", "mirrored")
    experts = [shipped.experts[t] for t in tasks]

    def score(made: Checkpoint) -> float:
        return likelihood(made, tasks, "validation")

    def plain(weight: float) -> Checkpoint:
        return weft.merge(experts, "dare_ties", base=shipped.base, weight=weight, density=0.5)

    grid = grid_search(plain, score)
    found = evolved_parameters(experts, shipped.base, score, validation="validation", points=3, trials=150)
    assert found.best.scores["score"] > grid.score
    assert likelihood(found.checkpoint, tasks, "test") > likelihood(grid.checkpoint, tasks, "test")
    assert average(found.checkpoint, tasks) >= average(grid.checkpoint, tasks) - 0.01
    assert average(found.checkpoint, tasks) > average(shipped.base, tasks) + 0.05


@torch.no_grad()
def likelihood(model: object, tasks: tuple[str, ...], split: str) -> float:
    """Mean log likelihood of the labels, over tasks: what accuracy is a coarse view of."""
    net = as_network(model)  # type: ignore[arg-type]
    told = [examples(t, split) for t in tasks]  # type: ignore[arg-type]
    return -sum(float(F.cross_entropy(net(x), y)) for x, y in told) / len(told)


def run_of_checkpoints(start: DigitNet, seed: int, epochs: int, rate: float) -> list[nn.Module]:
    """A noisy training run at a constant rate; the model after every epoch."""
    net = copy.deepcopy(start).requires_grad_(True)
    x, y = (torch.cat(v) for v in zip(*(examples(t, "train") for t in TASKS), strict=True))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    kept: list[nn.Module] = []
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
        kept.append(copy.deepcopy(net).eval().requires_grad_(False))
    return kept


def test_twelve_evaluations_find_what_a_fine_grid_finds(bases: dict[int, DigitNet]) -> None:
    """Two neighbouring checkpoints of a real run at a high rate, scored by log likelihood."""
    tasks = tuple(TASKS)
    for seed, base in list(bases.items())[:2]:
        earlier, later = run_of_checkpoints(base, seed, epochs=4, rate=4e-3)[-2:]

        def score(made: Checkpoint) -> float:
            return likelihood(made, tasks, "validation")

        grid = [
            score(weft.merge([later, earlier], "linear", weight=[i / 49, 1 - i / 49])) for i in range(25, 50)
        ]
        found = merged_checkpoints(earlier, later, score, validation="validation")
        parents = [likelihood(m, tasks, "validation") for m in (earlier, later)]
        assert len(found.trials) == 12
        assert found.best.scores["score"] > max(grid) - 0.05 * (max(grid) - min(grid)) - 1e-3
        assert found.best.scores["score"] > parents[1] + 0.01
        tested = likelihood(found.checkpoint, tasks, "test")
        assert tested > likelihood(later, tasks, "test")


class Residual(nn.Module):
    """Blocks that read a normalised stream and add to it, as a transformer's do."""

    WIDTH = 48

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Linear(64, self.WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(self.WIDTH, 96), "down_proj": nn.Linear(96, self.WIDTH)})
            for _ in range(blocks)
        )
        self.head = nn.Linear(self.WIDTH, 10)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        h = self.embed(x)
        for t, layer in enumerate(self.layers):
            h = h if scales is None else h * scales[t]
            h = h + layer["down_proj"](F.gelu(layer["up"](normed(h))))
        out: Tensor = self.head(normed(h))
        return out


def normed(h: Tensor) -> Tensor:
    return F.rms_norm(h, h.shape[-1:], eps=1e-12)


def as_residual(made: Checkpoint) -> Residual:
    blocks = 1 + max(int(n.split(".")[1]) for n in made if n.startswith("layers."))
    net = Residual(blocks)
    weft.materialize(made, net)
    return net.eval()


def taught(
    start: nn.Module, task: str, seed: int, epochs: int, rate: float = 2e-3, mixed: str = ""
) -> nn.Module:
    net = copy.deepcopy(start).requires_grad_(True)
    told = [examples(t, "train") for t in (task, mixed) if t]  # type: ignore[arg-type]
    x, y = (torch.cat(v) for v in zip(*told, strict=True))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    for _ in range(epochs):
        for i in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i]), y[i]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@torch.no_grad()
def mixture(made: Checkpoint, split: str, tasks: tuple[str, ...] = ("rotated", "mirrored")) -> float:
    """Mean log likelihood over both tasks."""
    net = as_residual(made)
    told = [examples(t, split) for t in tasks]  # type: ignore[arg-type]
    return -sum(float(F.cross_entropy(net(x), y)) for x, y in told) / len(told)


def test_an_evolved_path_serves_both_tasks_better_than_either_model() -> None:
    torch.manual_seed(0)
    base = taught(Residual(), "upright", 0, epochs=6)
    parents = [weft.load(taught(base, t, i, epochs=2)) for i, t in enumerate(("rotated", "mirrored"))]
    found = evolved_layers(
        parents, lambda made: mixture(made, "validation"), validation="validation", trials=220, seed=0
    )
    best = max(mixture(p, "validation") for p in parents)
    assert found.trials[0].scores != found.trials[1].scores
    assert max(t.scores["<lambda>"] for t in found.trials[:2]) == pytest.approx(best, abs=1e-5)
    assert found.best.scores["<lambda>"] > best + 0.05
    assert mixture(found.checkpoint, "test") > max(mixture(p, "test") for p in parents) + 0.03
