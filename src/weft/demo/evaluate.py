"""How good a model is: accuracy on every task, relative to the experts, at worst, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.demo.network import network
from weft.demo.tasks import CONTROL, TASKS, Split, examples

Model: TypeAlias = Checkpoint | Mapping[str, Tensor] | nn.Module | str | Path
"""Anything the demo's weights can be had from; a path names a safetensors file."""


def as_network(model: Model) -> nn.Module:
    """A module to run, in float32. A lazy checkpoint is computed here, whole."""
    if isinstance(model, nn.Module):
        return model.eval()
    if isinstance(model, str | Path):
        from safetensors.torch import load_file

        return network(load_file(model))
    return network(model.state_dict() if isinstance(model, Checkpoint) else model)


def probabilities(model: Model, task: str, split: Split) -> Tensor:
    """Softmax outputs [n, 10] on one split of one task."""
    inputs, _ = examples(task, split)
    net = as_network(model)
    with torch.inference_mode():
        out: Tensor = net(inputs).softmax(1)
    return out


def accuracy(model: Model, task: str, split: Split = "test") -> float:
    """Fraction of one split of one task that the model classifies correctly."""
    _, labels = examples(task, split)
    return float((probabilities(model, task, split).argmax(1) == labels).double().mean())


@dataclass(frozen=True)
class Scores:
    """One model (or one model a task) on one split of all tasks."""

    accuracy: dict[str, float]
    """Task → fraction correct; the control too, unless the model is one that exists per task only."""
    by_original: Tensor = field(repr=False, compare=False)
    """[n]: for every original image the share of the tasks in which it is classified correctly.

    All tasks show the same originals, so originals are what is sampled, not their views: standard errors
    come from the variation of this vector, and two models are compared on it pairwise.
    """

    @property
    def average(self) -> float:
        """Mean over the tasks, without the control."""
        return sum(self.accuracy[t] for t in TASKS) / len(TASKS)

    @property
    def error(self) -> float:
        """Standard error of `average`."""
        return standard_error(self.by_original)

    @property
    def worst(self) -> tuple[str, float]:
        """The task with the lowest accuracy, and that accuracy."""
        return min(((t, self.accuracy[t]) for t in TASKS), key=lambda pair: pair[1])

    def relative(self, experts: Mapping[str, float]) -> float:
        """Mean over tasks of the accuracy divided by that of the task's expert."""
        return sum(self.accuracy[t] / experts[t] for t in TASKS) / len(TASKS)

    def versus(self, other: Scores) -> tuple[float, float]:
        """Difference of the averages, and its standard error image by image."""
        return self.average - other.average, standard_error(self.by_original - other.by_original)


def standard_error(x: Tensor) -> float:
    """Deviation of the mean of independent values x: [n]."""
    return float(x.std() / len(x) ** 0.5)


def scores_of(outputs: Mapping[str, Tensor], split: Split) -> Scores:
    """Scores from task → outputs [n, 10]."""
    right = {t: (out.argmax(1) == examples(t, split)[1]).double() for t, out in outputs.items()}
    return Scores(
        {t: float(r.mean()) for t, r in right.items()}, torch.stack([right[t] for t in TASKS]).mean(0)
    )


def evaluate(model: Model, split: Split = "test") -> Scores:
    """Scores of one model on all tasks and the control."""
    net = as_network(model)
    return scores_of({t: probabilities(net, t, split) for t in (*TASKS, CONTROL.name)}, split)


def evaluate_per_task(models: Mapping[str, Model], split: Split = "test") -> Scores:
    """Scores of task → model, each on its own task only: what a method reaches that is told the task."""
    return scores_of({t: probabilities(models[t], t, split) for t in TASKS}, split)


def evaluate_ensemble(models: Sequence[Model], split: Split = "test") -> Scores:
    """Scores of the mean of the models' softmax outputs: every input runs through every model."""
    nets = [as_network(m) for m in models]
    tasks = (*TASKS, CONTROL.name)
    return scores_of(
        {t: torch.stack([probabilities(n, t, split) for n in nets]).mean(0) for t in tasks}, split
    )


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Mean over repetitions with different seeds."""
    names = scores[0].accuracy
    return Scores(
        {t: sum(s.accuracy[t] for s in scores) / len(scores) for t in names},
        torch.stack([s.by_original for s in scores]).mean(0),
    )
