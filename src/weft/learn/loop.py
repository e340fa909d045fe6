"""`weft.learn`: gradient steps on what a merge is made of, and what came of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.learn.data import Feed, feeds
from weft.learn.losses import Loss, Shot, as_loss
from weft.learn.mergeable import Mergeable
from weft.statistics.batches import Batch
from weft.train.optimise import Factor, MakeOptimizer, make_optimizer, make_schedule

TEST_TIME = "test-time"
"""The `split` of methods that learn from the inputs they are then measured on."""


@dataclass
class Learned:
    """What learning gave. `merged` is left at the coefficients that were chosen."""

    merged: Mergeable
    losses: list[float]
    """The loss of every step, before it."""
    split: str
    """The data that chose: "test-time" where inputs of the test were among them."""
    validated: dict[int, float] = field(default_factory=dict)
    """Number of steps made → loss on the validation data."""
    counted: dict[str, int] = field(default_factory=dict)
    """What a method counts beside, such as `peak_bytes` (mehl_soup)."""

    @property
    def coefficients(self) -> dict[str, Tensor]:
        """By part of the parameters, the models along the first axis."""
        return self.merged.way.coefficients()

    @property
    def test_time(self) -> bool:
        """Whether inputs of the test were learned from: not to be ranked with methods that never saw them."""
        return self.split == TEST_TIME

    @property
    def step(self) -> int:
        """How many steps the chosen coefficients have had: the best on validation data, or all."""
        return (
            min(self.validated, key=lambda s: (self.validated[s], s)) if self.validated else len(self.losses)
        )

    def checkpoint(self, task: str | None = None) -> Checkpoint:
        """The merge, lazily; with the private parameters of a task. A manifest tells which data chose it."""
        made = self.merged.checkpoint(task)
        made.origin += f" by {self.split} data"
        return made

    def recipe(self, base: str | None = None, models: list[str] | None = None) -> dict[str, Any]:
        """The merge as a recipe, where its coefficients are one number a tensor or are a method's parameters.

        `base` and `models` are what the recipe calls them: by default as they were loaded. UsageError where models
        were given in memory and not named, or where the merge does not fit a recipe: then save its checkpoint.
        """
        write = getattr(self.merged.way, "recipe", None)
        if write is None:
            raise UsageError("a masked merge does not fit a recipe: save the checkpoint instead")
        if self.merged.private:
            raise UsageError("private parameters do not fit a recipe: save checkpoint(task) instead")
        made: dict[str, Any] = write(base, models)
        return made

    def to_json(self) -> dict[str, Any]:
        """Losses, validation and where the data came from, for a report."""
        return {
            "split": self.split, "test_time": self.test_time, "steps": len(self.losses), "chosen": self.step,
            "losses": self.losses, "validated": {str(s): v for s, v in self.validated.items()}, **self.counted,
        }  # fmt: skip


def learn(
    merged: Mergeable,
    loss: str | Loss,
    data: Any,
    *,
    steps: int,
    lr: float = 1e-3,
    optimizer: str | MakeOptimizer = "adam",
    weight_decay: float = 0.0,
    schedule: str | Factor = "constant",
    warmup: int = 0,
    batch: int = 16,
    seed: int = 0,
    split: str = "validation",
    validation: Any = None,
    every: int | None = None,
    clip: float | None = None,
) -> Learned:
    """Train what `merged` learns with `loss` (losses.py) on `data`, by task where it has tasks.

    Every step takes a batch of every task and minimises the mean of their losses. `split` says which data these
    are; "test-time" declares that they are inputs of the test. With `validation` (data of the same form, looked
    at `every` so many steps and at the end) the coefficients with the lowest loss there are kept; the start is
    looked at too.

    The same inputs and seed give the same coefficients on the same machine. Raises UsageError for what cannot be
    meant, and DataError with the step and task where a loss or gradient is no longer finite.
    """
    found = as_loss(loss)
    if steps < 0:
        raise UsageError(f"there cannot be {steps} steps")
    if every is not None and (every < 1 or validation is None):
        raise UsageError("every is a number of steps, from 1 up, between looks at validation data")
    device = merged.sources.device
    sources = feeds(data, merged.tasks, batch, seed, device)
    held_out = None if validation is None else feeds(validation, merged.tasks, 256, seed, device)
    trained: list[torch.nn.Parameter] = [p for p in merged.parameters() if p.requires_grad]
    if not trained:
        raise UsageError("nothing of this merge is left to train")
    made = make_optimizer(optimizer, list[Tensor](trained), lr, weight_decay)
    rate = make_schedule(made, schedule, warmup, steps)
    result = Learned(merged, [], split)
    best = _Best(merged, found, held_out, result)
    streams = {task: iter(feed) for task, feed in sources.items()}
    with seeded(seed, device):
        best.look(0)
        for step in range(1, steps + 1):
            made.zero_grad()
            result.losses.append(descend(merged, found, {t: next(s) for t, s in streams.items()}, step))
            check_gradients(trained, step)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(trained, clip)
            made.step()
            rate.step()
            merged.project()
            if step == steps or (every and step % every == 0):
                best.look(step)
    best.restore()
    return result


def descend(merged: Mergeable, loss: Loss, batches: Mapping[str | None, Batch], step: int) -> float:
    """Add the gradients of the mean over tasks of the loss; its value. DataError where it is not finite.

    The merged weights are made once for all tasks. Their gradients are gathered task by task, so that one task's
    activations are in memory at a time.
    """
    weights = merged.weights()
    leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
    total, depends = 0.0, False
    for task, batch in batches.items():
        value = loss(Shot(merged, leaves, batch, task))
        if not isinstance(value, Tensor) or value.numel() != 1:
            given = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"a loss gives one number as a tensor, not {given}")
        value = value / len(batches)
        told = float(value.detach())
        if not math.isfinite(told):
            place = f" for task {task!r}" if task is not None else ""
            raise DataError(
                f"the loss is {told} at step {step}{place}: lower lr, or look for values in the data or the models "
                "that are not finite"
            )
        total += told
        if value.requires_grad:
            depends = True
            value.backward()  # type: ignore[no-untyped-call]
    if not depends:
        raise UsageError("the loss does not depend on the merged weights: there is nothing to follow")
    names = [n for n, w in weights.items() if w.requires_grad and leaves[n].grad is not None]
    if names:
        torch.autograd.backward([weights[n] for n in names], [leaves[n].grad for n in names])
    return total


def check_gradients(trained: list[torch.nn.Parameter], step: int) -> None:
    """DataError where a gradient is not finite: the step would spoil the coefficients for good."""
    if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in trained):
        raise DataError(
            f"a gradient of the coefficients is NaN or infinite at step {step}: lower lr, or clip"
        )


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """What losses draw comes from `seed`, and the caller's random state stays as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class _Best:
    """Looks at validation data and keeps the parameters of the lowest loss."""

    def __init__(
        self, merged: Mergeable, loss: Loss, held_out: Mapping[str | None, Feed] | None, result: Learned
    ) -> None:
        self.merged, self.loss, self.held_out, self.result = merged, loss, held_out, result
        self.kept: list[Tensor] = []

    def look(self, step: int) -> None:
        if self.held_out is None:
            return
        value = mean_loss(self.merged, self.loss, self.held_out)
        if not math.isfinite(value):
            raise DataError(f"the loss on the validation data is {value} after {step} steps: lower lr")
        if value < min(self.result.validated.values(), default=math.inf):
            self.kept = [p.detach().clone() for p in self.merged.parameters()]
        self.result.validated[step] = value

    @torch.no_grad()
    def restore(self) -> None:
        if self.kept:
            for p, value in zip(self.merged.parameters(), self.kept, strict=True):
                p.copy_(value)


@torch.no_grad()
def mean_loss(merged: Mergeable, loss: Loss, held_out: Mapping[str | None, Feed]) -> float:
    """The mean over tasks of the mean over examples."""
    weights, found = merged.weights(), []
    for task, feed in held_out.items():
        parts = [(float(loss(Shot(merged, weights, b, task))), b.size) for b in feed.once()]
        found.append(sum(v * n for v, n in parts) / sum(n for _, n in parts))
    return sum(found) / len(found)
