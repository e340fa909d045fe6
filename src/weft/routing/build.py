"""`weft.route`: experts of one base → one network with a shared merge, a residual an expert, and a gate."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

import weft
from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError, did_you_mean
from weft.learn.sources import Sources
from weft.methods.registry import METHODS
from weft.routing.blocks import Block, Where, blocks_of
from weft.routing.gated import How
from weft.routing.gates import Directions, Router
from weft.routing.gating import LEARNED, Gating
from weft.routing.residuals import SHARED_VECTOR, Keeping, Residual, gram_of, kept, masks_of, wide
from weft.routing.routed import Combining, Routed

RestsOn = Literal["shared", "base"]


def route(
    module: nn.Module,
    base: Model | None,
    experts: Sequence[Model] | Mapping[str, Model],
    *,
    shared: str | Mapping[str, Any] | Checkpoint = "task_arithmetic",
    residual: str = "full",
    gate: str | Gating = "oracle",
    where: Where = "all",
    tasks: Sequence[str] | None = None,
    rests_on: RestsOn = "shared",
    rest: float | Sequence[float] = 0.0,
    combine: str | Mapping[str, Any] | None = None,
    data: Any = None,
    samples: int = 32,
    split: str = "validation",
    statistics: Sequence[Model] | None = None,
    dtype: torch.dtype = torch.float32,
    how: How = "auto",
) -> Routed:
    """θ(x) = θs + Σₜ wₜ(x) Rₜ, Rₜ what expert t has beyond θs; the three parts are chosen apart.

    shared      a method (`{"method": "tsv", "scale": 1.0}` with its parameters; task arithmetic's scale is 0.3
                here), "base", or a checkpoint: what is not routed, and what residuals rest on; with
                `rests_on="base"` routed parts rest on the base instead
    residual    how each Rₜ is kept: full, lowrank:16, sparse:0.1, sign, quantised:4, emr, tall:0.4 … (residuals.py)
    gate        what chooses w: oracle, router, prototype, energy, residue, entropy, preference, or a `Gating`
    where       which parts are routed: "all", "linear", "mlp", or patterns of submodules' names
    rest        weights while nothing is known: in the first pass of gates that look at features, and where a gate
                is `unsure`. With rests_on="base" and a task arithmetic of 0.3 they are 0.3
    combine     None adds residuals up; a method (its parameters in a mapping) merges those with a weight above 0
    data        inputs by task for gates that need them: means of `samples` a task (prototype). Trained gates are
                left at their start: see `fit_router` and `train`. `split` is the data's name
    statistics  one checkpoint of Gram matrices an expert (`weft.measure(…, "gram")`) for residual="essential:r"

    `experts` by task, or a list with their names in `tasks`. The module is copied; it runs in evaluation mode.
    Raises UsageError for what cannot be meant, DataProblems where models do not fit the module (all at once).
    """
    if not isinstance(module, nn.Module):
        raise UsageError(f"module must be the torch module to run, not a {type(module).__name__}")
    models, names = _named(experts, tasks)
    if not models:
        raise UsageError("there is nothing to route: give at least one expert")
    gating = Gating.of(gate)
    keeping = Keeping.parse(residual, dtype)
    if rests_on not in ("shared", "base"):
        raise UsageError(f"residuals rest on shared or base, not {rests_on!r}")
    if base is None and (rests_on == "base" or shared == "base"):
        raise UsageError("there is no base to rest on: give base=")
    if keeping.kind == "essential" and statistics is None:
        raise UsageError(
            "residual='essential:…' looks at inputs: give statistics=, Gram matrices of each expert"
        )
    if statistics is not None and len(statistics) != len(models):
        raise UsageError(f"{len(statistics)} statistics are given for {len(models)} experts")
    if gating.kind == "prototype" and data is None:
        raise UsageError("a prototype gate is made of inputs of each task: give data= by task")
    if data is not None and gating.kind != "prototype":
        raise UsageError(
            f"data are for prototype gates; a gate of kind {gating.kind} "
            + ("is trained: weft.routing.fit_router or train" if gating.kind in LEARNED else "needs none")
        )
    rest_row = _rest(rest, len(models))
    combining = _combining(combine)
    blocks = blocks_of(module, where)
    sources = _sources(module, base, models)
    merged = _shared(shared, base, models)
    below = Sources(module, None, [merged], hold=False)
    net = copy.deepcopy(module).eval().requires_grad_(False)
    residuals = _filled(net, sources, below, blocks, keeping, rests_on, statistics)
    routed = Routed(
        net, _changed(blocks, residuals), residuals, gating, names, rest=rest_row, how=how, combining=combining,
        origin=f"routed {', '.join(names)}",
    )  # fmt: skip
    _untrained_gates(routed)
    if gating.kind == "prototype":
        from weft.routing.learning import fit_prototypes

        fit_prototypes(routed, data, samples=samples, split=split)
    return routed


def _named(
    experts: Sequence[Model] | Mapping[str, Model], tasks: Sequence[str] | None
) -> tuple[list[Model], list[str]]:
    if isinstance(experts, Mapping) and not any(isinstance(v, Tensor) for v in experts.values()):
        if tasks is not None:
            raise UsageError("experts by task have their names: leave tasks out")
        return list(experts.values()), [str(n) for n in experts]
    if isinstance(experts, str | Mapping | nn.Module | Checkpoint):
        raise UsageError("experts must be a list, or a mapping from task to expert")
    models = list(experts)
    names = [f"task{i}" for i in range(len(models))] if tasks is None else [str(t) for t in tasks]
    if len(names) != len(models) or len(set(names)) < len(names):
        raise UsageError(f"tasks must be {len(models)} different names, one an expert")
    return models, names


def _rest(rest: float | Sequence[float], count: int) -> Tensor:
    try:
        row = torch.as_tensor(rest, dtype=torch.float32)
    except (TypeError, ValueError):
        raise UsageError(f"rest must be a number, or {count} of them, not {rest!r}") from None
    row = row.expand(count).clone() if row.dim() == 0 else row
    if row.shape != (count,) or not bool(row.isfinite().all()):
        raise UsageError(f"rest must be one finite number, or {count} of them")
    return row


def _combining(combine: str | Mapping[str, Any] | None) -> Combining:
    if combine is None:
        return Combining()
    params = dict(combine) if isinstance(combine, Mapping) else {"method": combine}
    name = str(params.pop("method", ""))
    if name not in METHODS:
        raise UsageError(
            f"there is no method {name!r} to combine residuals with{did_you_mean(name, METHODS)}"
        )
    method = METHODS[name]
    if method.space != "deltas" or method.needs:
        raise UsageError(f"{name} does not merge task vectors alone, so it cannot combine residuals")
    method.check(params)
    return Combining(name, params)


def _sources(module: nn.Module, base: Model | None, models: Sequence[Model]) -> Sources:
    try:
        return Sources(module, base, models, hold=False)
    except DataProblems as error:
        raise DataProblems(
            "these experts cannot be routed in this module (experts with different heads: give them a common head, "
            "or route the trunk alone)",
            error.problems,
        ) from None


def _shared(
    shared: str | Mapping[str, Any] | Checkpoint, base: Model | None, models: Sequence[Model]
) -> Checkpoint:
    """θs as a checkpoint in memory."""
    if isinstance(shared, Checkpoint):
        made = shared
    elif shared == "base":
        assert base is not None
        made = weft.load(base)
    else:
        params: dict[str, Any] = {"method": shared} if isinstance(shared, str) else dict(shared)
        method = str(params.pop("method", ""))
        if method == "task_arithmetic" and not {"weight", "scale"} & params.keys():
            params["scale"] = 0.3
        with_base = METHODS[method].base != "forbidden" if method in METHODS else True
        made = weft.merge(list(models), method, base=base if with_base else None, **params)
    from weft.learn.sources import in_memory

    return in_memory(made)


def _filled(
    net: nn.Module, sources: Sources, below: Sources, blocks: Sequence[Block], keeping: Keeping,
    rests_on: RestsOn, statistics: Sequence[Model] | None,
) -> dict[str, Residual]:  # fmt: skip
    """Put θs into the network, and what each expert has beyond it into residuals."""
    routed = [n for b in blocks for n in b.parameters]
    running = [n for b in blocks for n in b.buffers]
    measured = None if statistics is None else [weft.load(s) for s in statistics]
    if measured and keeping.kind == "essential":
        without = [m.origin for m in measured if not any(gram_of(m, n) is not None for n in routed)]
        if without:
            raise UsageError(
                f"{without[0]} holds no Gram matrix of a routed weight: make some with weft.measure(…, 'gram')"
            )
    targets = dict(net.named_parameters()) | dict(net.named_buffers())
    tau: dict[str, list[Tensor]] = {}
    made: dict[str, Residual] = {}
    for name in (*sources.parameters, *sources.buffers):
        target = targets[name]
        if name in sources.buffers:  # means over the experts: sums of running statistics mean nothing
            value = sources.averaged(name)
        elif name in routed and rests_on == "base":
            value = sources.value(None, name)
        else:
            value = below.value(0, name)
        with torch.no_grad():
            target.copy_(value.to(target.dtype))
        if name not in routed and name not in running:
            continue
        anchor = wide(target.detach())  # as it is kept, so that its rounding is mended too
        each = [wide(sources.value(t, name)) - anchor for t in range(len(sources.models))]
        if keeping.kind in SHARED_VECTOR and name in routed:
            tau[name] = each
            continue
        grams = None if measured is None else [gram_of(m, name) for m in measured]
        made[name] = kept(each, keeping, grams)
    made |= masks_of(tau, keeping) if tau else {}
    return {n: r for n, r in made.items() if not r.empty}


def _changed(blocks: Sequence[Block], residuals: Mapping[str, Residual]) -> list[Block]:
    """The blocks in which any expert differs. UsageError where none does."""
    found = [b for b in blocks if any(n in residuals for n in (*b.parameters, *b.buffers))]
    if not found:
        raise UsageError("the experts do not differ in the routed parts: there is nothing to choose between")
    return found


def _untrained_gates(routed: Routed) -> None:
    """Gates that follow from the weights, and trained ones at their start."""
    gating, count = routed.gating, len(routed.tasks)
    if gating.kind == "preference":
        for key in routed.gate_keys:
            routed.set_gate(key, Router(count, count, gating))
    elif routed.directions_needed():
        for key, part in zip(routed.gate_keys, _first_parts(routed), strict=True):
            routed.set_gate(key, directions(routed, part))


def _first_parts(routed: Routed) -> list[str]:
    """What a gate of directions looks through: each block, or the submodule that a gate of the model looks at."""
    if routed.gating.scope == "model":
        return [routed.at or ""]
    return [b.name for b in routed.blocks]


def directions(routed: Routed, path: str) -> Directions:
    """The right singular directions of the residuals of the first matrix of a part."""
    from weft.methods.factors import decompose

    dot = f"{path}." if path else ""
    for name, residual in zip(routed.residual_names, routed.residuals, strict=True):
        assert isinstance(residual, Residual)
        if not name.startswith(dot) or len(residual.shape) != 2:
            continue
        rows = []
        for t in range(len(routed.tasks)):
            r = residual.of(t)
            none = torch.zeros(0, residual.shape[1])
            rows.append(none if r is None else decompose(r.cpu(), routed.gating.rank).v.T)
        most = max(len(v) for v in rows)
        if routed.gating.rank is None:  # all of a matrix span everything: leave what a store leaves
            most = min(most, max(1, min(residual.shape) // len(rows)))
            rows = [v[:most] for v in rows]
        padded = [torch.cat([v, v.new_zeros(most - len(v), v.shape[1])]).float() for v in rows]
        return Directions(torch.stack(padded), routed.gating.kind == "residue")
    raise UsageError(
        f"{path or 'the network'} has no routed matrix whose directions a gate could look at: name one (at=…)"
    )
