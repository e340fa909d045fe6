"""ProDistill: coefficients learned layer after layer, by distilling each expert's layer (arXiv:2502.12706).

For stage l (a submodule) and task i, with z the features before it in the merged model so far and zᵢ those in
expert i, on inputs of task i without labels:

    min over λˡ of Σᵢ ½ ‖f(z; θˡ(λ)) − f(zᵢ; θᵢˡ)‖² + ½ ‖f(zᵢ; θˡ(λ)) − f(zᵢ; θᵢˡ)‖²

The merged features go on from what was learned, so later stages make up for what earlier ones miss; the experts'
keep the targets in reach. A stage's gradient stays in it: no activations of the whole model are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from weft.api import Model
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.learn.constraints import Constraint
from weft.learn.data import feeds
from weft.learn.loop import Learned, check_gradients, seeded
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Parts
from weft.learn.weighed import Weighed
from weft.statistics.batches import Batch
from weft.statistics.blockwise import stack_of


class _Enough(Exception):
    """Ends a forward pass whose remainder does not matter."""


@dataclass(frozen=True)
class Call:
    """What one stage was called with, for `size` examples, and what it gave."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    size: int

    def rows(self, index: Tensor) -> Call:
        """The same for some of the examples."""

        def cut(value: Any) -> Any:
            held = isinstance(value, Tensor) and value.ndim > 0 and len(value) == self.size
            return value[index.to(value.device)] if held else value

        args, kwargs, output = pytree.tree_map(cut, (self.args, dict(self.kwargs), self.output))
        return Call(args, kwargs, output, len(index))


def prodistill(
    module: nn.Module,
    base: Model,
    models: Sequence[Model],
    data: Any,
    *,
    tasks: Sequence[str],
    parts: Parts = "element",
    constraint: str | Constraint = "free",
    stages: Sequence[str] | None = None,
    both: bool = True,
    start: float = 0.3,
    steps: int = 100,
    lr: float = 0.01,
    batch: int = 32,
    seed: int = 0,
    split: str = "unlabelled",
    **how: Any,
) -> Learned:
    """Learn `parts` of every stage with `steps` steps of Adam each; see the module's docstring.

    `stages` names submodules that a forward pass calls once each, in order; by default the blocks of the module's
    largest stack and what has parameters beside them. Parameters in no stage keep `start`, private ones
    (classifiers, `private=…`) are each task's own. `both=False` uses merged features only. A few dozen examples
    a task do.
    Every stage runs the module up to itself once for the merged model and once an expert; the experts' features of
    one stage are held at a time.
    """
    merged = Mergeable(module, base, models, parts, constraint, start=start, tasks=tasks, **how)
    way = merged.way
    assert isinstance(way, Weighed)
    units = _stages(merged.inner, way.names) if stages is None else list(stages)
    if not units:
        raise UsageError(f"{type(module).__name__} has no submodules with parameters to merge: name stages=…")
    known = dict(merged.inner.named_modules())
    lost = [n for n in units if n not in known or not n]
    if lost:
        raise Problems("there are no such stages", [f"{n!r}{did_you_mean(n, known)}" for n in lost])
    sources = feeds(data, merged.tasks, batch, seed, merged.sources.device)
    batches = {t: list(f.once()) for t, f in sources.items() if t is not None}
    units = _in_order(merged, units, next(iter(batches.values()))[0], stages is not None)
    found = Learned(merged, [], split)
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed, merged.sources.device):
        for unit in units:
            _learn_stage(merged, way, unit, batches, found, steps, lr, batch, both, generator)
    return found


