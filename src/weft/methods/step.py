"""Steps and pipelines: the two pieces every merging method is made of.

A step is a small pure function over a stack of tensors `x: [k, *shape]` (k models, usually task vectors).
It maps the stack to a stack, or reduces it to `[*shape]`. It declares

- `grain`: whether it may see any range of elements, whole rows, or only the whole tensor;
- `stat`: a statistic of the stack over the tensor or the whole model that must be known first. The engine
  gathers it in a streaming pass; a direct call gathers it from the tensor at hand;
- `needs`: what must have been measured on data (see measured.py), such as `("fisher",)`; with `one_by_one` a
  statistic that comes whole is read a model at a time, when the step asks for it;
- `simpler`: what the step comes to for some tensors, as a step that streams better;
- `workspace`: bytes it holds beside the values, where that is not a few times their size.

`trim(x, density=0.2)` runs the step; `trim(density=0.2)` binds it, and bound steps compose with `|` into a
pipeline, which is again callable on tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from inspect import signature
from math import prod
from typing import Any, Literal, overload

from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.kinds import Need
from weft.methods.measured import at_hand
from weft.methods.params import Parameter, check_params, per_model, signature_parameters
from weft.methods.stats import Stat, tensor

Grain = Literal["element", "row", "tensor"]
Statistics = Mapping[str, Tensor | None]
Shapes = Mapping[str, tuple[int, ...]]
"""What was measured of a tensor: the shape of each statistic by its keyword."""
Refuses = Callable[[Mapping[str, Any], int], None]


def anything_goes(params: Mapping[str, Any], k: int) -> None:
    """For steps whose parameters are never wrong together."""


@dataclass(frozen=True)
class At:
    """Where a stack of values lies: what a step may know beside the values themselves."""

    name: str = ""
    shape: tuple[int, ...] = ()
    """Shape of the whole tensor (not of the range)."""
    start: int = 0
    """Flat position of the first element of the range in the tensor."""
    seed: int = 0
    layer: int | None = None
    """Index of the block the tensor belongs to, None for tensors outside the blocks."""
    layers: int = 1
    """Number of blocks of the model."""
    transposed: bool = False
    """Whether the weight is stored [in, out]: by its statistics, its module, or its architecture."""

    @property
    def numel(self) -> int:
        return prod(self.shape)


def row_length(shape: Sequence[int]) -> int:
    """Elements of one row: the input weights of one output unit.

    The last axis of matrices and of fused experts `[E, out, in]`; everything behind the first axis for
    convolutions (four axes and more, or three with a short kernel axis); a vector is one row.
    """
    if len(shape) <= 1:
        return max(1, prod(shape))
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] >= 16):
        return max(1, shape[-1])
    return max(1, prod(shape[1:]))


class Step:
    """A declared step. See the module's docstring; made by the decorator `step`."""

    def __init__(
        self,
        fn: Callable[..., Tensor],
        *,
        grain: Grain | Callable[[Mapping[str, Any]], Grain],
        stat: Stat | None,
        reduces: bool,
        needs: Sequence[str] = (),
        one_by_one: bool = False,
        simpler: Callable[[Mapping[str, Any], At, Shapes], Bound | None] | None = None,
        workspace: Callable[[Mapping[str, Any], At, int, Shapes], int] | None = None,
        refuses: Refuses | None = None,
    ) -> None:
        self.refuses = refuses
        self.fn, self.name, self.stat, self.reduces = fn, fn.__name__, stat, reduces
        self.one_by_one, self.simpler, self.workspace = one_by_one, simpler, workspace
        self.needs = tuple(map(Need.parse, needs))
        self._grain = grain
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        known = signature(fn).parameters
        self.wants_at = "at" in known
        self.wants_base = "base" in known
        provided = (*(stat.provides if stat else ()), *(n.keyword for n in self.needs))
        if len(set(provided)) < len(provided):
            raise UsageError(f"step {self.name}: its stat and its needs give one keyword twice")
        self.params: dict[str, Parameter] = signature_parameters(fn, skip=("at", "base", *provided))

    def grain(self, params: Mapping[str, Any]) -> Grain:
        return self._grain(params) if callable(self._grain) else self._grain

    def refuse(self, params: Mapping[str, Any], k: int) -> None:
        """UsageError where parameters that are right one by one are wrong together, or for k models."""
        for name, p in self.params.items():
            if p.per_model and isinstance(params[name], list | tuple):
                per_model(params[name], k, name)
        if self.refuses is not None:
            self.refuses(params, k)

    def run(
        self,
        x: Tensor,
        params: Mapping[str, Any],
        found: Mapping[str, Any],
        at: At,
        base: Tensor | None,
    ) -> Tensor:
        """Apply the function given the statistics `found`; the engine's way in."""
        whole = self.stat is not None and self.stat.arrays
        extra: dict[str, Any] = (
            dict(found) if whole else {name: tensor(value) for name, value in found.items()}
        )
        if self.wants_at:
            extra["at"] = at
        if self.wants_base:
            extra["base"] = base
        return self.fn(x, **params, **extra)

    @overload
    def __call__(self, x: None = None, /, **params: Any) -> Pipeline: ...
    @overload
    def __call__(
        self, x: Tensor | Sequence[Tensor], /, *, base: Tensor | None = None, at: At | None = None,
        statistics: Statistics | None = None, **params: Any,
    ) -> Tensor: ...  # fmt: skip
    def __call__(
        self,
        x: Tensor | Sequence[Tensor] | None = None,
        /,
        *,
        base: Tensor | None = None,
        at: At | None = None,
        statistics: Statistics | None = None,
        **params: Any,
    ) -> Tensor | Pipeline:
        pipeline = Pipeline((Bound(self, check_params(self.name, self.params, params)),))
        return pipeline if x is None else pipeline(x, base=base, at=at, statistics=statistics)

    def __reduce__(self) -> tuple[Any, ...]:
        # by name, since a decorated function cannot be pickled; one of a script's own goes as it is
        if STEPS.get(self.name) is self and self.fn.__module__ != "__main__":
            return _declared, (self.fn.__module__, self.name)
        return _remade, (vars(self),)

    def __repr__(self) -> str:
        return f"<step {self.name}>"


