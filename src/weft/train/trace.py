"""Averages along one run: `Trace` is a hook that keeps weights while a model is trained.

    average = Trace("mean", start=0.75, every=steps_per_epoch)              SWA, arXiv:1803.05407
    finetune(module, data, schedule="constant", on_step=average, …)
    weft.save(average.checkpoint(), "out")

mean   θ̄ ← θ̄ + (θ − θ̄)/n                        SWA; with every=1 SMA (arXiv:2110.10832)
ema    θ̄ ← aθ̄ + (1 − a)θ,  a = min(1 − 1/n, decay)   a plain mean until it is as long as the window
last   the mean of the `size` latest              LAWA, arXiv:2209.14981; far apart arXiv:2306.03241
all    the mean of all, which are kept            what TWA and searches combine

Running statistics of BatchNorm are averaged like weights; `weft.calibrate(…, "batchnorm")` measures them anew.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError, did_you_mean
from weft.train.chart import wide
from weft.train.hooks import State

Keep = Literal["mean", "ema", "last", "all"]
Weights = dict[str, Tensor]
Score = Callable[[Checkpoint], float]


class Trace:
    """A hook for `on_step`, `on_checkpoint` or another trainer's callback.

    start    steps before the first that counts; below 1 a share of the run, whose length must then be known
    every    steps from one to the next
    decay    of `ema`
    size     how many `last` keeps
    accept   a score of an average on validation data, higher is better: a state is taken into the `mean` only if
             that does not lower it (ASWA, arXiv:2406.19092), and takes its place if it scores more by itself

    Weights are copied, averages kept in float32 at least. Raises UsageError for settings that cannot be meant,
    DataError where a score is not a finite number.
    """

    def __init__(
        self, keep: Keep = "mean", *, start: float = 0, every: int = 1, decay: float = 0.999, size: int = 5,
        accept: Score | None = None,
    ) -> None:  # fmt: skip
        if keep not in get_args(Keep):
            raise UsageError(
                f"keep must be mean, ema, last or all, not {keep!r}{did_you_mean(keep, get_args(Keep))}"
            )
        if every < 1 or size < 1 or start < 0 or (start > 1 and start != int(start)):
            raise UsageError(f"every and size must be 1 or more, start 0 or more: {every}, {size}, {start}")
        if not 0 <= decay < 1:
            raise UsageError(f"decay must be from 0 to below 1, not {decay}")
        if accept is not None and keep != "mean":
            raise UsageError("accept is for keep='mean'")
        self.keep, self.start, self.every, self.decay, self.accept = keep, start, every, decay, accept
        self.window: deque[Weights] = deque(maxlen=size if keep == "last" else None)
        self.average: Weights = {}
        self.count = 0
        """States in the average."""
        self.steps: list[int] = []
        """Steps whose weights were taken."""
        self.scores: list[float] = []
        """Of the average after each state that was seen, where `accept` is given."""
        self._dtypes: dict[str, torch.dtype] = {}

    def __call__(self, state: State) -> None:
        """Look at a run after a step."""
        first = self._first(state)
        if state.step >= max(first, 1) and (state.step - first) % self.every == 0:
            self.add(state.weights(), state.step)

    def _first(self, state: State) -> int:
        if 0 < self.start < 1:
            if state.steps is None:
                raise UsageError("this trainer does not tell how long the run is: give start in steps")
            return math.ceil(self.start * state.steps)
        return int(self.start)

    def add(self, weights: Mapping[str, Tensor], step: int = 0) -> None:
        """Take weights in, which are copied."""
        fresh = {n: wide(t) if is_mergeable(t.dtype) else t.detach().clone() for n, t in weights.items()}
        if self.keep in ("last", "all"):
            self.window.append(fresh)
            self.count = len(self.window)
        elif self.accept is None:
            self.count += 1
            rate = 1 / self.count if self.keep == "mean" else max(1 / self.count, 1 - self.decay)
            self.average = _towards(self.average, fresh, rate)
        elif not self._accepted(fresh):
            return
        self.steps.append(step)
        self._dtypes = {n: t.dtype for n, t in weights.items()}

    def _accepted(self, fresh: Weights) -> bool:
        """Try a state; the average is that of before, bit for bit, unless it is taken."""
        assert self.accept is not None
        tried = _towards(self.average, fresh, 1 / (self.count + 1))
        found, best = self._score(tried), self.scores[-1] if self.scores else -math.inf
        alone = found if self.count == 0 else self._score(fresh)
        if alone > max(best, found):
            self.average, self.count, best = fresh, 1, alone
        elif found >= best:
            self.average, self.count, best = tried, self.count + 1, found
        else:
            self.scores.append(best)
            return False
        self.scores.append(best)
        return True

    def _score(self, weights: Weights) -> float:
        assert self.accept is not None
        found = float(self.accept(StateDict(weights, "average along a run")))
        if not math.isfinite(found):
            raise DataError(f"the score of an average along the run is {found}: it must be a finite number")
        return found

    def states(self) -> list[Checkpoint]:
        """What `last` and `all` keep, the oldest first."""
        return [
            StateDict(w, f"weights after step {s}") for w, s in zip(self.window, self.steps[-self.count :])
        ]

    def checkpoint(self) -> Checkpoint:
        """The average, in the dtypes of the run; whole numbers are the latest. DataError before the first state."""
        if self.count == 0:
            raise DataError("no weights were taken yet: the run is shorter than start")
        if self.window:
            average: Weights = {}
            for n, weights in enumerate(self.window, 1):
                average = _towards(average, weights, 1 / n)
        else:
            average = self.average
        typed = {n: t.to(self._dtypes[n], copy=True) for n, t in average.items()}
        return StateDict(typed, f"average of {self.count} states of a run")

    def restart(self, state: State) -> Checkpoint | None:
        """A hook for `on_round`: go on from the average, and start it anew (periodic SWA). None before `start`."""
        if self.count == 0:
            return None
        found = self.checkpoint()
        self.window.clear()
        self.average, self.count, self.scores = {}, 0, []
        return found


def _towards(average: Weights, weights: Weights, rate: float) -> Weights:
    """θ̄ + rate·(θ − θ̄), new tensors; whole numbers are those of θ."""
    if not average:
        return weights
    return {n: torch.lerp(average[n], t, rate) if is_mergeable(t.dtype) else t for n, t in weights.items()}
