"""`weft.analyze`: every analysis that models, data and base allow, as findings and one report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weft.analysis.barrier import Align, Repair, barrier
from weft.analysis.curves import connect
from weft.analysis.decomposition import bias_variance
from weft.analysis.disentanglement import disentanglement
from weft.analysis.ensemble import ensemble_gap
from weft.analysis.finding import Finding
from weft.analysis.layerwise import layerwise_barrier
from weft.analysis.linearity import feature_linearity
from weft.analysis.neb import elastic_path
from weft.analysis.network import Loss, Network
from weft.analysis.ntk import ntk_localisation
from weft.analysis.overlap import subspace_overlap
from weft.analysis.parallel import in_parallel
from weft.analysis.plane import loss_plane, random_plane
from weft.analysis.representation import representation_bias
from weft.analysis.sharpness import sharpness
from weft.analysis.similarity import similarity
from weft.analysis.space import mean
from weft.analysis.trajectory import variance_decay
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError, did_you_mean

PAIRS = 6
"""Pairs of models that analyses of pairs look at; those of the first models."""
KERNEL_EXAMPLES = 64
"""Examples a task for the tangent kernel, which holds a gradient for each."""


@dataclass(frozen=True)
class Request:
    """What is to be analysed."""

    models: Mapping[str, Checkpoint]
    base: Checkpoint | None = None
    nets: Sequence[Network] = ()
    """One for all models, or one a model with its task's data."""
    align: Align | None = None
    repair: Repair | None = None
    seed: int = 0

    @property
    def pairs(self) -> list[tuple[str, str]]:
        return list(combinations(self.models, 2))[:PAIRS]

    @cached_property
    def net(self) -> Network:
        """The network on the data of all tasks."""
        first = self.nets[0]
        return first if len(self.nets) == 1 else first.on([b for n in self.nets for b in n.batches])

    def own(self, name: str) -> Network:
        """The network on the model's own data."""
        return self.nets[list(self.models).index(name)] if len(self.nets) > 1 else self.net


@dataclass(frozen=True)
class Analysis:
    """One entry of ANALYSES."""

    run: Callable[[Request], Iterable[Finding]]
    models: int = 2
    """How many models it needs."""
    module: bool = True
    base: bool = False
    tasks: bool = False
    """Whether it needs data a model."""
    asked: bool = False
    """Only on request: it trains, or means something for special models only."""

    def missing(self, request: Request) -> str | None:
        """What keeps it from being done; None where nothing does."""
        lacks = []
        if len(request.models) < self.models:
            lacks.append(f"{self.models} models")
        if self.module and not request.nets:
            lacks.append("a module and data")
        if self.tasks and request.nets and len(request.nets) < 2:
            lacks.append("data for each model")
        if self.base and request.base is None:
            lacks.append("a base")
        return f"needs {' and '.join(lacks)}" if lacks else None


