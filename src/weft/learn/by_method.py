"""`ByMethod`: the parameters of any of weft's methods, learned by gradient.

The merge is `weft.merge` itself, with statistics over the model where the method needs them, so what is learned is
what is saved. Its derivative by each (scalar) parameter is a central difference of the merged weights,

    ∂θ/∂p ≈ (θ(p + h) − θ(p − h)) / 2h,      ∂L/∂p = ⟨∂L/∂θ, ∂θ/∂p⟩

in float64: exact to O(h²) where the method is smooth, and a slope over 2h where it is not (a density moves whole
entries, whose pointwise derivative is 0 and says nothing). A step costs 2 merges a parameter, which is right for a
few numbers of a method; coefficients by the thousand are `Weighed`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError, did_you_mean
from weft.learn.sources import Sources, in_memory
from weft.learn.weighed import Taken
from weft.learn.weighted import Weighted
from weft.methods.merge import Merge
from weft.methods.params import Parameter
from weft.methods.registry import METHODS


class ByMethod(nn.Module):
    """`learned`: parameter → where it starts, a number or one a model; `fixed`: the others' values."""

    def __init__(
        self, sources: Sources, names: list[str], method: str, learned: Mapping[str, Any],
        fixed: Mapping[str, Any], step: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sources, self.names, self.method, self.fixed, self.step = (
            sources, names, METHODS[method], dict(fixed), step,
        )  # fmt: skip
        if not learned:
            raise UsageError(f"say which parameters of {method} to learn: learned={{'…': start}}")
        if sources.device.type != "cpu":
            raise UsageError("the parameters of a method are learned on the CPU, where merges are computed")
        self.inputs = [in_memory(m) for m in sources.models]
        self.anchor = None if sources.base is None else in_memory(sources.base)
        self.declared: dict[str, Parameter] = {}
        starts = []
        for name, value in learned.items():
            declared = self.method.params.get(name)
            if declared is None or declared.kind != "float":
                known = [n for n, p in self.method.params.items() if p.kind == "float"]
                raise UsageError(
                    f"{method} has no parameter {name!r} that is a number{did_you_mean(name, known)}; it has "
                    f"{', '.join(known) or 'none'}"
                )
            declared.check(value, method)
            self.declared[name] = declared
            starts.append(torch.as_tensor(value, dtype=torch.float64))
        self.phi = nn.ParameterList(starts)
        self._node(self.values())  # says at once what the method does not take

    def values(self) -> dict[str, Any]:
        """Parameter → number, or list of numbers."""
        return {n: p.detach().tolist() for n, p in zip(self.declared, self.phi, strict=True)}

    def _node(self, values: Mapping[str, Any]) -> Merge:
        return self._merge(self.inputs, self.anchor, values)

    def _merge(
        self, models: Sequence[Checkpoint], base: Checkpoint | None, values: Mapping[str, Any]
    ) -> Merge:
        # only private tensors can differ in shape: all others have been held against the module
        return Merge(
            models, base=base, method=self.method, params={**self.fixed, **values}, mismatch="carry"
        )  # fmt: skip

    def merged(self, values: Mapping[str, Any], names: Iterable[str]) -> list[Tensor]:
        """θ of the named parameters, float64."""
        node = self._node(values)
        node.survey()
        anchor = node.inputs[0]
        return [node.tensor(self.sources.stored(anchor, n) or n, dtype=torch.float64) for n in names]

    def weights(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        wanted = self.names if names is None else list(names)
        made = _Merging.apply(self, wanted, *self.phi)  # type: ignore[no-untyped-call]
        wide = {n: torch.promote_types(self.sources.parameters[n].dtype, torch.float32) for n in wanted}
        return {n: t.to(wide[n]) for n, t in zip(wanted, made, strict=True)}

    def project(self) -> None:
        """Into the bounds that the method declares."""
        with torch.no_grad():
            for p, declared in zip(self.phi, self.declared.values(), strict=True):
                low = declared.bounds.low + (1e-6 if declared.bounds.open_low else 0.0)
                p.clamp_(low, declared.bounds.high)

    def coefficients(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in zip(self.declared, self.phi, strict=True)}

    def checkpoint(self, taken: Taken) -> Checkpoint:
        made: Checkpoint = self._merge(self.sources.models, self.sources.base, self.values())
        return Weighted(made, [made], {}, taken, origin=self.method.name) if taken else made

    def recipe(self, base: str | None, models: Sequence[str] | None) -> dict[str, Any]:
        """The same merge as a recipe, with references to the base and the models."""
        base, models = self.sources.called(base, models)
        listed: list[dict[str, Any]] = [{"model": ref} for ref in models]
        shared = dict(self.fixed)
        for name, value in self.values().items():
            if isinstance(value, list):
                for entry, v in zip(listed, value, strict=True):
                    entry.setdefault("parameters", {})[name] = v
            else:
                shared[name] = value
        head = {} if base is None else {"base_model": base}
        return {"merge_method": self.method.name, **head, "parameters": shared, "models": listed}

    def differences(self, names: list[str]) -> Iterable[tuple[int, int | None, list[Tensor]]]:
        """(number of the parameter, of its entry, ∂θ/∂p of the named parameters) for every scalar."""
        for j, (name, declared) in enumerate(self.declared.items()):
            start = self.values()[name]
            for i in range(len(start)) if isinstance(start, list) else (None,):
                at = start if i is None else start[i]
                bounds = declared.bounds
                low = bounds.low + (1e-9 if bounds.open_low else 0.0)
                ends = [max(at - self.step, low), min(at + self.step, bounds.high)]
                if not all(map(math.isfinite, ends)):
                    raise UsageError(f"{name} has become {at}: lower lr")
                made = []
                for end in ends:
                    moved = end if i is None else [*start[:i], end, *start[i + 1 :]]
                    made.append(self.merged({**self.values(), name: moved}, names))
                width = ends[1] - ends[0]
                yield j, i, [(b - a) / width for a, b in zip(*made, strict=True)]


class _Merging(torch.autograd.Function):
    """The merge as a function of its parameters, with central differences for a derivative."""

    @staticmethod
    def forward(ctx: Any, way: ByMethod, names: list[str], *phi: Tensor) -> tuple[Tensor, ...]:
        ctx.way, ctx.names = way, names
        return tuple(way.merged(way.values(), names))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = [torch.zeros_like(p) for p in ctx.way.phi]
        for j, i, slopes in ctx.way.differences(ctx.names):
            value = torch.stack([(g * s).sum() for g, s in zip(grads, slopes, strict=True)]).sum()
            if i is None:
                found[j].copy_(value)
            else:
                found[j][i] = value
        return None, None, *found
