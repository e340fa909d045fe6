"""`Mergeable`: a module whose weights are a merge that can be trained.

The module runs in evaluation mode (no dropout, running statistics) with the merged weights in place of its own, by
`torch.func.functional_call`; only what the merge is made of is trained. The module that is given stays as it is:
a copy of it runs, whose weights are not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.api import Model
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.errors import Problems, UsageError, did_you_mean
from weft.learn.constraints import Constraint
from weft.learn.parts import Parts
from weft.learn.sources import Sources
from weft.learn.weighed import Way, Weighed
from weft.statistics.batches import Batch
from weft.train.forward import Output, logits_of

MakeWay = Callable[[Sources, list[str]], Way]


class Mergeable(nn.Module):
    """θ(λ) of `models` (and a `base`) in `module`; see `Weighed` for the formula.

    `parts`: which entries share a coefficient (parts.py); `constraint`: what values it may take (constraints.py);
    `start`: where it starts, 0.3 with a base and 1/k otherwise. `way` replaces all three (masks, parameters of a
    method); so does `method`, a method of weft by name whose `learned` parameters are trained (`ByMethod`).

    `tasks` names the models, for losses that ask a task's own model; `private` are patterns of parameters that are
    not merged but taken from the task's model (classifiers, of any shape), and trained with `train_private`.

    Float buffers are the mean over the models; with `norms="batch"` BatchNorm uses the batch's statistics instead
    (re-estimate them afterwards). `hold=False` reads models anew at every step instead of keeping them in memory.

    Raises UsageError for what cannot be meant and DataProblems where models do not fit the module.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Model | None,
        models: Sequence[Model],
        parts: Parts = "model",
        constraint: str | Constraint = "free",
        *,
        start: Any = None,
        way: MakeWay | None = None,
        method: str | None = None,
        learned: Mapping[str, Any] | None = None,
        fixed: Mapping[str, Any] | None = None,
        tasks: Sequence[str] | None = None,
        private: Sequence[str] = (),
        train_private: bool = False,
        norms: Literal["mean", "batch"] = "mean",
        hold: bool = True,
        output: Output = logits_of,
    ) -> None:
        super().__init__()
        if norms not in ("mean", "batch"):
            raise UsageError(f"norms must be mean or batch, not {norms!r}")
        inner = _skeleton(module)
        for m in inner.modules():
            if norms == "batch" and isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.train()
                m.track_running_stats = False  # of the batch, and nothing is noted
        self.__dict__["inner"] = inner  # not registered: its weights are not what is trained
        self.norms = norms
        self.private = _matching([n for n, _ in inner.named_parameters()], private)
        self.sources = Sources(inner, base, models, hold, self.private)
        self.tasks = self._tasks(tasks, private)
        names = [n for n in self.sources.parameters if n not in self.private]
        if not names:
            raise UsageError("all parameters are private: there is nothing to merge")
        self.output, self._seen = output, dict[str, Tensor]()
        self.way: Way = self._made_way(way, method, learned, fixed, names, parts, constraint, start)
        self.own = nn.ParameterDict()
        if train_private:
            for i, task in enumerate(self.tasks or ()):
                for n in self.private:
                    wide = torch.promote_types(self.sources.parameters[n].dtype, torch.float32)
                    self.own[f"{task}/{n}".replace(".", "/")] = nn.Parameter(
                        self.sources.value(i, n).to(wide, copy=True)
                    )

    def _made_way(
        self, way: MakeWay | None, method: str | None, learned: Mapping[str, Any] | None,
        fixed: Mapping[str, Any] | None, names: list[str], parts: Parts, constraint: str | Constraint, start: Any,
    ) -> Way:  # fmt: skip
        if way is not None and method is not None:
            raise UsageError("give way= or method=, not both")
        if method is not None:
            from weft.learn.by_method import ByMethod

            if self.sources.buffers and self.norms != "batch":
                raise UsageError(
                    f"{method} also merges running statistics, which here would not be its own: norms='batch'"
                )
            return ByMethod(self.sources, names, method, learned or {}, fixed or {})
        if learned or fixed:
            raise UsageError("learned= and fixed= are parameters of a method: name it (method=…)")
        return (
            Weighed(self.sources, names, parts, constraint, start)
            if way is None
            else way(self.sources, names)
        )

    def _tasks(self, tasks: Sequence[str] | None, private: Sequence[str]) -> list[str] | None:
        if tasks is None:
            if private:
                raise UsageError("private parameters are of tasks: name them (tasks=…), one a model")
            return None
        if isinstance(tasks, str) or len(tasks) != len(self.sources.models) or len(set(tasks)) < len(tasks):
            raise UsageError(f"tasks must be {len(self.sources.models)} different names, one a model")
        return list(tasks)

    @property
    def inner(self) -> nn.Module:
        """The module, a copy."""
        return self.__dict__["inner"]  # type: ignore[no-any-return]

    def index(self, task: str) -> int:
        """Which model is a task's."""
        if self.tasks is None or task not in self.tasks:
            known = self.tasks or []
            raise UsageError(
                f"there is no task {task!r}{did_you_mean(task, known)}; known: {', '.join(known)}"
            )
        return self.tasks.index(task)

    # -- weights ----------------------------------------------------------------------------------

    def weights(self) -> dict[str, Tensor]:
        """θ of the merged parameters; differentiable."""
        return self.way.weights()

    def of_task(self, task: str | None) -> dict[str, Tensor]:
        """The private parameters of a task (without one the base's, or the first model's)."""
        if task is None:
            i = None if self.sources.base is not None else 0
            return {n: self.sources.value(i, n) for n in self.private}
        i = self.index(task)
        trained = {n: f"{task}/{n}".replace(".", "/") for n in self.private}
        return {
            n: self.own[key] if key in self.own else self.sources.value(i, n) for n, key in trained.items()
        }

    # -- calls ------------------------------------------------------------------------------------

    def forward(self, *args: Any, task: str | None = None, **kwargs: Any) -> Tensor:
        return self.at(self.weights(), args, kwargs, task)

    def at(
        self, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
        task: str | None = None,
    ) -> Tensor:  # fmt: skip
        """The output with these merged weights and a task's private ones."""
        state = {**weights, **self.of_task(task)} if self.private else dict(weights)
        return self._call(state, {n: self._mean_buffer(n) for n in self.sources.buffers}, args, kwargs or {})

    @torch.no_grad()
    def expert(self, i: int, batch: Batch) -> Tensor:
        """The output of model i by itself."""
        state = {n: self.sources.value(i, n) for n in self.sources.parameters}
        buffers = {n: self.sources.value(i, n) for n in self.sources.buffers}
        return self._call(state, buffers, batch.args, batch.kwargs)

    def _call(
        self, state: Mapping[str, Tensor], buffers: Mapping[str, Tensor], args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:  # fmt: skip
        typed = {n: t.to(self.sources.parameters[n].dtype) for n, t in state.items()}
        typed |= {n: t.to(self.sources.buffers[n].dtype) for n, t in buffers.items()}
        try:
            made = functional_call(self.inner, typed, args, dict(kwargs))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            given = [*args, *kwargs.values()]
            shapes = ", ".join(str(list(v.shape)) for v in given if isinstance(v, Tensor))
            raise UsageError(
                f"{type(self.inner).__name__} cannot be run on this batch ({shapes}): {str(error).splitlines()[0]}"
            ) from error
        return self.output(made)

    def _mean_buffer(self, name: str) -> Tensor:
        if name not in self._seen:
            self._seen[name] = self.sources.averaged(name)
        return self._seen[name]

    @contextmanager
    def watched(self, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the named submodules give while inside, by name."""
        known = dict(self.inner.named_modules())
        lost = [n for n in layers if n not in known]
        if lost:
            raise Problems("there are no such layers", [f"{n!r}{did_you_mean(n, known)}" for n in lost])
        found: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[..., None]:
            def keep(module: nn.Module, inputs: Any, outputs: Any) -> None:
                found[name] = outputs[0] if isinstance(outputs, tuple) else outputs

            return keep

        hooks = [known[n].register_forward_hook(keeper(n)) for n in layers]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()

    # -- results ----------------------------------------------------------------------------------

    def project(self) -> None:
        """Bring the coefficients back into their constraint, after a step."""
        self.way.project()

    def checkpoint(self, task: str | None = None) -> Checkpoint:
        """The merge as it is now, a lazy checkpoint; with the private parameters of `task`."""
        taken: dict[str, tuple[Checkpoint, str]] = {}
        sources, anchor = self.sources, self.sources.all[0]
        if task is None:
            taken = {p: (anchor, p) for p in (sources.stored(anchor, n) or n for n in self.private)}
        elif self.private:
            i = self.index(task)
            trained = {n: t.detach() for n, t in self.of_task(task).items() if self.own}
            held = StateDict(trained, f"trained for {task}") if trained else None
            for n in self.private:
                place = sources.stored(anchor, n) or n
                model = sources.models[i]
                taken[place] = (model, sources.stored(model, n) or n) if held is None else (held, n)
        return self.way.checkpoint(taken)


def _skeleton(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, untrained, that shares its weights with the module."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in module.parameters()}
    made = copy.deepcopy(module, shared).eval()
    for (
        m
    ) in made.modules():  # a cache of keys and values outlives a call: what is run twice would see the first
        if getattr(getattr(m, "config", None), "use_cache", False):
            m.config.use_cache = False  # type: ignore[union-attr]
    return made


def _matching(names: list[str], patterns: Sequence[str]) -> list[str]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    lost = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if lost:
        raise Problems("no parameter is called so", [f"{p!r}{did_you_mean(p, names)}" for p in lost])
    return [n for n in names if any(fnmatchcase(n, p) for p in patterns)]