def _declared(module: str, name: str) -> Step:
    import_module(module)
    return STEPS[name]


def _remade(state: dict[str, Any]) -> Step:
    made = Step.__new__(Step)
    vars(made).update(state)
    return made


def step(
    *,
    grain: Grain | Callable[[Mapping[str, Any]], Grain] = "element",
    stat: Stat | None = None,
    reduces: bool = False,
    needs: Sequence[str] = (),
    one_by_one: bool = False,
    simpler: Callable[[Mapping[str, Any], At, Shapes], Bound | None] | None = None,
    workspace: Callable[[Mapping[str, Any], At, int, Shapes], int] | None = None,
    refuses: Refuses | None = None,
) -> Callable[[Callable[..., Tensor]], Step]:
    """Declare a function `(x: [k, *shape], *, params…) -> Tensor` as a step.

    Keywords named `at` (an `At`) and `base` (the base's values, `[*shape]`) are filled in by whoever runs
    the step; those that `stat` provides come from the statistic, those in `needs` from what was measured
    (measured.py). With grain "row", x comes as
    `[k, rows, row_length]`; with "tensor" as `[k, *shape]`; with "element" in any shape. `simpler(params, at,
    shapes of what was measured)` gives the step to run in its place in a merge, or None; it must give the same.
    `workspace(params, at, k, shapes)` counts bytes beside the stack and the base, with `one_by_one` also what is
    read. `refuses(params, k)` raises for parameters that are wrong together; without it a recipe is tried on a toy.
    """

    def declare(fn: Callable[..., Tensor]) -> Step:
        if fn.__name__ in STEPS:
            raise UsageError(f"there are two steps named {fn.__name__!r}")
        STEPS[fn.__name__] = Step(
            fn, grain=grain, stat=stat, reduces=reduces, needs=needs, one_by_one=one_by_one, simpler=simpler,
            workspace=workspace, refuses=refuses,
        )  # fmt: skip
        return STEPS[fn.__name__]

    return declare


STEPS: dict[str, Step] = {}
"""Every declared step by name: the vocabulary of `steps:` in a recipe."""


