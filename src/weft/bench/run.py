"""The run: references, then every contender at its published setting and at the one that validation prefers."""

from __future__ import annotations

import math
import platform
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from weft._version import __version__
from weft.bench.contenders import Contender, Outcome, chosen
from weft.bench.journal import Journal, asked, fingerprint
from weft.bench.results import Measured, Results, Row, ratio
from weft.bench.score import score
from weft.bench.setting import Setting, State, costs
from weft.bench.suite import Suite, Task
from weft.errors import DataError, UsageError

Build = Callable[[int], "Suite | Sequence[Suite]"]
Progress = Callable[[str], None]
VALIDATION = 100
"""Examples of each task on which coefficients are chosen."""
DAMAGED = 100
"""Examples of each task that are also shown damaged."""


def bench(
    suite: str | Suite | Build,
    methods: Sequence[str] | None = None,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    data: str | Path | None = None,
    samples: int = 64,
    tune: bool = True,
    progress: Progress | None = None,
    out: str | Path | None = None,
    command: str = "",
) -> Results:
    """Run a suite: its name (`weft.bench.suites.SUITES`), a `Suite`, or a function of the seed that makes one.

    `methods` are names of contenders or families (all that fit, by default); `seeds` how often the experts are
    trained anew (from cache where they were before), from `first_seed` on; `samples` how many examples a task
    data-driven methods see; `tune=False` leaves out the rows with tuned coefficients. `out` is a file (.json) that
    holds the results so far after every contender, and from which a run goes on (`weft.bench.journal`); `command`
    is noted in them. Runs on a GPU where there is one, else on the threads torch has.
    """
    if seeds < 1 or first_seed < 0:
        raise UsageError(f"seeds must be 1 or more, from 0 up, not {seeds} from {first_seed}")
    drawn = tuple(range(first_seed, first_seed + seeds))
    if samples < 1:
        raise UsageError(f"samples must be 1 or more, not {samples}")
    say = progress or (lambda _: None)
    build, name = _builder(suite, data, say)
    head = Results(
        name, "", "", (), (), samples, command, machine(), datetime.now(UTC).date().isoformat(),
        versions=versions(),
    )  # fmt: skip
    journal = Journal(head, out)
    for seed in drawn:
        made = build(seed)
        for one in [made] if isinstance(made, Suite) else made:
            metrics = {t.metric for t in one.tasks} | ({journal.head.metric} - {""})
            if len(metrics) > 1:
                raise UsageError(
                    f"{name}: tasks of one suite have one metric, not {' and '.join(sorted(metrics))}"
                )
            journal.about(one)
            _measure(Setting(one, samples), methods, seed, tune, say, journal)
    journal.keep()
    return journal.results()


def _builder(suite: str | Suite | Build, data: str | Path | None, say: Progress) -> tuple[Build, str]:
    if isinstance(suite, Suite):
        given = suite
        return lambda seed: given, suite.name
    if isinstance(suite, str):
        from weft.bench.suites import suite_named

        named = suite_named(suite)
        return lambda seed: named(seed, data, say), suite
    return suite, getattr(suite, "__name__", "suite")


def _measure(
    setting: Setting, methods: Sequence[str] | None, seed: int, tune: bool, say: Progress, journal: Journal
) -> None:
    """Every row of one seed that the journal does not hold, each kept as soon as it is there."""
    judge = Judge(setting, seed)
    where, size = f"{setting.suite.name}, seed {seed}", len(setting.tasks)
    experts = fingerprint(setting.suite) if journal.path is not None else ""
    others = [found for found in journal.of(size, seed) if found[1].experts != experts]
    if others:
        say(f"{where}: {len(others)} rows in {journal.path} are of other experts or data: measured anew")
        journal.forget(others)
    if held := journal.of(size, seed):
        say(f"{where}: going on from {len(held)} rows in {journal.path}")
    picked, why = chosen(methods, setting)
    journal.left_out(picked, why)
    for label, outcome in references(setting):
        name = label.split(" (")[0]
        row = Row(name, label, "reference", "reference", REFERENCES[name], size, (), name == "experts")
        if journal.holds(row, seed, ""):
            continue
        say(f"{where}: {name}")
        journal.add(row, replace(judge(outcome, {}), experts=experts))
    journal.keep()  # never without the experts, which all else is relative to
    for c in picked:
        rows = expected(c, size, tune and judge.chooses)
        if all(journal.holds(r, seed, asked(c, r.how)) for r in rows):
            continue
        say(f"{where}: {c.label}")
        journal.forget(journal.of(size, seed, c.name))
        try:
            for row, measured in trials(c, setting, judge, rows):
                journal.add(row, replace(measured, experts=experts, asked=asked(c, row.how)))
        except (UsageError, DataError) as error:
            journal.left_out((), {c.name: str(error).splitlines()[0]})
        journal.keep()


