"""Merge the shipped experts by many methods and measure every result.

The scale of a method is chosen on the validation split and reported on the test split, beside the row with
the method's own default; nothing else is tuned. Whatever comes out stays in the table.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

import weft
from weft._version import __version__
from weft.demo.evaluate import (
    Scores,
    as_network,
    evaluate,
    evaluate_ensemble,
    evaluate_per_task,
    mean_scores,
)
from weft.demo.experts import expert_paths
from weft.demo.results import Kind, Point, Results, Row
from weft.demo.tasks import SIZES, TASKS

SUMS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)
"""Scales to try where task vectors are added up."""
MEANS = (0.3, 0.6, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0)
"""Scales to try where they are averaged or mostly dropped, which leaves a shorter vector."""
SEEDS = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Spec:
    """One method of the table."""

    name: str
    """The row's name, and the method's unless `method` says otherwise."""
    label: str
    grid: tuple[float, ...] | None = None
    """Values of `scale` among which validation chooses, or None for a method without one."""
    params: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True
    per_task: bool = False
    """One model a task comes out, and the task must be known to pick it."""
    seeds: tuple[int, ...] = (0,)
    method: str = ""


METHODS: tuple[Spec, ...] = (
    Spec("linear", "Mean of the experts", base=False),
    Spec("karcher", "Karcher mean", base=False),
    Spec("model_stock", "Model Stock"),
    Spec("task_arithmetic", "Task arithmetic", SUMS),
    Spec("ties", "TIES", MEANS),
    Spec("ties_untrimmed", "TIES, nothing trimmed", MEANS, {"density": 1.0}, method="ties"),
    Spec("dare_ties", "DARE-TIES", MEANS, seeds=SEEDS),
    Spec("breadcrumbs", "Breadcrumbs", MEANS),
    Spec("magmax", "MagMax", SUMS),
    Spec("pcb", "PCB-Merging", MEANS),
    Spec("sce", "SCE"),
    Spec("consensus", "Consensus TA", SUMS),
    Spec("tall_masks", "TALL masks", per_task=True),
    Spec("emr", "EMR-Merging", per_task=True),
)

Progress = Callable[[str], None]


def merged(spec: Spec, experts: Sequence[Path], base: Path, **params: Any) -> dict[str, Tensor]:
    """The merge as tensors in memory, through the same call that a user makes."""
    result = weft.merge(
        list(experts),
        base=base if spec.base else None,
        method=spec.method or spec.name,
        **spec.params,
        **params,
    )
    return result.state_dict()


def run(out: Path | None = None, *, progress: Progress | None = None) -> Results:
    """Measure base, experts, merges and controls; with `out`, write the report into that folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small, several threads mostly wait for one another
    try:
        results = _measure_all(progress or (lambda _: None))
    finally:
        torch.set_num_threads(threads)
    if out is not None:
        from weft.demo.report import write_report

        write_report(results, out)
    return results


def _measure_all(say: Progress) -> Results:
    started = perf_counter()
    paths = expert_paths()
    base, experts = paths["base"], [paths[t] for t in TASKS]

    say("base and experts")
    rows = [_measured("base", "Base", "reference", base)]
    rows += [_measured(t, f"Expert: {t}", "reference", paths[t]) for t in TASKS]
    own = {r.name: r.scores.accuracy[r.name] for r in rows[1:]}
    rows.append(
        _reference(
            "experts", "Each expert on its own task", "five models, picked by the task's name",
            lambda split: evaluate_per_task({t: paths[t] for t in TASKS}, split),
        )
    )  # fmt: skip
    rows.append(
        _reference(
            "ensemble", "Mean of the experts' outputs", "runs all five experts, five times the work",
            lambda split: evaluate_ensemble(list(experts), split),
        )
    )  # fmt: skip
    rows.append(
        _measured(
            "joint", "Trained on all tasks", "reference", paths["joint"], "trained with all data in one place"
        )
    )
    for spec in METHODS:
        say(spec.label)
        rows += method_rows(spec, experts, base)
    say("control")
    arithmetic = next(r for r in reversed(rows) if r.name == "task_arithmetic")
    rows.append(_random_control(arithmetic, experts, base))

    return Results(
        rows=tuple(rows), experts=own, images={str(s): n for s, n in SIZES.items()},
        seeds=SEEDS, versions=_versions(),
        date=datetime.now(UTC).date().isoformat(), seconds=perf_counter() - started,
    )  # fmt: skip