@dataclass(frozen=True)
class Bound:
    """A step with its parameters."""

    step: Step
    params: Mapping[str, Any]

    @property
    def grain(self) -> Grain:
        return self.step.grain(self.params)

    @property
    def scope(self) -> Literal["tensor", "model"]:
        """Over what the statistic is taken: the step's `scope` parameter, or its stat's own."""
        if self.step.stat is None:
            return "tensor"
        scope: Literal["tensor", "model"] = self.params.get("scope", self.step.stat.scope)
        return scope

    def simplest(self, at: At, known: Shapes) -> Bound:
        """What it comes to for one tensor, where that streams better than the step itself; else the step."""
        return self if self.step.simpler is None else self.step.simpler(self.params, at, known) or self

    def workspace(self, at: At, k: int, known: Shapes, count: int) -> int:
        """Bytes held beside the stack and the base, for `count` elements: a few float64 copies of the stack.

        Measured: below five times the values, all in all. A step that holds more says so itself.
        """
        own = self.step.workspace
        return count * 8 * (4 * k + 3) if own is None else own(self.params, at, k, known)


@dataclass(frozen=True)
class Pipeline:
    """Bound steps, one after the other; composed with `|`, callable on tensors."""

    steps: tuple[Bound, ...] = field(default=())

    def __or__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.steps + other.steps)

    @cached_property
    def grain(self) -> Grain:
        """The coarsest grain any step needs."""
        grains = {b.grain for b in self.steps}
        return "tensor" if "tensor" in grains else "row" if "row" in grains else "element"

    @property
    def reduces(self) -> bool:
        return any(b.step.reduces for b in self.steps)

    def workspace(self, at: At, k: int, known: Callable[[Bound], Shapes], count: int) -> int:
        """Bytes that its steps hold, one after the other, beside the stack of k models and the base.

        Tables of statistics come on top, however short the range.
        """
        most, left = 0, k
        tables = max((b.step.stat.table_bytes(k, b.params) for b in self.steps if b.step.stat), default=0)
        for b in self.steps:
            most, left = max(most, b.workspace(at, left, known(b), count)), 1 if b.step.reduces else left
        return most + tables

    @cached_property
    def needs(self) -> tuple[Need, ...]:
        """What must have been measured for any of the steps, each once."""
        return tuple(dict.fromkeys(n for b in self.steps for n in b.step.needs))

    def __call__(
        self, x: Tensor | Sequence[Tensor], *, base: Tensor | None = None, at: At | None = None,
        statistics: Statistics | None = None,
    ) -> Tensor:  # fmt: skip
        """Run on a stack `[k, *shape]` or a list of k tensors, with statistics of these tensors alone.

        `statistics` holds what was measured, by kind: `{"fisher": [k, *shape], "base_fisher": [*shape]}`; None
        where there is nothing for this tensor.
        """
        stack = as_stack(x)
        shape = tuple(stack.shape[1:])
        at = replace(at or At(), shape=shape)
        reduced = False
        for bound in self.steps:
            if reduced and (bound.step.stat or bound.step.reduces):
                raise UsageError(f"step {bound.step.name} needs the stack, which is merged before it")
            found = bound.step.stat.of(stack, bound.params, at) if bound.step.stat else {}
            view = (-1, row_length(shape)) if bound.grain == "row" else shape
            models = () if reduced else (stack.shape[0],)
            b = None if base is None else base.reshape(view)
            if bound.step.needs:
                found = found | at_hand(bound.step.needs, statistics or {}, bound.step.name, view)
            out = bound.step.run(stack.reshape((*models, *view)), bound.params, found, at, b)
            reduced = reduced or bound.step.reduces
            stack = out.reshape(shape if reduced else (*models, *shape))
        return stack

    def __str__(self) -> str:
        def show(b: Bound) -> str:
            return f"{b.step.name}({', '.join(f'{k}={v!r}' for k, v in b.params.items())})"

        return " | ".join(map(show, self.steps))


def as_stack(x: Tensor | Sequence[Tensor]) -> Tensor:
    """`[k, *shape]` from a stack or a sequence of equally shaped tensors."""
    if isinstance(x, Tensor):
        if x.ndim == 0:
            raise UsageError("a stack of tensors has the models along its first axis; got a scalar")
        return x
    tensors = [torch.as_tensor(t) for t in x]
    shapes = {tuple(t.shape) for t in tensors}
    if len(shapes) != 1:
        raise UsageError(f"tensors to merge must have one shape, got {sorted(shapes)}")
    return torch.stack(tensors)