REFERENCES = {
    "base": "before fine-tuning", "experts": "one model a task", "ensemble": "runs every expert",
    "joint": "all data in one place",
}  # fmt: skip


def references(setting: Setting) -> Iterable[tuple[str, Outcome]]:
    """Base, experts each on its own task, their averaged outputs, and the joint model where there is one."""
    if setting.base is not None:
        yield "base", Outcome(setting.base.state_dict())
    states = {t.name: m.state_dict() for t, m in zip(setting.tasks, setting.models, strict=True)}
    yield "experts", Outcome(states=states)
    modules = [setting.loaded.fresh(s) for s in states.values()]
    if not any(t.private or t.score for t in setting.tasks):
        yield "ensemble", Outcome(module=Ensemble(modules), parameters=len(modules) * setting.size)
    if setting.suite.joint is not None:
        from weft.checkpoints.load import load

        yield "joint", Outcome(load(setting.suite.joint).state_dict())


class Ensemble(nn.Module):
    """Mean of the outputs' log-probabilities is not what papers average: the mean of the logits."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(modules)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        from weft.train.forward import logits_of

        return torch.stack([logits_of(m(*args, **kwargs)) for m in self.members]).mean(0)


def expected(c: Contender, size: int, tune: bool) -> list[Row]:
    """One row as published; one tuned, where there is something to tune."""
    row = Row(c.name, c.label, c.family, "fixed", c.seen, size, (), c.per_task)
    return [row, replace(row, how="tuned")] if tune and c.tuned else [row]


def trials(
    c: Contender, setting: Setting, judge: Judge, rows: Sequence[Row]
) -> Iterable[tuple[Row, Measured]]:
    """The rows, measured; what is tuned starts from what is fixed."""
    made, cost = _made(c, setting, c.params)
    yield rows[0], judge(made, c.params, cost)
    for row in rows[1:]:
        (key, values), *_ = c.tuned.items()
        best: tuple[float, Any] | None = None
        for value, tried in along(c, setting, key, values, made):
            found = judge.validation(tried)
            if best is None or found > best[0]:  # the first, where they tie
                best = found, value
        assert best is not None
        params = {**c.params, key: best[1]}
        made, cost = _made(c, setting, params)
        yield row, judge(made, params, cost)


def along(
    c: Contender, setting: Setting, key: str, values: Sequence[Any], fixed: Outcome
) -> Iterable[tuple[Any, Outcome]]:
    """(value, outcome) for every value.

    Most merges are base + scale · change: where two made for real lie on one line with the base, the rest are
    points of that line. Only choosing rests on this; what is reported is made.
    """
    first, rest = values[0], values[1:]
    ends: list[tuple[float, Outcome]] = []
    if key in c.params:
        ends.append((c.params[key], fixed))
    for value in (first, *rest):
        line = _line(setting, key, ends)
        tried = _made(c, setting, {**c.params, key: value})[0] if line is None else Outcome(line(value))
        if line is None:
            ends.append((value, tried))
        yield value, tried


def _line(
    setting: Setting, key: str, ends: Sequence[tuple[float, Outcome]]
) -> Callable[[float], State] | None:
    """value → base + value · change; None unless the two latest outcomes say that it is so."""
    if key != "scale" or setting.base is None or len(ends) < 2:
        return None
    (a, one), (b, other) = ends[-2:]
    if one.state is None or other.state is None or not a or not b:
        return None
    base, held = setting.base.state_dict(), one.state
    changes = {n: (t.double() - base[n].double()) / a for n, t in one.state.items() if t.is_floating_point()}

    def at(value: float) -> State:
        moved = {n: (base[n].double() + value * d).to(base[n].dtype) for n, d in changes.items()}
        return {**held, **moved}

    told, real = at(b), other.state
    gap = math.sqrt(sum(float((told[n].double() - real[n].double()).square().sum()) for n in changes))
    size = abs(b) * math.sqrt(sum(float(d.square().sum()) for d in changes.values()))
    coarse = math.sqrt(
        sum(float((torch.finfo(held[n].dtype).eps * base[n].double()).square().sum()) for n in changes)
    )
    return at if gap <= 1e-4 * size + (1 + abs(b / a)) * coarse else None


def _made(c: Contender, setting: Setting, params: Mapping[str, Any]) -> tuple[Outcome, Any]:
    with costs() as cost:
        made = c.make(setting, params)
        return made, cost()


class Judge:
    """Measures outcomes on one suite, relative to its experts where that is needed."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        self.chooses = all("validation" in t.splits for t in setting.tasks)
        """Whether there are validation data; without them nothing is tuned, since the test must not choose."""

    @cached_property
    def experts(self) -> dict[str, float]:
        """Each expert's score on its own validation data."""
        return {
            t.name: score(self.setting.loaded.take(m.state_dict(), t), t, "validation", VALIDATION).value
            for t, m in zip(self.setting.tasks, self.setting.models, strict=True)
        }

    def at(self, made: Outcome, task: Task) -> nn.Module:
        """The module that answers for a task."""
        if made.module is not None:
            return made.module
        if made.modules is not None:
            return made.modules[task.name]
        state = made.state if made.states is None else made.states[task.name]
        assert state is not None
        return self.setting.loaded.take(state, task)

    def validation(self, made: Outcome) -> float:
        """Mean over tasks of the validation score relative to the expert's. −∞ where outputs are not finite."""
        found = []
        for t in self.setting.tasks:
            try:
                value = score(self.at(made, t), t, "validation", VALIDATION).value
            except DataError:
                return -math.inf
            found.append(ratio(value, self.experts[t.name], t.metric == "perplexity"))
        return mean(found)

    def _chosen_by(self, made: Outcome) -> float | None:
        """What is kept of it: a finite number or nothing."""
        found = self.validation(made) if self.chooses else -math.inf
        return found if math.isfinite(found) else None

    def __call__(self, made: Outcome, params: Mapping[str, Any], cost: Any = None) -> Measured:
        tasks, errors, damaged = {}, [], dict[str, list[float]]()
        for t in self.setting.tasks:
            model = self.at(made, t)
            found = score(model, t)
            tasks[t.name] = found.value
            errors += [] if found.ece is None else [found.ece]
            for damage in t.corrupted:
                damaged.setdefault(damage, []).append(score(model, t, damage, DAMAGED).value)
        unseen = {}
        if made.states is None and made.modules is None:
            unseen = {t.name: score(self.at(made, t), t).value for t in self.setting.suite.unseen}
        size = float(self.setting.size)
        parameters = made.parameters or (size if made.states is None else size * len(made.states))
        return Measured(
            self.seed, tasks, mean(errors) if errors else None, unseen,
            {d: mean(v) for d, v in damaged.items()}, self._chosen_by(made), dict(params), parameters,
            None if cost is None else cost.seconds + made.extra_seconds,
            None if cost is None or cost.peak is None else cost.peak / 2**20,
        )  # fmt: skip


def machine() -> str:
    """What kind of machine, in a few words: cores, and the GPU where it is used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {torch.get_num_threads()} threads"
    import os

    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    found = {"weft": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def command() -> str:
    """The command line of this process, without the path of the program."""
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
