"""Contenders that are no method of the registry: learned coefficients, routed experts, repairs after a merge.

Steps and rates are set for small networks: about a hundred steps with a rate ten times the published one, where
papers make thousands. Unless a row says test-time, learning sees `samples` examples a task of the training split.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.bench.contenders import MEANS, SUMS, Contender, Outcome, Params, Seen, fits_always, merged
from weft.bench.setting import Setting
from weft.errors import UsageError
from weft.learn.losses import Loss, Shot, as_loss
from weft.learn.masks import Masked
from weft.learn.mergeable import Mergeable
from weft.learn.weighed import Weighed
from weft.methods.registry import METHODS
from weft.routing.gating import Gating

STEPS, RATE, BATCH = 100, 1e-2, 16
TEST_TIME_INPUTS = 500
"""How many of the test's inputs a task test-time methods adapt to."""


def one_network(setting: Setting) -> str:
    """Why a contender that runs one network for all tasks cannot have this suite."""
    if any(t.private for t in setting.tasks):
        return "the tasks bring tensors of their own"
    if any(t.score for t in setting.tasks):
        return "the tasks are scored by functions"
    if any(t.metric != "accuracy" for t in setting.tasks):
        return "learns on classes"
    return ""


class Own(Shot):
    """A shot that sees the task's own columns alone."""

    def run(self, args: tuple[Any, ...] | None = None, layers: Sequence[str] = ()) -> Tensor:
        return self._cut(super().run(args, layers))

    @property
    def expert(self) -> Tensor:
        return self._cut(super().expert)

    def _cut(self, x: Tensor) -> Tensor:
        found: tuple[int, int] | None = self.merged.__dict__["columns"].get(self.task)
        return x if found is None else x[..., found[0] : found[1]]


def own_columns(loss: str) -> Loss:
    """The loss, of the columns of the task that the batch is of."""
    known = as_loss(loss)
    return lambda shot: known(Own(shot.merged, shot.weights, shot.batch, shot.task))


def learned(
    loss: str, seen: Seen, parts: str = "tensor", start: float = 0.3, constraint: str = "free",
    labels: bool = False, concrete: bool = False,
) -> Callable[[Setting, Params], Outcome]:  # fmt: skip
    """`weft.learn` of one coefficient a part and model."""

    def make(setting: Setting, params: Params) -> Outcome:
        import weft.learn as learning

        way = _masked if concrete else None
        merged = Mergeable(
            setting.module(), setting.base, setting.models, parts, constraint, start=start,
            tasks=[t.name for t in setting.tasks],
        ) if way is None else Mergeable(
            setting.module(), setting.base, setting.models, way=way, tasks=[t.name for t in setting.tasks]
        )  # fmt: skip
        merged.__dict__["columns"] = {t.name: t.classes for t in setting.tasks}
        found = learning(  # type: ignore[operator]
            merged, own_columns(loss), examples(setting, seen, labels), steps=int(params["steps"]),
            lr=float(params["lr"]), batch=BATCH, split="test-time" if seen == "test-time" else "train",
        )  # fmt: skip
        if isinstance(merged.way, Masked):
            merged.way.fix()
        return Outcome({n: t.detach() for n, t in found.checkpoint().state_dict().items()})

    return make


def _masked(sources: Any, names: list[str]) -> Masked:
    return Masked(Weighed(sources, names, "model", "free", 0.3))


def examples(setting: Setting, seen: Seen, labels: bool = False) -> dict[str, Any]:
    """Task → inputs (and labels), of the split that the kind of contender may see."""
    split, limit = ("test", TEST_TIME_INPUTS) if seen == "test-time" else (None, None)
    found: dict[str, Any] = {}
    for t in setting.tasks:
        x = setting.inputs(t, split, limit)
        found[t.name] = (x, setting.labels(t, split, limit)) if labels else x
    return found


def prodistilled(setting: Setting, params: Params) -> Outcome:
    """ProDistill: coefficients an element, layer after layer."""
    from weft.learn.distill import prodistill

    found = prodistill(
        setting.module(), _base(setting), setting.models, examples(setting, "unlabelled"),
        tasks=[t.name for t in setting.tasks], steps=int(params["steps"]), lr=float(params["lr"]), batch=BATCH,
    )  # fmt: skip
    return Outcome({n: t.detach() for n, t in found.checkpoint().state_dict().items()})


def _base(setting: Setting) -> Any:
    if setting.base is None:
        raise UsageError("needs a base")
    return setting.base


