"""Measuring candidates: merged in memory over inputs that are read once, here or on Ray's workers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.errors import MissingExtra, UsageError, WeftError
from weft.search.cache import Remembered, Resident, Store
from weft.search.candidates import Loader, Source
from weft.search.objective import Objective, ObjectiveError
from weft.search.space import Settings


@dataclass(frozen=True)
class Outcome:
    """A candidate's numbers, in the order of the objectives; or why it has none."""

    scores: tuple[float, ...] = ()
    reason: str = ""
    seconds: float = 0.0


class Evaluator:
    """Builds candidates over resident inputs and measures them."""

    def __init__(
        self, source: Source, objectives: Sequence[Objective], memory: int, threads: int,
        loader: Loader | None = None,
    ) -> None:  # fmt: skip
        self.source, self.objectives, self.threads = source, tuple(objectives), threads
        self.store = Store(memory)
        self._loader = loader
        self._loaded: dict[str, Checkpoint] = {}

    def load(self, ref: Any) -> Checkpoint:
        """A model, loaded once a search; what comes from files is kept in memory as far as it fits."""
        key = str(ref)
        if key not in self._loaded:
            from weft.checkpoints.load import load

            made = (self._loader or load)(ref)
            self._loaded[key] = Resident(made, self.store) if made.files else made
        return self._loaded[key]

    def candidate(self, settings: Settings) -> Checkpoint:
        """The candidate, unread; its values are those that saving it would write."""
        return Remembered(self.source.build(settings, self.load), self.store)

    def measure(self, settings: Settings, test: bool = False) -> Outcome:
        """Every objective of a candidate on its validation (or test) split.

        A merge that is refused and a number that is none are outcomes; errors of an objective's own raise
        UsageError. With `test`, objectives without a test split are left out.
        """
        began = time.monotonic()
        scores = []
        try:
            with _threads(self.threads):
                candidate = self.candidate(settings)
                for objective in self.objectives:
                    split = objective.test if test else objective.validation
                    if split is None:
                        continue
                    value = _measured(objective, candidate, split)
                    if not math.isfinite(value):
                        return Outcome((), f"{objective.name} is {value}", time.monotonic() - began)
                    scores.append(value)
        except (MissingExtra, ObjectiveError):
            raise
        except WeftError as error:
            return Outcome((), str(error), time.monotonic() - began)
        return Outcome(tuple(scores), "", time.monotonic() - began)


def _measured(objective: Objective, candidate: Checkpoint, split: str) -> float:
    try:
        return objective.measure(candidate, split)
    except WeftError:
        raise
    except Exception as error:
        raise ObjectiveError(
            f"objective {objective.name} failed on {split}: {type(error).__name__}: {error}"
        ) from error


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Merging on so many threads; torch's own, which the objective uses, stay as they are."""
    from dataclasses import replace

    from weft.checkpoints.execution import executing, execution
    from weft.engine.pool import WorkPool

    if threads <= 1:
        yield
        return
    with WorkPool(threads) as pool, executing(replace(execution(), map=pool.map)):
        yield


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def measuring(evaluator: Evaluator, jobs: int, executor: str) -> Iterator[Callable[[Settings], Outcome]]:
    """What measures a candidate: this process, or the workers of a Ray cluster, `jobs` of them.

    The function may be called from `jobs` threads at a time. Every Ray worker keeps inputs of its own.
    """
    if executor == "local":
        yield evaluator.measure
        return
    try:
        import ray
    except ImportError:
        raise MissingExtra("ray", "ray", "--executor ray") from None
    from weft.engine.ray import _cluster

    with _cluster(ray, jobs):
        remote = ray.remote(num_cpus=1)(_Worker)
        pickle: Any = ray.cloudpickle
        made = pickle.dumps((evaluator.source, evaluator.objectives, evaluator.store.budget // jobs,
                                      evaluator._loader))  # fmt: skip
        free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(jobs):
            free.put(remote.remote(made, str(Path.cwd())))

        def measure(settings: Settings) -> Outcome:
            worker = free.get()
            try:
                found: Outcome | str = ray.get(worker.measure.remote(settings))
            except ray.exceptions.RayError as error:
                said = str(error).strip().splitlines()[-1]
                raise UsageError(f"a Ray worker failed: {said} (out of memory? lower --jobs)") from None
            finally:
                free.put(worker)
            if isinstance(found, str):
                raise ObjectiveError(found)
            return found

        yield measure


class _Worker:
    """An evaluator in a process of its own."""

    def __init__(self, made: bytes, cwd: str) -> None:
        import ray

        os.chdir(cwd)
        source, objectives, memory, loader = ray.cloudpickle.loads(made)
        self.evaluator = Evaluator(source, objectives, memory, 1, loader)

    def measure(self, settings: Settings) -> Outcome | str:
        """The outcome; the text of an error, whose class may not travel."""
        try:
            return self.evaluator.measure(settings)
        except WeftError as error:
            return str(error)
