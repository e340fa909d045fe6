"""The values that are merged: a base and models, in memory once as they are stored, or read each time.

Nothing is stacked and no task vector is kept: `combined` adds the models one after the other, and its gradient
goes through them again, so that a merge of k models takes one merged model beside the k stored ones
(`hold=True`) or beside one tensor of each in turn (`hold=False`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.adapted import Adapted
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems, UsageError
from weft.learn.parts import Place
from weft.methods.parts import stored_name

_SLICE = 1 << 20
"""Elements of a tensor whose inner products are taken at once."""


class Sources:
    """Base and models, checked against the module: every parameter and float buffer, of its shape.

    Those that are `private` to a model may have another shape there, as classifiers of different tasks do.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Model | None,
        models: Sequence[Model],
        hold: bool = True,
        private: Sequence[str] = (),
    ) -> None:
        if isinstance(models, str | Mapping | nn.Module | Checkpoint) or not models:
            raise UsageError("models must be a list of at least one model")
        self.base = None if base is None else load(base)
        self.models = [load(m) for m in models]
        self.hold = hold
        own = dict(module.named_parameters())
        if not own:
            raise UsageError(f"{type(module).__name__} has no parameters, so nothing can be merged into it")
        kept = module.state_dict()
        self.parameters = {n: _info(p) for n, p in own.items() if is_mergeable(p.dtype)}
        self.buffers = {n: _info(b) for n, b in module.named_buffers() if n in kept and is_mergeable(b.dtype)}
        self.device = next(iter(own.values())).device
        self._ties = _ties(module)
        self._held: dict[tuple[int, str], Tensor] = {}
        problems = []
        for source in self.all:
            problems += self._problems(source, {**self.parameters, **self.buffers}, private)
        if problems:
            raise DataProblems(
                "these models do not fit the module (parameters that each task keeps, such as classifiers, are "
                "named by private=)",
                problems,
            )
        for source in self.all:
            source.survey()

    @property
    def all(self) -> list[Checkpoint]:
        """The base, where there is one, and the models."""
        return self.models if self.base is None else [self.base, *self.models]

    def stored(self, source: Checkpoint, name: str) -> str | None:
        """What a source calls a parameter of the module: its name, a tied one's, or None."""
        for n in (name, *self._ties.get(name, ())):
            found = stored_name(source, n)
            if found in source:
                return found
        return None

    def called(self, base: str | None, models: Sequence[str] | None) -> tuple[str | None, list[str]]:
        """References to base and models for a recipe. UsageError where one cannot be loaded by its origin."""
        if models is not None and (isinstance(models, str) or len(models) != len(self.models)):
            raise UsageError(f"give {len(self.models)} references for the models, one each, in order")
        given: list[str | None] = [] if self.base is None else [base]
        given += [None] * len(self.models) if models is None else models
        unnamed = [
            s.origin for s, name in zip(self.all, given, strict=True)
            if name is None and (s.identity() is None or (s.inputs and not isinstance(s, Adapted)))
        ]  # fmt: skip
        if unnamed:
            raise UsageError(
                f"a recipe cannot load {', '.join(unnamed)}: say where each is saved (base=, models=)"
            )
        found = [name or s.origin for name, s in zip(given, self.all, strict=True)]
        return (None, found) if self.base is None else (found[0], found[1:])

    def _problems(
        self, source: Checkpoint, wanted: Mapping[str, TensorInfo], private: Sequence[str]
    ) -> list[str]:
        found = []
        for name, info in wanted.items():
            stored = self.stored(source, name)
            if stored is None:
                found.append(f"{name}: not in {source.origin}")
            elif source.info(stored).shape != info.shape and name not in private:
                found.append(
                    f"{name}: shape {list(source.info(stored).shape)} in {source.origin}, {list(info.shape)} "
                    "in the module"
                )
        return found

    def value(self, i: int | None, name: str) -> Tensor:
        """One tensor of model i (None: of the base), on the module's device, in its storage dtype.

        DataProblems where it holds NaN or infinite values.
        """
        key = (-1 if i is None else i, name)
        if key in self._held:
            return self._held[key]
        source = self.base if i is None else self.models[i]
        assert source is not None
        stored = self.stored(source, name)
        assert stored is not None
        values = source.tensor(stored, dtype=source.info(stored).dtype).to(self.device)
        if not bool(values.isfinite().all()):
            bad = int((~values.isfinite()).sum())
            raise DataProblems(
                f"{source.origin} cannot be merged", [f"{stored}: {bad} NaN or infinite values"]
            )
        if self.hold:
            self._held[key] = values
        return values

    def forget(self) -> None:
        """Let go of all values held."""
        self._held.clear()

    @property
    def held_bytes(self) -> int:
        """Memory of the values held."""
        return sum(t.nbytes for t in self._held.values())

    def combined(self, name: str, place: Place, c: Tensor) -> Tensor:
        """θ = θ0 + Σᵢ cᵢ (θᵢ − θ0), or Σᵢ cᵢ θᵢ without a base; differentiable in c: [k, *place.shape]."""
        made: Tensor = _Combination.apply(c, self, name, place)  # type: ignore[no-untyped-call]
        return made

    def delta(self, i: int, name: str, dtype: torch.dtype) -> Tensor:
        """θᵢ − θ0, or θᵢ without a base."""
        x = self.value(i, name).to(dtype)
        return x if self.base is None else x - self.value(None, name).to(dtype)

    def averaged(self, name: str) -> Tensor:
        """The mean over the models of a tensor that no coefficient is learned for."""
        total = self.value(0, name).float()
        for i in range(1, len(self.models)):
            total = total + self.value(i, name).float()
        return total / len(self.models)

    def gram(self, names: Iterable[str]) -> Tensor:
        """⟨τᵢ, τⱼ⟩ over the named parameters, [k, k] float64."""
        k = len(self.models)
        total = torch.zeros(k, k, dtype=torch.float64)
        for name in names:
            values = [self.value(i, name).reshape(-1) for i in range(k)]
            start = None if self.base is None else self.value(None, name).reshape(-1)
            for at in range(0, len(values[0]), _SLICE):  # float64 of a slice, not of whole tensors
                rows = torch.stack([v[at : at + _SLICE].double().cpu() for v in values])
                if start is not None:
                    rows -= start[at : at + _SLICE].double().cpu()
                total += rows @ rows.T
        return total


