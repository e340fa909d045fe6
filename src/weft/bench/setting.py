"""What a contender gets: the suite's models in memory, examples it may see, statistics measured once for all.

Only `validation` and `train` examples are handed out, and test inputs (without labels) to those that say so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn

from weft.bench.score import Loaded, moved
from weft.bench.suite import Suite, Task
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError, WeftWarning

State = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Seconds and bytes beyond what was held before; None where the system does not tell."""

    seconds: float
    peak: int | None


class Setting:
    """One suite under test."""

    def __init__(self, suite: Suite, samples: int = 64) -> None:
        self.suite, self.samples = suite, samples
        self.loaded = Loaded(suite)
        self._measured: dict[str, tuple[list[Checkpoint], float]] = {}

    @property
    def tasks(self) -> list[Task]:
        return list(self.suite.tasks)

    @cached_property
    def base(self) -> Checkpoint | None:
        """The base in memory."""
        if self.suite.base is None:
            return None
        return StateDict(load(self.suite.base).state_dict(), "base")

    @cached_property
    def models(self) -> list[Checkpoint]:
        """The experts in memory."""
        named = zip(self.tasks, self.suite.models, strict=True)
        return [StateDict(m.state_dict(), t.name) for t, m in named]

    @cached_property
    def size(self) -> int:
        """Numbers in one model."""
        return sum(i.numel for i in self.models[0].tensors.values())

    def module(self) -> nn.Module:
        """The suite's network, for contenders that run it themselves."""
        return self.suite.module().eval()

    def split(self, task: Task) -> str:
        """Where examples for data-driven merging come from: training examples, or else validation's."""
        for split in ("train", "validation"):
            if split in task.splits:
                return split
        raise UsageError(f"task {task.name!r} has neither train nor validation examples to measure on")

    def inputs(self, task: Task, split: str | None = None, limit: int | None = None) -> Tensor:
        """[n, …] inputs as one tensor; UsageError where they are several."""
        found = [x for x, _ in task.batches(split or self.split(task), limit or self.samples)]
        if not all(isinstance(x, Tensor) for x in found):
            raise UsageError(
                f"task {task.name!r} has inputs that are no tensors: this method cannot take them"
            )
        return torch.cat(found)

    def labels(self, task: Task, split: str | None = None, limit: int | None = None) -> Tensor:
        """[n, …] targets."""
        return torch.cat([y for _, y in task.batches(split or self.split(task), limit or self.samples)])

    def statistics(self, kinds: Sequence[str]) -> tuple[list[Checkpoint], float]:
        """Statistics of every expert on `samples` examples of its own task, without labels; and the seconds it took
        when they were measured."""
        key = ",".join(kinds)
        if key not in self._measured:
            start = perf_counter()
            made = [
                self._measure(m, {t.name: self.samples}, kinds)
                for m, t in zip(self.models, self.tasks, strict=True)
            ]
            self._measured[key] = made, perf_counter() - start
        return self._measured[key]

    def base_statistics(self, kinds: Sequence[str]) -> tuple[Checkpoint, float]:
        """Statistics of the base on examples of all tasks, `samples` in all."""
        key = f"base {','.join(kinds)}"
        if key not in self._measured:
            if self.base is None:
                raise UsageError("statistics of the base need a base")
            start = perf_counter()
            share = max(1, self.samples // len(self.tasks))
            made = self._measure(self.base, {t.name: share for t in self.tasks}, kinds)
            self._measured[key] = [made], perf_counter() - start
        found, seconds = self._measured[key]
        return found[0], seconds

    def _measure(self, model: Checkpoint, samples: Mapping[str, int], kinds: Sequence[str]) -> Checkpoint:
        """On so many examples of each task; outputs are read as the task reads them, if it is one."""
        import weft

        of = [t for t in self.tasks if t.name in samples]
        alone = of[0] if len(of) == 1 else None
        module = self.loaded.take(model.state_dict(), alone)
        where = next(module.parameters()).device
        seen = [moved(x, where) for t in of for x, _ in t.batches(self.split(t), samples[t.name])]
        read = (alone or Task("all", {"test": []})).outputs
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", WeftWarning)  # layers without inputs are the method's business
            return weft.measure(module, seen, list(kinds), forward=read)


@contextmanager
def costs() -> Iterator[Callable[[], Cost]]:
    """Time and peak memory of what is done inside; call what is given afterwards."""
    start, before = perf_counter(), _reset()

    def read() -> Cost:
        peak = _peak()
        return Cost(perf_counter() - start, None if before is None or peak is None else max(0, peak - before))

    yield read


def _reset() -> int | None:
    """Bytes in use, with the system's mark of the highest set back to them."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _peak() -> int | None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated())
    return _status("VmHWM")


def _status(key: str) -> int | None:
    """A line of /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{key}:")), None)
    return None if found is None else 1024 * int(found.split()[1])