def _learn_stage(
    merged: Mergeable, way: Weighed, unit: str, batches: Mapping[str, list[Batch]], found: Learned, steps: int,
    lr: float, batch: int, both: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    names = [n for n in way.names if n.startswith(f"{unit}.")]
    if not names:
        return
    keys = {way.places[n].key for n in names}
    trained = [p for key, p in zip(way.keys, way.phi, strict=True) if key in keys]
    shared = [n for n in way.names if n not in names and way.places[n].key in keys]
    if shared:
        raise UsageError(
            f"{names[0]} and {shared[0]} share a coefficient but not a stage: choose other parts"
        )
    with torch.no_grad():
        weights = merged.weights()
        seen = {t: [_calls(merged, weights, unit, t, b) for b in bs] for t, bs in batches.items()}
    stage, optimizer = merged.inner.get_submodule(unit), torch.optim.Adam(trained, lr=lr)
    kept = {
        t: {**merged.of_task(t), **{n: merged.sources.averaged(n) for n in merged.sources.buffers}}
        for t in seen
    }
    for step in range(1, steps + 1):
        weights = way.weights(names)
        loss = torch.zeros((), device=merged.sources.device)
        for task, calls in seen.items():
            state = _local(stage, unit, {**kept[task], **weights})
            ours, theirs = calls[int(torch.randint(len(calls), (), generator=generator))]
            index = torch.randperm(ours.size, generator=generator)[:batch]
            ours, theirs = ours.rows(index), theirs.rows(index)
            for call in (ours, theirs) if both else (ours,):
                made = _first(functional_call(stage, state, call.args, dict(call.kwargs)))
                loss = loss + (made.float() - theirs.output.float()).square().mean() / (1 + both)
        loss = loss / len(seen)
        if not bool(loss.isfinite()):
            raise DataError(f"the loss of stage {unit} is {float(loss)} at step {step}: lower lr")
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        check_gradients(trained, step)
        optimizer.step()
        way.project()
        found.losses.append(float(loss.detach()))


def _calls(
    merged: Mergeable, weights: Mapping[str, Tensor], unit: str, task: str, batch: Batch
) -> tuple[Call, Call]:
    """How the stage is called in the merged model and in the task's own."""
    i = merged.index(task)
    ours = _caught(merged.inner, unit, batch, lambda: merged.at(weights, batch.args, batch.kwargs, task))
    return ours, _caught(merged.inner, unit, batch, lambda: merged.expert(i, batch))


def _caught(module: nn.Module, unit: str, batch: Batch, run: Callable[[], Any]) -> Call:
    found: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        found.append(Call(args, kwargs, _first(output), batch.size))
        raise _Enough

    hook = module.get_submodule(unit).register_forward_hook(keep, with_kwargs=True)
    try:
        run()
    except _Enough:
        return found[0]
    finally:
        hook.remove()
    raise UsageError(f"stage {unit!r} is never called")


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(found, Tensor):
        raise UsageError(f"a stage must give a tensor, not a {type(found).__name__}: choose other stages")
    return found


def _local(stage: nn.Module, unit: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stage's part of a state, by its own names and in its own dtypes."""
    own = {**dict(stage.named_parameters()), **dict(stage.named_buffers())}
    return {n: state[f"{unit}.{n}"].to(t.dtype) for n, t in own.items() if f"{unit}.{n}" in state}


def _stages(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Blocks of the largest stack, and whatever else has parameters to merge; without a stack the children."""
    try:
        stack: str | None = stack_of(module)[0]
    except UsageError:
        stack = None

    def units(path: str, m: nn.Module) -> list[str]:
        holds = stack is not None and (path == stack or stack.startswith(f"{path}.") or not path)
        if (not holds or not list(m.children())) and path:
            return [path] if any(n.startswith(f"{path}.") for n in names) else []
        inner = [(f"{path}.{n}" if path else n, child) for n, child in m.named_children()]
        return [u for p, child in inner for u in units(p, child)]

    return units("", module)


def _in_order(merged: Mergeable, units: Sequence[str], batch: Batch, all_called: bool) -> list[str]:
    """The stages in the order of their calls. UsageError for one that is called several times, or in another."""
    order: list[str] = []
    hooks = [
        merged.inner.get_submodule(u).register_forward_hook(lambda *_, u=u: order.append(u)) for u in units
    ]
    try:
        merged.expert(0, batch.first(1))
    finally:
        for hook in hooks:
            hook.remove()
    inside = [u for u in units if any(u.startswith(f"{v}.") for v in units)]
    idle = [u for u in units if u not in order] if all_called else []
    if inside or idle:
        raise UsageError(
            f"each stage must be called once and by itself: {', '.join(inside or idle)} "
            + ("lies in another stage" if inside else "is never called")
        )
    twice = sorted({u for u in order if order.count(u) > 1})
    if twice:
        raise UsageError(f"stages are called more than once: {', '.join(twice)}; choose others (stages=…)")
    return order
