"""Methods: a published way to merge, under the name its authors gave it, with its published defaults.

A method is a function of its parameters that returns the pipeline of steps it consists of. The decorator
adds what a signature cannot say (in which space the inputs are, how many there may be, the paper) and makes
the method callable on tensors. Engine, CLI, recipe schema and documentation read this one declaration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Literal

from weft.errors import UsageError, did_you_mean
from weft.late import Tensor
from weft.methods.kinds import Need
from weft.methods.params import Parameter, check_params, signature_parameters
from weft.methods.step import At, Pipeline, Statistics, as_stack

Space = Literal["weights", "deltas"]
BaseUse = Literal["required", "optional", "forbidden"]


class Method:
    """A declared method; made by the decorator `method`."""

    def __init__(
        self,
        build: Callable[..., Pipeline],
        *,
        space: Space,
        models: tuple[int, int | None],
        paper: str,
        base: BaseUse | None,
        compat: Mapping[str, Mapping[str, Any]],
        per_task: bool,
        aliases: Sequence[str] = (),
        needs: Sequence[str] = (),
    ) -> None:
        self.name = build.__name__
        self.build_fn = build
        self.__doc__ = build.__doc__
        self.__name__ = self.name
        self.space, self.models, self.paper, self.per_task = space, models, paper, per_task
        self.aliases = tuple(aliases)
        self.needs = tuple(map(Need.parse, needs))
        """What of its steps' needs it may have, over all values of its parameters."""
        self.base: BaseUse = base or ("required" if space == "deltas" else "forbidden")
        self.compat = {k: dict(v) for k, v in compat.items()}
        self.params: dict[str, Parameter] = signature_parameters(build)
        self.steps: Pipeline | None = None
        """The steps of an unregistered method that is nothing but them."""

    @property
    def summary(self) -> str:
        """The first line of the documentation."""
        return (self.__doc__ or "").strip().partition("\n")[0]

    def check(self, params: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """Parameters validated, defaults filled in."""
        return check_params(where or self.name, self.params, dict(params))

    def check_arity(self, k: int) -> None:
        """UsageError unless the method takes `k` models (the base not counted)."""
        low, high = self.models
        if k < low or (high is not None and k > high):
            wanted = str(low) if high == low else f"at least {low}" if high is None else f"{low} to {high}"
            raise UsageError(f"{self.name} merges {wanted} model{'s' * (wanted != '1')}, got {k}")

    def pipeline(self, **params: Any) -> Pipeline:
        """The steps for these parameters (checked)."""
        return self.build_fn(**self.check(params))

    def __call__(
        self,
        tensors: Tensor | Sequence[Tensor],
        *,
        base: Tensor | None = None,
        at: At | None = None,
        statistics: Statistics | None = None,
        **params: Any,
    ) -> Tensor:
        """Merge tensors: a stack `[k, *shape]` or a list of k tensors of one shape.

        A method of task vectors (`space="deltas"`) takes task vectors and returns one; with `base` it takes
        and returns weights. A method that needs statistics takes them by kind: `{"fisher": [k, *shape]}`, or
        None for what was not measured of these tensors. Computes in the dtype of the inputs, float32 at
        least; differentiable wherever torch is.
        """
        x = as_stack(tensors)
        self.check_arity(x.shape[0])
        if x.dtype.itemsize < 4 and x.dtype.is_floating_point:
            x = x.float()
        if base is not None and (self.space == "deltas" or self.base == "optional"):
            anchor = base.to(x.dtype)
            return anchor + self.pipeline(**params)(x - anchor, base=anchor, at=at, statistics=statistics)
        if base is not None:
            raise UsageError(f"{self.name} works on weights and takes no base")
        return self.pipeline(**params)(x, at=at, statistics=statistics)

    def __reduce__(self) -> tuple[Any, ...]:
        # by name, since a decorated function cannot be pickled; one of a script's own goes as it is
        if METHODS.declared(self.name) is self and self.build_fn.__module__ != "__main__":
            return _declared, (self.build_fn.__module__, self.name)
        if self.steps is not None:
            return pipeline_method, (self.steps, self.name)
        return _remade, (vars(self),)

    def __repr__(self) -> str:
        return f"<method {self.name}: {self.summary}>"


def _declared(module: str, name: str) -> Method:
    import_module(module)
    return METHODS[name]


def _remade(state: dict[str, Any]) -> Method:
    made = Method.__new__(Method)
    vars(made).update(state)
    return made


def method(
    *,
    space: Space,
    paper: str,
    models: tuple[int, int | None] = (1, None),
    base: BaseUse | None = None,
    compat: Mapping[str, Mapping[str, Any]] | None = None,
    per_task: bool = False,
    aliases: Sequence[str] = (),
    needs: Sequence[str] = (),
) -> Callable[[Callable[..., Pipeline]], Method]:
    """Declare a function from parameters to a pipeline as a method.

    `models` is the least and greatest number of models (base not counted). A method in weight space with
    `base="optional"` works on task vectors when a base is given. `compat` maps another tool's name to the
    parameter values that reproduce its choices. `per_task` marks methods whose output is one model a task.
    `aliases` are other names it goes by; `needs` lists what its steps need measured, whatever its parameters.
    """

    def declare(build: Callable[..., Pipeline]) -> Method:
        made = Method(
            build, space=space, models=models, paper=paper, base=base, compat=compat or {},
            per_task=per_task, aliases=aliases, needs=needs,
        )  # fmt: skip
        return METHODS.add(made)

    return declare


class Registry(Mapping[str, Method]):
    """Methods by name; those of installed plugins (entry points `weft.methods`) are loaded when asked for."""

    def __init__(self) -> None:
        self._methods: dict[str, Method] = {}
        self._aliases: dict[str, str] = {}
        self._complete = False

    def add(self, made: Method) -> Method:
        for name in (made.name, *made.aliases):
            if name in self._methods or name in self._aliases:
                raise UsageError(f"there are two methods named {name!r}")
        self._methods[made.name] = made
        self._aliases |= dict.fromkeys(made.aliases, made.name)
        return made

    def declared(self, name: str) -> Method | None:
        """The method of that very name, if it is declared already."""
        return self._methods.get(name)

    def _load(self) -> dict[str, Method]:
        if not self._complete:
            self._complete = True
            import weft.methods.catalogue  # noqa: F401  (declares weft's own)

            for plugin in entry_points(group="weft.methods"):
                plugin.load()
        return self._methods

    def __getitem__(self, name: str) -> Method:
        known = self._load()
        try:
            return known[self._aliases.get(name, name)]
        except KeyError:
            hint = did_you_mean(name, [*known, *self._aliases])
            raise UsageError(f"there is no method {name!r}{hint}") from None

    def get(self, name: str, default: Any = None) -> Any:
        try:
            return self[name]
        except UsageError:  # which is no KeyError
            return default

    def __contains__(self, name: object) -> bool:
        return name in self._load() or name in self._aliases

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._load()))

    def __len__(self) -> int:
        return len(self._load())


METHODS = Registry()


def pipeline_method(steps: Pipeline, name: str = "steps") -> Method:
    """An unregistered method made of steps, as `steps:` in a recipe gives one. Works on task vectors."""

    def build() -> Pipeline:
        return steps

    build.__name__ = name
    build.__doc__ = str(steps)
    made = Method(build, space="deltas", models=(1, None), paper="", base=None, compat={}, per_task=False)
    made.steps, made.needs = steps, steps.needs
    return made


__all__ = ["METHODS", "Method", "method", "pipeline_method"]