@dataclass(frozen=True)
class Analysed:
    """What `analyze` found."""

    findings: tuple[Finding, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    """Analysis → why it was not done."""
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Any:
        return iter(self.findings)

    def of(self, kind: type[Finding]) -> list[Any]:
        """The findings of one class."""
        return [f for f in self.findings if isinstance(f, kind)]

    def to_json(self) -> dict[str, Any]:
        return {
            "findings": [f.to_json() for f in self.findings],
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }

    def report(self, path: str | Path) -> None:
        """Write one self-contained HTML page."""
        from weft.analysis.report import write_report

        skipped = [f"not done: {name} ({why})" for name, why in self.skipped.items()]
        write_report(self.findings, path, notes=[*self.notes, *skipped])


def analyze(
    models: Sequence[Model] | Mapping[str, Model],
    *,
    base: Model | None = None,
    module: nn.Module | None = None,
    data: Any = None,
    loss: str | Loss = "cross_entropy",
    only: Sequence[str] | None = None,
    align: Align | None = None,
    repair: Repair | None = None,
    seed: int = 0,
    on_start: Callable[[str], None] | None = None,
) -> Analysed:
    """Do every analysis that what is given allows, or those named in `only` (see ANALYSES).

    Weights alone give similarities and, with a base, the overlap of subspaces. With a module and data (see
    `weft.analysis.network.Network`; a mapping gives one data set a model) come barriers, planes, sharpness,
    features and the rest. `align(b, a)` and `repair(merged, a, b, α)` add barriers after them. `curve` and `path`
    train, and `trajectory` and `layers-shallow` are done on request only. `on_start` is told each analysis's name.

    Before any of them starts, raises UsageError for an unknown or impossible analysis and DataError for models
    that don't fit.
    """
    request = _request(models, base, module, data, loss, align, repair, seed)
    unknown = [n for n in only or () if n not in ANALYSES]
    if unknown:
        raise UsageError(
            f"there is no analysis {unknown[0]!r}{did_you_mean(unknown[0], ANALYSES)}; there are "
            f"{', '.join(ANALYSES)}"
        )
    wanted = {n: a for n, a in ANALYSES.items() if (n in only if only is not None else not a.asked)}
    lacking = {n: why for n, a in wanted.items() if (why := a.missing(request)) is not None}
    if only is not None and lacking:
        raise UsageError("; ".join(f"{n} {why}" for n, why in lacking.items()))
    if request.nets:
        for model in (*request.models.values(), *([request.base] if request.base is not None else [])):
            request.nets[0].state(model)
    found: list[Finding] = []
    for name, analysis in wanted.items():
        if name in lacking:
            continue
        if on_start is not None:
            on_start(name)
        found += analysis.run(request)
    if not found:
        raise UsageError("; ".join(f"{n} {why}" for n, why in lacking.items()) or "nothing was asked for")
    return Analysed(tuple(found), lacking, tuple(_notes(request, wanted)))


def _request(
    models: Sequence[Model] | Mapping[str, Model], base: Model | None, module: nn.Module | None, data: Any,
    loss: str | Loss, align: Align | None, repair: Repair | None, seed: int,
) -> Request:  # fmt: skip
    if (module is None) != (data is None):
        raise UsageError("a module and data belong together: give both, or none for the analyses of weights")
    if isinstance(models, Mapping):
        named = {n: load(m) for n, m in models.items()}
    else:
        named = _named([load(m) for m in models])
    nets: list[Network] = []
    if module is not None:
        parts = [data]
        if isinstance(data, Mapping):
            # by the models' names where the tasks have them, otherwise in order
            parts = [data[n] for n in named] if set(data) == set(named) else list(data.values())
            if len(parts) not in (1, len(named)):
                raise UsageError(
                    f"there are {len(parts)} data sets for {len(named)} models: give one, or one a model"
                )
        first = Network(module, parts[0], loss=loss)
        nets = [first, *(first.on(p) for p in parts[1:])]
    return Request(named, None if base is None else load(base), nets, align, repair, seed)


def _named(sources: Sequence[Checkpoint]) -> dict[str, Checkpoint]:
    """Short names that differ."""
    made: dict[str, Checkpoint] = {}
    for i, source in enumerate(sources):
        short = Path(source.origin.rstrip("/")).name.removesuffix(".safetensors")[:40] or f"model {i + 1}"
        made[short if short not in made and short != "model" else f"{short} {i + 1}"] = source
    return made


def _notes(r: Request, wanted: Mapping[str, Analysis]) -> Iterable[str]:
    pairs = len(list(combinations(r.models, 2)))
    if r.nets and pairs > PAIRS:
        yield f"analyses of pairs look at the first {PAIRS} of {pairs} pairs"
    if r.nets:
        yield f"measured on {r.net.examples} examples"
    if "ntk" in wanted and len(r.nets) > 1:
        yield f"the tangent kernel is that of the first {KERNEL_EXAMPLES} examples of each task"


# -- the analyses ------------------------------------------------------------------------------------


def _similarity(r: Request) -> list[Finding]:
    with in_parallel():
        return [similarity(list(r.models.values()), r.base, names=list(r.models))]


def _overlap(r: Request) -> list[Finding]:
    assert r.base is not None
    with in_parallel():
        return [subspace_overlap(list(r.models.values()), r.base, names=list(r.models))]


def _barriers(r: Request) -> Iterable[Finding]:
    for a, b in r.pairs:
        for align, repair in dict.fromkeys([(None, None), (r.align, None), (r.align, r.repair)]):
            yield barrier(r.net, r.models[a], r.models[b], align=align, repair=repair, names=(a, b))


def _layers(r: Request) -> Iterable[Finding]:
    return [layerwise_barrier(r.net, r.models[a], r.models[b], seed=r.seed, names=(a, b)) for a, b in r.pairs]


def _shallow(r: Request) -> Iterable[Finding]:
    return [layerwise_barrier(r.net, r.models[a], r.models[b], sets="shallow", seed=r.seed, names=(a, b))
            for a, b in r.pairs]  # fmt: skip


def _features(r: Request) -> Iterable[Finding]:
    return [feature_linearity(r.net, [r.models[a], r.models[b]], names=(a, b)) for a, b in r.pairs]


def _planes(r: Request) -> Iterable[Finding]:
    corners = dict(r.models) if r.base is None or len(r.models) > 2 else {"base": r.base, **r.models}
    three = dict(list(corners.items())[:3])
    if len(three) == 3:
        yield loss_plane(r.net, list(three.values()), names=list(three))
    else:
        for name, model in r.models.items():
            yield random_plane(r.net, model, seed=r.seed, name=name)


def _sharpness(r: Request) -> Iterable[Finding]:
    yield from (sharpness(r.net, m, seed=r.seed, name=name) for name, m in r.models.items())
    if len(r.models) > 1:
        yield sharpness(r.net, _average(r), seed=r.seed, name="average")


def _ensemble(r: Request) -> Iterable[Finding]:
    return [ensemble_gap(r.net, list(r.models.values()), names=list(r.models))]


def _bias(r: Request) -> Iterable[Finding]:
    average = _average(r)
    return [representation_bias(r.own(n), average, m, names=("average", n)) for n, m in r.models.items()]


def _average(r: Request) -> dict[str, Tensor]:
    """The mean of the weights, with statistics measured anew."""
    return r.net.settled(mean(r.net.states(list(r.models.values()))))


def _disentanglement(r: Request) -> Iterable[Finding]:
    assert r.base is not None
    return [disentanglement([r.own(a), r.own(b)], r.base, [r.models[a], r.models[b]], names=(a, b))
            for a, b in r.pairs]  # fmt: skip


def _kernels(r: Request) -> Iterable[Finding]:
    assert r.base is not None
    few = {n: _first(r.own(n), KERNEL_EXAMPLES) for n in r.models}
    return [ntk_localisation(few[a], few[b], r.base, names=(a, b)) for a, b in r.pairs]


def _first(net: Network, count: int) -> Network:
    inputs, targets = net.batches[0]
    if not isinstance(inputs, Tensor):
        raise UsageError("the tangent kernel needs inputs of one tensor; leave ntk out")
    return net.on((inputs[:count], targets[:count]))


def _curves(r: Request) -> Iterable[Finding]:
    return [connect(r.net, r.models[a], r.models[b], seed=r.seed, names=(a, b)) for a, b in r.pairs]


def _paths(r: Request) -> Iterable[Finding]:
    return [elastic_path(r.net, r.models[a], r.models[b], names=(a, b)) for a, b in r.pairs]


def _trajectory(r: Request) -> Iterable[Finding]:
    return [variance_decay(list(r.models.values()), r.net if r.nets else None)]


def _decomposition(r: Request) -> Iterable[Finding]:
    return [bias_variance(r.net, [list(r.models.values())])]


ANALYSES: dict[str, Analysis] = {
    "similarity": Analysis(_similarity, module=False),
    "overlap": Analysis(_overlap, module=False, base=True),
    "barrier": Analysis(_barriers),
    "layers": Analysis(_layers),
    "layers-shallow": Analysis(_shallow, asked=True),
    "features": Analysis(_features),
    "plane": Analysis(_planes, models=1),
    "sharpness": Analysis(_sharpness, models=1),
    "ensemble": Analysis(_ensemble),
    "representation": Analysis(_bias),
    "disentanglement": Analysis(_disentanglement, base=True, tasks=True),
    "ntk": Analysis(_kernels, base=True, tasks=True),
    "decomposition": Analysis(_decomposition, asked=True),
    "curve": Analysis(_curves, asked=True),
    "path": Analysis(_paths, asked=True),
    "trajectory": Analysis(_trajectory, models=4, module=False, asked=True),
}  # fmt: skip
"""Name → analysis, in the order of the report."""
