"""Running a network once and following, operation by operation, what stands along every axis of every tensor.

A mode of torch sees each elementary operation (about a hundred kinds, whatever code makes the calls), so nothing
need be known of the architecture, and control flow that depends on data is no obstacle. A rule for each kind of
operation ties axes together (operations.py, shaping.py). What no rule is known for fixes all its axes: the result
has less symmetry, never a wrong one. With weights on the meta device nothing is computed from them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from weft.align.dims import Dim, Dims, find

Row: TypeAlias = tuple[Dim, ...]
"""What stands along each axis of a tensor."""


@dataclass(frozen=True)
class Call:
    """One operation: its name without overload and trailing underscore, arguments by name, and its results."""

    name: str
    given: Mapping[str, Any]
    results: Sequence[Tensor]

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name)

    @property
    def tensors(self) -> list[Tensor]:
        return [v for v in pytree.tree_leaves(dict(self.given)) if isinstance(v, Tensor)]

    def axis(self, of: Tensor, name: str = "dim") -> int:
        return int(self.given.get(name) or 0) % max(1, of.dim())


@dataclass
class Seen:
    """The input or output of a module during the run."""

    module: str
    side: str
    row: Row


@dataclass
class Trace:
    """What was learned in one run."""

    dims: Dims = field(default_factory=Dims)
    rows: list[Row] = field(default_factory=list)
    """Of every tensor that was met."""
    used: list[Row] = field(default_factory=list)
    """Of every tensor that an operation computed with, rather than only looked at in another shape."""
    notes: dict[str, None] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = WeakTensorKeyDictionary()
        self.literal = WeakTensorKeyDictionary()
        """Tensors that were written down in the network's code: their values are the same for all inputs."""
        self.picks: dict[tuple[int, int], Dim] = {}
        self.kept: list[Tensor] = []

    def fixed(self, size: int, reason: str) -> Dim:
        return self.dims.new(size, reason="" if size == 1 else reason)

    def row(self, tensor: Tensor) -> Row:
        """What stands along a tensor's axes; those of a constant are fixed."""
        found: Row | None = self._known.get(tensor)  # type: ignore[no-untyped-call]
        if found is None or [d.size for d in found] != list(tensor.shape):
            found = tuple(self.fixed(s, "a constant of the network") for s in tensor.shape)
            self.set(tensor, found)
        return found

    def set(self, tensor: Tensor, row: Iterable[Dim]) -> Row:
        """Note a tensor's axes."""
        made = tuple(row)
        self._known[tensor] = made
        self.rows.append(made)
        return made

    def tie(self, a: Row, b: Row) -> None:
        for x, y in zip(a, b, strict=True):
            if x.size == y.size:
                self.dims.tie(x, y)

    def together(self, rows: Iterable[Row], shape: Sequence[int]) -> Row:
        """The axes of what several tensors are broadcast to; axes that meet are tied."""
        made: list[Dim | None] = [None] * len(shape)
        for row in rows:
            start = len(shape) - len(row)
            for k, d in enumerate(row, start):
                if k < 0 or (d.size == 1 and shape[k] != 1):
                    continue
                if made[k] is None:
                    made[k] = d
                elif d.size == shape[k]:
                    self.dims.tie(made[k], d)  # type: ignore[arg-type]
        return tuple(self.dims.new(s) if d is None else d for d, s in zip(made, shape, strict=True))

    def fix(self, row: Iterable[Dim], reason: str) -> None:
        for d in row:
            self.dims.fix(d, reason)


Rule = Callable[[Trace, Call], Sequence[Iterable[Dim]]]
"""The axes of the results of a call."""


class Following(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is in force, every operation is followed."""

    def __init__(self, trace: Trace, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace
        self.names = {id(m): n for n, m in module.named_modules()}
        self._inside: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from weft.align.operations import rule_for

        kwargs = dict(kwargs or {})
        before = [v for v in pytree.tree_leaves([args, kwargs]) if isinstance(v, Tensor)]
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        for a in func._schema.arguments:
            if a.name not in given and a.has_default_value():
                given[a.name] = a.default_value
        for t in before:  # before an operation in place changes a shape
            self.trace.row(t)
        args, kwargs = _placed(args, kwargs, any(t.is_meta for t in before))
        out = func(*args, **kwargs)
        results = [v for v in pytree.tree_leaves(out) if isinstance(v, Tensor)]
        name = func._schema.name.partition("::")[2]
        call = Call(name if name.startswith("__") else name.rstrip("_"), given, results)
        if results:
            rule, shapes_only = rule_for(func, call)
            if not shapes_only:
                self.trace.used += [self.trace.row(t) for t in before]
            rows = list(rule(self.trace, call))
            for tensor, row in zip(results, rows, strict=True):
                made = tuple(row)
                assert [find(d).size for d in made] == list(tensor.shape), (name, made, tensor.shape)
                self.trace.set(tensor, made)
        return out


def _placed(args: Any, kwargs: dict[str, Any], ghostly: bool) -> tuple[Any, dict[str, Any]]:
    """Arguments on one device. What depends on no weight (token ids, positions, masks) is computed even where the
    weights are on the meta device, since the network's course may depend on it."""
    if isinstance(kwargs.get("device"), torch.device) and kwargs["device"].type in ("meta", "cpu"):
        kwargs = kwargs | {"device": torch.device("meta" if ghostly else "cpu")}
    if ghostly:
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
    return args, kwargs