class _Combination(torch.autograd.Function):
    """Σᵢ cᵢ τᵢ and its adjoint, a model at a time; saves the coefficients alone."""

    @staticmethod
    def forward(ctx: Any, c: Tensor, sources: Sources, name: str, place: Place) -> Tensor:
        ctx.sources, ctx.name, ctx.place, ctx.dtype, ctx.count = sources, name, place, c.dtype, len(c)
        if sources.base is None:
            total = torch.zeros(place.of, dtype=c.dtype, device=c.device)
        else:
            total = sources.value(None, name).to(c.dtype, copy=True)
        for i, ci in enumerate(c):
            total.addcmul_(place.spread(ci).expand(place.of), sources.delta(i, name, c.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        place: Place = ctx.place
        rows = [
            place.gathered(grads[0] * ctx.sources.delta(i, ctx.name, ctx.dtype)) for i in range(ctx.count)
        ]
        return torch.stack(rows), None, None, None


def in_memory(source: Checkpoint) -> Checkpoint:
    """A lazy checkpoint computed once."""
    source.survey()
    return StateDict(source.state_dict(), source.origin) if source.inputs else source


def _info(t: Tensor) -> TensorInfo:
    return TensorInfo(tuple(t.shape), t.dtype)


def _ties(module: nn.Module) -> dict[str, list[str]]:
    """First name of a parameter → its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: rest for first, *rest in names.values() if rest}
