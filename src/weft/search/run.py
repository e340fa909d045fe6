"""`search`: propose candidates, measure them, keep every trial, report the winner.

Trials live in an Optuna study, in memory or in an SQLite file. The same search over the same file goes on
where it stopped; another one is refused. With one job everything follows from the seed, interruptions or not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from weft.errors import UsageError, WeftError
from weft.search.candidates import CallableSource, Loader, Make, RecipeSource, Source
from weft.search.evaluate import Evaluator, Outcome, cores, measuring
from weft.search.objective import Objective
from weft.search.result import Result, Trial
from weft.search.sampling import GENERATION, Cma, Sampler, derived_seed
from weft.search.space import Settings, Space
from weft.search.study import opened, optuna_quietly

if TYPE_CHECKING:
    from weft.recipes.read import Readable

Executor = Literal["local", "ray"]
DEFAULT_TRIALS = 50


@dataclass(frozen=True)
class Task:
    """Everything a search needs; what `search` makes of its arguments and `read_task` of a file."""

    source: Source
    space: Space
    objectives: tuple[Objective, ...]
    sampler: Sampler = field(default_factory=Sampler)
    trials: int | None = None
    """How many candidates in all; all of a grid, else 50."""
    seed: int = 0
    storage: Path | None = None
    start: tuple[Settings, ...] = ()
    jobs: int = 1
    executor: Executor = "local"
    memory: int | None = None
    """Bytes for inputs and computed tensors; a quarter of RAM."""
    loader: Loader | None = None

    def __post_init__(self) -> None:
        if not self.space.dimensions:
            raise UsageError("the space is empty: name at least one key to vary")
        if not self.objectives:
            raise UsageError("a search needs an objective")
        names = [o.name for o in self.objectives]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UsageError(f"two objectives are called {twice[0]!r}: give them names")
        if self.jobs < 1 or (self.trials is not None and self.trials < 1):
            raise UsageError("jobs and trials are numbers from 1 on")
        if self.executor not in ("local", "ray"):
            raise UsageError(f"there is no executor {self.executor!r}; choose local or ray")
        self.sampler.check(self.space, len(self.objectives))

    def identity(self, inputs: list[str]) -> dict[str, Any]:
        """What must stay the same for a stored search to go on; `inputs` are the files it rests on."""
        told: dict[str, Any] = {
            "space": self.space.describe(),
            "objectives": [o.describe() for o in self.objectives],
            "sampler": self.sampler.name,
            "knobs": [self.sampler.startup, self.sampler.population, self.sampler.sigma],
            "seed": self.seed,
            "start": list(self.start),
            "inputs": inputs,
        }
        if isinstance(self.source, RecipeSource):
            text = self.source.yaml({}).encode()
            told["recipe"] = hashlib.sha256(text).hexdigest()[:16]
        else:
            told["recipe"] = self.source.origin
        return json.loads(json.dumps(told))  # type: ignore[no-any-return]  # as the storage gives it back


def search(
    recipe: Readable | Make,
    space: Mapping[str, Any] | Space | None = None,
    objective: Callable[..., float] | Objective | Sequence[Objective] | None = None,
    *,
    validation: str = "",
    test: str | None = None,
    direction: Literal["maximize", "minimize"] = "maximize",
    sampler: str | Sampler = "tpe",
    trials: int | None = None,
    seed: int = 0,
    storage: str | Path | None = None,
    start: Sequence[Mapping[str, Any]] = (),
    set: Sequence[str] = (),
    jobs: int = 1,
    executor: Executor = "local",
    memory: str | int | None = None,
    loader: Loader | None = None,
    on_trial: Callable[[Trial, Result], None] = lambda trial, so_far: None,
) -> Result:
    """The best setting of `space` for `objective`, and all that was tried on the way.

    `recipe` is a recipe (path, text or data) whose keys `space` varies (see `weft.search.space`), a function
    from values to a checkpoint, or, with nothing else, a search file. `objective` is a function
    `f(checkpoint)` or `f(checkpoint, split)`, an `Objective`, or several of them. `validation` names the data
    that candidates are chosen on, and must be given; `test` other data for the winner alone. `start` holds
    settings to try first. `storage` is an SQLite file from which the same call goes on. A candidate that
    cannot be merged is kept as pruned, with the reason. `memory` bounds what is kept of inputs and results.

    Raises UsageError for what cannot be meant, DataError if no candidate could be scored.
    """
    from weft.search.file import parse_space, read_task

    if space is None and objective is None:
        if callable(recipe):
            raise UsageError("a function needs a space and an objective")
        return run(read_task(recipe), on_trial)
    if space is None or objective is None:
        raise UsageError("give recipe, space and objective, or a search file alone")
    source: Source = CallableSource(recipe) if callable(recipe) else RecipeSource(recipe, set)
    given = objective if isinstance(objective, Sequence) else [objective]
    objectives = tuple(
        o if isinstance(o, Objective) else Objective(o, direction, validation, test) for o in given
    )
    from weft.engine.budget import parse_size

    return run(
        Task(
            source, space if isinstance(space, Space) else parse_space(space, source), objectives,
            sampler if isinstance(sampler, Sampler) else Sampler(sampler), trials, seed,
            None if storage is None else Path(storage), tuple(dict(s) for s in start), jobs, executor,
            None if memory is None else parse_size(memory), loader,
        ),
        on_trial,
    )  # fmt: skip


def run(task: Task, on_trial: Callable[[Trial, Result], None] = lambda trial, so_far: None) -> Result:
    """Carry out a search. `on_trial` is told of every finished trial, with the result so far."""
    from weft.engine.budget import default_memory

    threads = max(1, cores() // task.jobs)
    memory = default_memory() if task.memory is None else task.memory
    evaluator = Evaluator(task.source, task.objectives, memory, threads, task.loader)
    inputs = _probe(task, evaluator)
    directions = [o.direction for o in task.objectives]
    with optuna_quietly(), opened(task.storage, directions, task.identity(inputs)) as study:
        runner = _Run(task, evaluator, study, on_trial)
        with measuring(evaluator, task.jobs, task.executor) as measure:
            runner.all(measure)
        return runner.tested(runner.result())


def _probe(task: Task, evaluator: Evaluator) -> list[str]:
    """Build a few candidates without reading values; the files they rest on.

    A key that does not exist, a misspelt parameter or a missing model is an error now, not in every trial.
    """
    source, space = task.source, task.space
    points = [task.space.encode(s) for s in task.start] + [space.at(u) for u in (0.5, 0.0, 0.99)]
    first: WeftError | None = None
    for raw in points:
        if not space.complete(raw):
            continue
        settings = space.decode(raw)
        if isinstance(source, RecipeSource):
            source.documents(settings)  # a key that recipes do not have is wrong in every trial
        try:
            return [f.identity() for f in evaluator.candidate(settings).files]
        except WeftError as error:
            first = first or error
    assert first is not None  # space.at is always complete
    raise first


class _Run:
    """One run over a study: what is asked, measured and told."""

    def __init__(
        self, task: Task, evaluator: Evaluator, study: Any, on_trial: Callable[[Trial, Result], None]
    ) -> None:
        self.task, self.evaluator, self.study, self.on_trial = task, evaluator, study, on_trial
        grid = task.space.grid() if task.sampler.name == "grid" else []
        self.planned = [task.space.encode(s) for s in task.start] + grid
        asked = task.trials or (len(self.planned) if grid else DEFAULT_TRIALS)
        self.wanted = min(asked, len(self.planned)) if grid else asked
        self.cma = Cma(task.sampler, task.space, task.seed, task.objectives[0].direction == "maximize") if (
            task.sampler.name == "cmaes") else None  # fmt: skip
        self._over: dict[int, Trial] = {}
        self.known: dict[str, Trial] = {}
        for trial in self.trials():
            if trial.state in ("complete", "pruned") and trial.repeats is None:
                self.known.setdefault(_key(trial.settings), trial)

    def all(self, measure: Callable[[Settings], Outcome]) -> None:
        """Trials an earlier run left unfinished, then new ones, until there are as many as wanted."""
        waiting = [
            (t.number, t.params) for t in self.study.get_trials(deepcopy=False) if t.state.name == "RUNNING"
        ]
        for number, raw in list(waiting):
            if not self.task.space.complete(raw):  # stopped while it was being proposed
                self.study.tell(number, state=_state("FAIL"))
                waiting.remove((number, raw))
        left = self.wanted - self._finished() - len(waiting)
        if self.task.jobs == 1:
            for number, raw in waiting:
                self._one(number, raw, measure)
            for _ in range(max(left, 0)):
                self._one(*self._ask(), measure)
            return
        with ThreadPoolExecutor(self.task.jobs) as pool:
            running: dict[Future[Outcome], tuple[int, Settings]] = {}
            try:
                while waiting or left > 0 or running:
                    while (waiting or left > 0) and len(running) < self.task.jobs:
                        left -= not waiting
                        number, raw = waiting.pop(0) if waiting else self._ask()
                        settings = self.task.space.decode(raw)
                        if not self._repeat(number, settings):
                            running[pool.submit(measure, settings)] = number, settings
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        self._tell(*running.pop(future), future.result())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _finished(self) -> int:
        return sum(t.state in ("complete", "pruned") for t in self.trials())

    def _ask(self) -> tuple[int, dict[str, Any]]:
        """Propose a candidate: its number and point."""
        import optuna

        number = len(self.study.get_trials(deepcopy=False))
        if number < len(self.planned):
            self.study.enqueue_trial(self.planned[number])
        elif self.cma is not None:
            raw, generation = self.cma.propose(self.study.get_trials(deepcopy=False), number)
            self.study.enqueue_trial(raw, user_attrs={GENERATION: generation})
        seed = derived_seed(self.task.seed, number)
        self.study.sampler = (
            optuna.samplers.RandomSampler(seed) if self.cma is not None or self.task.sampler.name == "grid"
            else self.task.sampler.of_optuna(self.task.space, seed, self.task.jobs)
        )  # fmt: skip
        trial = self.study.ask()
        return trial.number, self.task.space.suggest(trial)

    def _one(self, number: int, raw: dict[str, Any], measure: Callable[[Settings], Outcome]) -> None:
        settings = self.task.space.decode(raw)
        if not self._repeat(number, settings):
            self._tell(number, settings, measure(settings))

    def _repeat(self, number: int, settings: Settings) -> bool:
        """Give a candidate that was measured before what it had then."""
        before = self.known.get(_key(settings))
        if before is None:
            return False
        outcome = Outcome(tuple(before.scores.values()), before.reason)
        self._tell(number, settings, outcome, repeats=before.number)
        return True

    def _tell(self, number: int, settings: Settings, outcome: Outcome, repeats: int | None = None) -> None:
        stored = self.study.get_trials(deepcopy=False)[number]._trial_id
        about = {"seconds": round(outcome.seconds, 3), "reason": outcome.reason, "repeats": repeats}
        self.study._storage.set_trial_user_attr(stored, "about", about)
        if outcome.reason:
            self.study.tell(number, state=_state("PRUNED"))
        else:
            self.study.tell(number, list(outcome.scores))
        trial = self.trials()[number]
        if repeats is None:
            self.known.setdefault(_key(settings), trial)
        self.on_trial(trial, self.result())

    def trials(self) -> list[Trial]:
        """Every trial of the study."""
        return [self._trial(t) for t in self.study.get_trials(deepcopy=False)]

    def _trial(self, t: Any) -> Trial:
        if t.number not in self._over:
            made = self._made(t)
            if not t.state.is_finished():
                return made
            self._over[t.number] = made
        return self._over[t.number]

    def _made(self, t: Any) -> Trial:
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        about = t.user_attrs.get("about", {})
        values = t.values if t.state.name == "COMPLETE" else None
        return Trial(
            t.number, names.get(t.state.name, "running"),
            self.task.space.decode(t.params) if self.task.space.complete(t.params) else {},
            dict(zip((o.name for o in self.task.objectives), values, strict=True)) if values else {},
            about.get("reason", ""), about.get("seconds", 0.0), about.get("repeats"),
        )  # fmt: skip

    def result(self) -> Result:
        """What is known so far."""
        source = self.task.source
        return Result(
            self.task.objectives, tuple(self.trials()), self.evaluator.candidate,
            source.yaml if isinstance(source, RecipeSource) else None,
            wanted=self.wanted, memory=self.evaluator.store.describe(),
        )  # fmt: skip

    def tested(self, result: Result) -> Result:
        """The result with the winner's numbers on the test data, which no other candidate is measured on."""
        best = result.best
        names = [o.name for o in self.task.objectives if o.test is not None]
        if not names:
            return result
        splits = json.dumps([o.test for o in self.task.objectives])
        done: dict[str, Any] = dict(self.study.user_attrs.get("tested", {}))
        key = f"{best.number} {splits}"
        if key not in done:
            outcome = self.evaluator.measure(best.settings, test=True)
            if outcome.reason:
                raise UsageError(f"the winner could not be measured on the test data: {outcome.reason}")
            done[key] = outcome.scores
            self.study.set_user_attr("tested", done)
        found = dict(zip(names, done[key], strict=True))
        return replace(result, test=found, tested=len(done), memory=self.evaluator.store.describe())


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _key(settings: Settings) -> str:
    return json.dumps(settings, sort_keys=True)