def remeasured(setting: Setting, params: Params) -> Outcome:
    """RegMean++: Gram matrices of the inputs that the merged layers make."""
    from weft.statistics.remeasured import regmean_pp

    def read(module: nn.Module, batch: Any) -> Any:
        return module(**batch) if isinstance(batch, Mapping) else module(batch)

    data = [[setting.inputs(t)] for t in setting.tasks]
    found = regmean_pp(setting.models, data, base=setting.base, module=setting.module(), forward=read)
    return Outcome(dict(found.state_dict()))


def gram_of_both(setting: Setting, params: Params) -> Outcome:
    """The Gram solver on measured inputs, with the task vectors' own as a prior."""
    return merged(setting, METHODS["gram"], params, ("gram",))


def woven(setting: Setting, params: Params) -> Outcome:
    """The Gram solver on measured inputs, its spectrum evened."""
    return merged(setting, METHODS["weave"], params, ("gram",))


def aligned(setting: Setting, params: Params) -> Outcome:
    """Every model with its units in the order of the first's, then the mean."""
    import weft
    from weft.align.verb import align

    first, *others = setting.models
    inputs = setting.inputs(setting.tasks[0], limit=8)
    same = [align(m, to=first, module=setting.module(), example_inputs=inputs) for m in others]
    return Outcome(weft.merge([first, *same], "linear").state_dict())


def baseless(setting: Setting) -> str:
    """Alignment is for networks without a common start."""
    return one_network(setting) or ("the models have a base in common" if setting.base is not None else "")


def reestimated(method: str, **how: Any) -> Callable[[Setting, Params], Outcome]:
    """A merge whose BatchNorm statistics are measured anew on inputs of all tasks."""

    def make(setting: Setting, params: Params) -> Outcome:
        import weft
        from weft.calibrate.run import calibrate

        known = {} if method == "linear" else {"base": _base(setting)}
        made = weft.merge(setting.models, method, **known, **how, **params)
        data = [x for t in setting.tasks for x in torch.split(setting.inputs(t), 64)]
        mixed = torch.cat(data)[
            torch.randperm(sum(map(len, data)), generator=torch.Generator().manual_seed(0))
        ]
        found = calibrate(made, torch.split(mixed, 256), "batchnorm", module=setting.module())
        return Outcome({n: t.detach() for n, t in found.checkpoint.state_dict().items()})

    return make


def normed(setting: Setting) -> str:
    """Only networks with BatchNorm have statistics to mend."""
    running = any(n.endswith("running_var") for n in setting.models[0])
    return one_network(setting) or ("" if running else "the network has no BatchNorm")


def routed(**how: Any) -> Callable[[Setting, Params], Outcome]:
    """`weft.route` with these settings; its gate made from unlabelled inputs by task where it needs some."""

    def make(setting: Setting, params: Params) -> Outcome:
        import weft
        from weft.routing.learning import fit_router

        more = {**how, **params}
        gram = str(more.get("residual", "")).startswith("essential")
        seconds = 0.0
        if gram:
            more["statistics"], seconds = setting.statistics(("gram",))
        kind = more["gate"].kind if isinstance(more["gate"], Gating) else more["gate"]
        if kind == "prototype":
            more["data"], more["samples"] = examples(setting, "unlabelled"), setting.samples
        experts = dict(zip([t.name for t in setting.tasks], setting.models, strict=True))
        made = weft.route(setting.module(), _base(setting), experts, **more)
        if kind == "router":
            fit_router(made, examples(setting, "unlabelled"), split="train")
        made.to(next(setting.loaded.module.parameters()).device)
        return Outcome(module=made.eval(), parameters=made.cost().bytes / 4, extra_seconds=seconds)

    return make


class Told(nn.Module):
    """A module that is told the task."""

    def __init__(self, inner: nn.Module, task: str) -> None:
        super().__init__()
        self.inner, self.task = inner, task

    def forward(self, x: Any) -> Tensor:
        return cast(Tensor, self.inner(x, task=self.task))


