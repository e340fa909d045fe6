"""How good a model is on a task: accuracy or perplexity, and how far its confidence is from its accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.bench.suite import Suite, Task, device
from weft.errors import DataError

BINS = 15


@dataclass(frozen=True)
class Score:
    """One model on one split of one task."""

    value: float
    """Accuracy, a share of 1; or perplexity, exp of the mean −log p of a target."""
    ece: float | None = None
    count: int = 0


def score(model: nn.Module, task: Task, split: str = "test", limit: int | None = None) -> Score:
    """The model (in evaluation mode) on one split. DataError where outputs are not finite."""
    if task.score is not None:
        return Score(float(task.score(model, split)))
    where = next((p.device for p in model.parameters()), torch.device("cpu"))
    right, sure, lost, count = [], [], 0.0, 0
    with torch.inference_mode():
        for inputs, targets in task.batches(split, limit):
            out = task.outputs(model, moved(inputs, where)).float().flatten(0, -2)
            t = targets.to(where).flatten()
            out, t = out[t != -100], t[t != -100]
            if not bool(out.isfinite().all()):
                raise DataError(f"the merged model's outputs on {task.name} are not finite")
            lost += float(F.cross_entropy(out, t, reduction="sum"))
            count += len(t)
            if task.metric == "accuracy":
                p, guess = out.softmax(-1).max(-1)
                right.append((guess == t).double().cpu())
                sure.append(p.double().cpu())
    if not count:
        raise DataError(f"task {task.name!r}: split {split!r} holds no target that counts")
    if task.metric == "perplexity":
        return Score(math.exp(min(lost / count, 700.0)), None, count)
    hits, confidence = torch.cat(right), torch.cat(sure)
    return Score(float(hits.mean()), calibration_error(hits, confidence), count)


def calibration_error(right: Tensor, sure: Tensor, bins: int = BINS) -> float:
    """ECE = Σ_b |B_b|/n · |accuracy − mean confidence| of B_b, equal bins of confidence; right, sure: [n]."""
    place = (sure * bins).long().clamp_(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, place, right.double() - sure.double())
    return float(gap.abs().sum() / len(right))


def moved(x: Any, where: torch.device) -> Any:
    """Tensors, and those in a mapping, on the device."""
    if isinstance(x, Mapping):
        return {k: moved(v, where) for k, v in x.items()}
    return x.to(where) if isinstance(x, Tensor) else x


class Loaded:
    """The suite's network, which takes the values of one model after the other."""

    def __init__(self, suite: Suite) -> None:
        self.module = suite.module().eval().requires_grad_(False).to(device())
        self.holds: set[str] = set(self.module.state_dict())

    def take(self, state: Mapping[str, Tensor], task: Task | None = None) -> nn.Module:
        """The network with these values, and with the task's own where it has some."""
        values = dict(state) | (dict(task.private) if task is not None else {})
        found = self.module.load_state_dict(
            {k: v for k, v in values.items() if k in self.holds}, strict=False
        )
        tied = {n: t.data_ptr() for n, t in self.module.state_dict().items()}
        present = {tied[n] for n in values if n in tied}
        missing = [n for n in found.missing_keys if tied[n] not in present]
        if missing:
            raise DataError(f"the model has no values for {missing[0]!r} of the suite's network")
        return self.module

    def fresh(self, state: Mapping[str, Tensor], task: Task | None = None) -> nn.Module:
        """The same, as a module of its own."""
        return deepcopy(self.take(state, task))
