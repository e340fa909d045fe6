"""Small real models for the acceptance tests of systems: the demo's network, tasks and training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import weft
from weft.checkpoints.base import Checkpoint
from weft.demo.evaluate import as_network
from weft.demo.network import DigitNet, network
from weft.demo.tasks import CONTROL, TASKS, examples
from weft.demo.train import EXPERT_EPOCHS, EXPERT_RATE, FEW, fit, joined

Data = tuple[Tensor, Tensor]
Model = Checkpoint | Mapping[str, Tensor] | nn.Module | str | Path
UPRIGHT = CONTROL.name


@dataclass(frozen=True)
class World:
    """One base and an expert a task, all of one seed; paths or modules, as `weft.load` takes them."""

    base: Path | nn.Module
    experts: Mapping[str, Path | nn.Module]

    @property
    def all(self) -> list[Path | nn.Module]:
        return list(self.experts.values())


def correct(model: Model, data: Data) -> float:
    """Fraction of `data` that the model classifies correctly."""
    inputs, labels = data
    with torch.inference_mode():
        return float((as_network(model)(inputs).argmax(1) == labels).double().mean())


def score(model: Model, task: str, split: str = "test") -> float:
    """Accuracy on one split of one of the demo's tasks."""
    return correct(model, examples(task, split))  # type: ignore[arg-type]


def average(model: Model, tasks: Sequence[str] = tuple(TASKS), split: str = "test") -> float:
    """Mean accuracy over tasks."""
    net = as_network(model)
    return sum(score(net, t, split) for t in tasks) / len(tasks)


def pretrained(seed: int, epochs: int = 30) -> DigitNet:
    """The demo's base: upright digits and a few of every task."""
    net = DigitNet(torch.Generator().manual_seed(seed))
    few = [tuple(v[:FEW] for v in examples(t, "pretrain")) for t in TASKS]
    start = joined([examples(UPRIGHT, "pretrain"), *few])  # type: ignore[list-item]
    fit(net, start, epochs=epochs, rate=1e-3, seed=seed, head=True)
    return network(net.state_dict())


def tuned(
    start: nn.Module, data: Data, seed: int, *, epochs: int = EXPERT_EPOCHS, rate: float = EXPERT_RATE,
    head: bool = False,
) -> DigitNet:  # fmt: skip
    """A copy of `start` fine-tuned on `data`; the classifier stays as it is unless `head`."""
    net = deepcopy(start)
    assert isinstance(net, DigitNet)
    fit(net, data, epochs=epochs, rate=rate, seed=seed, head=head)
    return net.requires_grad_(False)


def only(data: Data, keep: Callable[[Tensor], Tensor]) -> Data:
    """The examples whose labels `keep` selects."""
    inputs, labels = data
    chosen = keep(labels)
    return inputs[chosen], labels[chosen]


def random_step(base: Model, like: Model, seed: int) -> dict[str, Tensor]:
    """The base moved as far as `like` is from it, tensor by tensor, in a random direction."""
    start, end = weft.load(base).state_dict(), weft.load(like).state_dict()
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in start.items():
        noise = torch.randn(tensor.shape, generator=generator)
        length = (end[name].float() - tensor.float()).norm()
        moved[name] = tensor.float() + noise * (length / noise.norm())
    return moved