def method_rows(spec: Spec, experts: Sequence[Path], base: Path) -> list[Row]:
    """The method at its default and, where it has a scale, at the one that validation prefers.

    The first merge of a process pays for what is loaded and compiled once, so the time is the shortest.
    """
    default = _trial(spec, experts, base, {})
    if spec.grid is None:
        again = _trial(spec, experts, base, {})
        return [replace(default, seconds=min(default.seconds or 0.0, again.seconds or 0.0))]
    trials = [replace(_trial(spec, experts, base, {"scale": s}), scale=s) for s in spec.grid]
    best = max(trials, key=lambda trial: trial.validation)  # the smallest scale, where they tie
    curve = tuple(Point(t.scale or 0.0, t.validation, t.scores.average) for t in trials)
    seconds = min(t.seconds or 0.0 for t in trials)
    return [
        replace(default, scale=_default_scale(spec), seconds=seconds),
        replace(best, tuned=True, curve=curve, seconds=seconds),
    ]


def _trial(spec: Spec, experts: Sequence[Path], base: Path, params: Mapping[str, Any]) -> Row:
    """One setting, on both splits, averaged over the seeds of a random method."""
    tests, validations, seconds = [], [], []
    for seed in spec.seeds:
        start = perf_counter()
        if spec.per_task:
            states = {t: merged(spec, experts, base, task=i, **params) for i, t in enumerate(TASKS)}
            seconds.append((perf_counter() - start) / len(TASKS))
            nets = {t: as_network(s) for t, s in states.items()}
            tests.append(evaluate_per_task(nets, "test"))
            validations.append(evaluate_per_task(nets, "validation"))
            continue
        seeded = {"seed": seed} if len(spec.seeds) > 1 else {}
        net_state = merged(spec, experts, base, **params, **seeded)
        seconds.append(perf_counter() - start)
        net = as_network(net_state)
        tests.append(evaluate(net, "test"))
        validations.append(evaluate(net, "validation"))
    averages = torch.tensor([s.average for s in tests])
    return Row(
        spec.name, spec.label, "merge", mean_scores(tests), mean_scores(validations).average,
        params=dict(spec.params),
        needs="one model a task, picked by the task's name" if spec.per_task else "",
        seconds=min(seconds), spread=float(averages.std()) if len(tests) > 1 else None,
    )  # fmt: skip


def _default_scale(spec: Spec) -> float:
    from weft.methods.registry import METHODS as REGISTRY

    return float(REGISTRY[spec.method or spec.name].params["scale"].default)


def _measured(name: str, label: str, kind: Kind, model: Path, needs: str = "") -> Row:
    net = as_network(model)
    return Row(name, label, kind, evaluate(net), evaluate(net, "validation").average, needs=needs)


def _reference(name: str, label: str, needs: str, score: Callable[[Any], Scores]) -> Row:
    return Row(name, label, "reference", score("test"), score("validation").average, needs=needs)


def _random_control(like: Row, experts: Sequence[Path], base: Path) -> Row:
    """The base moved as far as the tuned task arithmetic moves each tensor, in a random direction."""
    start = weft.load(base).state_dict()
    spec = next(s for s in METHODS if s.name == like.name)
    end = merged(spec, experts, base, scale=like.scale)
    tests, validations = [], []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, tensor in start.items():
            noise = torch.randn(tensor.shape, generator=generator)
            length = (end[name].float() - tensor.float()).norm()
            state[name] = tensor.float() + noise * (length / noise.norm())
        net = as_network(state)
        tests.append(evaluate(net))
        validations.append(evaluate(net, "validation"))
    spread = float(torch.tensor([s.average for s in tests]).std())
    return Row(
        "random", "Random direction", "control", mean_scores(tests), mean_scores(validations).average,
        needs="as far from the base as tuned task arithmetic", spread=spread,
    )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"weft": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "scikit-learn"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
