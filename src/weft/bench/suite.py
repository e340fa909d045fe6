"""What the benchmark runs on: a suite is a network, tasks with their data, a base and an expert a task.

    suite = Suite("mine", make_module, [Task("cats", splits), Task("dogs", splits)], base=base, experts=experts)
    weft.bench(suite, methods=["linear", "ties"])

A model is anything `weft.load` takes. Heads stay out of the merge in one of two ways: all tasks share one head, of
whose outputs a task reads its own columns (`classes`), or a task brings the head's tensors itself (`private`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import Problems, UsageError
from weft.train.forward import logits_of

Examples = tuple[Any, Tensor]
"""Inputs (a tensor, or a mapping of keywords) and targets [n] or [n, t], −100 where nothing counts."""
Data = Examples | Iterable[Examples]
"""All examples at once, or batches of them (a DataLoader)."""
Metric = Literal["accuracy", "perplexity"]
METRICS: tuple[Metric, ...] = ("accuracy", "perplexity")
BATCH = 64
"""Of an evaluation: small enough for the caches of a core."""


@dataclass(frozen=True)
class Task:
    """One task: its data by split, and how its outputs are read.

    `splits` needs "test"; "validation" is where coefficients are chosen, "train" gives the examples that
    data-driven methods may see. `corrupted` are other versions of the test split by the name of the damage. With a
    `score`, `score(module, split)` gives the number itself (an lm-eval task, say), and data are needed for
    statistics alone.
    """

    name: str
    splits: Mapping[str, Data] = field(default_factory=dict, repr=False)
    classes: tuple[int, int] | None = None
    """First and one past the last column of the output that are this task's; all by default."""
    metric: Metric = "accuracy"
    private: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Tensors of the task's own (its classifier) that replace the model's when the task is measured."""
    corrupted: Mapping[str, Data] = field(default_factory=dict, repr=False)
    score: Callable[[nn.Module, str], float] | None = None
    """score(module, split), a share of 1 that is better when higher."""

    def outputs(self, module: Callable[..., Any], inputs: Any) -> Tensor:
        """[n, …, own columns]"""
        made = logits_of(module(**inputs) if isinstance(inputs, Mapping) else module(inputs))
        return made if self.classes is None else made[..., self.classes[0] : self.classes[1]]

    def batches(self, split: str, limit: int | None = None) -> Iterator[Examples]:
        """The split's examples in batches, at most `limit` of them. UsageError where there is no such split."""
        if split in self.splits:
            data = self.splits[split]
        elif split in self.corrupted:
            data = self.corrupted[split]
        else:
            known = ", ".join(self.splits) or "none"
            raise UsageError(f"task {self.name!r} has no split {split!r} (it has {known})")
        yield from cut(data, limit)


def cut(data: Data, limit: int | None = None, size: int = BATCH) -> Iterator[Examples]:
    """Batches of at most `size`, `limit` examples in all."""
    whole = isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor)
    parts: Iterable[Any] = [data] if whole else data
    left = limit
    for inputs, targets in parts:
        n = len(targets) if left is None else min(left, len(targets))
        for start in range(0, n, size):
            stop = min(n, start + size)
            yield _rows(inputs, start, stop), targets[start:stop]
        if left is not None:
            left -= n
            if left <= 0:
                return


def _rows(inputs: Any, start: int, stop: int) -> Any:
    if isinstance(inputs, Mapping):
        return {k: v[start:stop] for k, v in inputs.items()}
    return inputs[start:stop]


@dataclass(frozen=True)
class Suite:
    """A network, its tasks, and the models to merge."""

    name: str
    module: Callable[[], nn.Module]
    """Makes the network; its values do not matter."""
    tasks: Sequence[Task]
    experts: Mapping[str, Model] = field(repr=False)
    """Task → model, one for each of `tasks`."""
    base: Model | None = field(default=None, repr=False)
    unseen: Sequence[Task] = ()
    """Tasks without an expert: what merging does to what nobody trained for."""
    joint: Model | None = field(default=None, repr=False)
    """A model trained on all tasks' data together, for reference."""
    about: str = ""
    seed: int = 0
    adapters: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Task → adapter, where the experts are adapters applied to the base."""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        names = [t.name for t in self.tasks]
        problems = [f"there are two tasks {n!r}" for n in sorted(set(names)) if names.count(n) > 1]
        problems += [f"task {n!r} has no expert" for n in names if n not in self.experts]
        problems += [f"expert {n!r} has no task" for n in self.experts if n not in names]
        problems += [
            f"task {t.name!r} has no test split"
            for t in (*self.tasks, *self.unseen)
            if "test" not in t.splits and t.score is None
        ]
        problems += [
            f"task {t.name!r}: the metric is {' or '.join(METRICS)}, not {t.metric!r}"
            for t in (*self.tasks, *self.unseen)
            if t.metric not in METRICS
        ]
        if len(names) < 2:
            problems.append("a suite needs two tasks to merge")
        if problems:
            raise Problems(f"the suite {self.name!r} cannot be run", problems)

    @property
    def models(self) -> list[Checkpoint]:
        """The experts in the order of the tasks."""
        return [load(self.experts[t.name]) for t in self.tasks]

    def first(self, n: int) -> Suite:
        """The suite of the first n tasks."""
        if not 2 <= n <= len(self.tasks):
            raise UsageError(
                f"{self.name} has {len(self.tasks)} tasks: it can be cut to 2 up to that, not {n}"
            )
        from dataclasses import replace

        kept = self.tasks[:n]
        return replace(
            self, name=f"{self.name} ({n} tasks)", tasks=kept, joint=None,
            experts={t.name: self.experts[t.name] for t in kept},
        )  # fmt: skip


def device() -> torch.device:
    """The GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