def operated(seen: Seen) -> Callable[[Setting, Params], Outcome]:
    """Task arithmetic, then representation surgery (v1) on inputs by task."""

    def make(setting: Setting, params: Params) -> Outcome:
        import weft
        from weft.calibrate.run import calibrate

        merged = weft.merge(setting.models, "task_arithmetic", base=_base(setting), scale=0.3)
        names = [t.name for t in setting.tasks]
        data = {t: torch.split(x, 64) for t, x in examples(setting, seen).items()}
        found = calibrate(
            merged, data, "surgery", experts=dict(zip(names, setting.models, strict=True)),
            module=setting.module(), rank=int(params["rank"]), steps=int(params["steps"]),
            split="test-time" if seen == "test-time" else "train",
        )  # fmt: skip
        return Outcome(
            modules={n: Told(found.module, n) for n in names}, parameters=float(setting.size + found.added)
        )

    return make


def contender(
    name: str, label: str, make: Callable[[Setting, Params], Outcome], family: str, seen: Seen,
    params: Mapping[str, Any] | None = None, per_task: bool = False,
    tuned: Mapping[str, Sequence[Any]] | None = None, base: bool = True,
    fits: Callable[[Setting], str] = one_network,
) -> Contender:  # fmt: skip
    return Contender(
        name,
        label,
        make,
        family,
        seen,
        params or {},
        tuned or {},
        needs_base=base,
        per_task=per_task,
        fits=fits,
    )


_LEARN = {"steps": STEPS, "lr": RATE}
ADAPTED: tuple[Contender, ...] = (
    contender("adamerging", "AdaMerging, layer-wise", learned("entropy", "test-time", constraint="box"), "learned",
              "test-time", _LEARN),
    contender("adamerging_taskwise", "AdaMerging, task-wise",
              learned("entropy", "test-time", "model", constraint="box"), "learned", "test-time", _LEARN),
    contender("adamerging_train", "AdaMerging, layer-wise, on training inputs",
              learned("entropy", "unlabelled", constraint="box"), "learned", "unlabelled", _LEARN),
    contender("concrete", "Concrete task arithmetic", learned("entropy", "test-time", concrete=True), "learned",
              "test-time", {"steps": STEPS, "lr": 0.02}),
    contender("distilled", "Coefficients a tensor, by distilling", learned("distill", "unlabelled"), "learned",
              "unlabelled", _LEARN),
    contender("atlas", "aTLAS, few shots", learned("cross_entropy", "labelled", start=0.0, labels=True), "learned",
              "labelled", {"steps": STEPS, "lr": 2e-2}),
    contender("prodistill", "ProDistill", prodistilled, "learned", "unlabelled", {"steps": STEPS, "lr": 0.01}),
    contender("regmean_pp", "RegMean++", remeasured, "least squares", "unlabelled", base=False),
    contender("gram_data", "Gram, inputs and task vectors", gram_of_both, "least squares", "unlabelled",
              tuned={"scale": MEANS}, fits=fits_always),
    contender("weave_data", "weave, on inputs", woven, "least squares", "unlabelled",
              tuned={"scale": MEANS}, fits=fits_always),
    contender("aligned", "Aligned by weights, mean", aligned, "average", "none", base=False, fits=baseless),
    contender("linear_bn", "Mean + BatchNorm", reestimated("linear"), "calibrated", "unlabelled", base=False,
              fits=normed),
    contender("task_arithmetic_bn", "TA + BatchNorm", reestimated("task_arithmetic"), "calibrated", "unlabelled",
              {"scale": 0.3}, tuned={"scale": SUMS}, fits=normed),
    contender("tsv_bn", "TSV + BatchNorm", reestimated("tsv"), "calibrated", "unlabelled",
              tuned={"scale": MEANS}, fits=normed),
    contender("surgery", "TA + surgery", operated("test-time"), "calibrated", "test-time",
              {"rank": 16, "steps": 200}, per_task=True),
    contender("surgery_train", "TA + surgery, on training inputs", operated("unlabelled"), "calibrated",
              "unlabelled", {"rank": 16, "steps": 200}, per_task=True),
    contender("twin", "Twin-Merging", routed(
        shared={"method": "task_arithmetic", "scale": 0.3}, residual="lowrank:0.2", gate="router"), "routed",
        "unlabelled"),
    contender("smile", "SMILE", routed(
        shared="base", residual="lowrank:0.25", gate="energy", where="linear"), "routed", "none"),
    contender("esm_pp", "ESM++, rank 32", routed(
        shared={"method": "tsv"}, residual="essential:32", gate="prototype"), "routed", "unlabelled"),
    contender("prototype", "Full residuals, prototypes", routed(
        shared={"method": "task_arithmetic", "scale": 0.3}, residual="full", gate="prototype"), "routed",
        "unlabelled"),
)  # fmt: skip
