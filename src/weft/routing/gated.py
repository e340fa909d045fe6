"""`Gated`: a part of a network run with weights that each example (or position) chooses.

θ(w) = θs + Σₜ wₜ Rₜ, in one of three ways with one answer:

weights   examples of equal weights go together through a part whose weights are made once for them; for any part
outputs   every example goes through the part at θs, and each map adds Σₜ wₜ f(x; Rₜ): T + 1 products, low-rank ones
          thin; for parts whose changed weights belong to maps that are linear in them
vmap      weights made for every example, run as one batch of networks

"auto" takes weights where there are no more different rows than experts, else outputs where they can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils import _pytree as pytree

from weft.errors import UsageError
from weft.routing.blocks import Block, Map, added
from weft.routing.gates import pooled
from weft.routing.gating import Gating
from weft.routing.residuals import Residual, wide
from weft.statistics.observe import slow_attention

How = Literal["auto", "weights", "outputs", "vmap"]
HOW = ("auto", "weights", "outputs", "vmap")
Combine = Callable[[str, Tensor], Tensor]
"""Stack [k, *shape] of the chosen experts' residuals of one tensor → what is added to it."""


@dataclass
class Now:
    """What one call of the whole network has settled for its parts."""

    size: int
    """Examples."""
    weights: Tensor | None = None
    """[B, T] where they are the whole model's."""
    preference: Tensor | None = None
    """[B, T] where one was given."""
    mask: Tensor | None = None
    """[B, L], which tokens count."""
    told: dict[str, Tensor] = field(default_factory=dict)
    """Block → the weights it took."""
    features: dict[str, Tensor] | None = None
    """Block → features of its inputs, where they are asked for."""


class Gated(nn.Module):
    """One routed part, in its place in the network."""

    def __init__(
        self, inner: nn.Module, block: Block, residuals: Mapping[str, Residual], maps: Mapping[str, Map] | None,
        rest: Tensor, gating: Gating, gate: nn.Module | None, how: How, combine: Combine | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inner = inner
        self.__dict__["residuals"] = dict(residuals)  # registered once, in Routed
        self.__dict__["gate"] = gate
        self.block, self.maps, self.gating, self.how, self.combine = block, maps, gating, how, combine
        self.__dict__["rest"] = rest
        self.now: Now | None = None
        self._made: dict[tuple[int, ...], dict[str, Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return getattr(super().__getattr__("inner"), name)  # what the network asks its own part for

    @property
    def channels(self) -> int:
        """The axis of features of the part's inputs."""
        convolves = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in self.inner.modules())
        return 1 if convolves else -1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        now = self.now
        if now is None:
            raise UsageError(f"{self.block.name} is part of a routed model: call that")
        x = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
        if now.features is not None and x is not None:
            now.features[self.block.name] = pooled(x, self.channels, now.mask)
        w = now.weights if now.weights is not None else self._weigh(x, now)
        now.told[self.block.name] = w.detach()
        return self.run(w, args, kwargs)

    def _weigh(self, x: Tensor | None, now: Now) -> Tensor:
        gating, gate = self.gating, self.gate
        if gate is None:
            raise UsageError("this gate has not been made: weft.routing.fit_router(…) or train(…) makes it")
        if gating.kind == "preference":
            if now.preference is None:
                raise UsageError(
                    "this model is weighed by a preference: call it with preference=, one number a task"
                )
            seen = now.preference
        elif x is None:
            raise UsageError(f"{self.block.name} is called without a tensor that its gate could look at")
        else:
            seen = x if gating.per == "token" and x.dim() > 2 else pooled(x, self.channels, now.mask)
        w = gating.weights(gate(seen), self.rest, self.training)
        if gating.per == "batch":
            w = w.mean(0, keepdim=True).expand_as(w)
        return w

    # -- the part at given weights ---------------------------------------------------------------------

    def run(self, w: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The part's output with w [B, T], or [B, …, T] with weights by position."""
        how = self._way(w)
        if how == "outputs":
            return self._by_outputs(w, args, kwargs)
        if w.dim() > 2:
            raise UsageError(
                f"weights by position need a part whose outputs are linear in its weights; "
                f"{self.block.name} is none"
            )
        if how == "vmap":
            return self._by_vmap(w, args, kwargs)
        rows, place = (w[:1], None) if _uniform(w) else torch.unique(w, dim=0, return_inverse=True)
        if w.requires_grad and len(rows) > 1:  # `unique` passes no gradient
            rows, place = w, torch.arange(len(w), device=w.device)
        if len(rows) == 1:
            return functional_call(self.inner, self.merged(w[0]), args, dict(kwargs))
        assert place is not None
        return self._by_groups(rows, place, args, kwargs)

    def _way(self, w: Tensor) -> str:
        if self.how == "outputs" and (self.maps is None or self.combine is not None):
            raise UsageError(
                f"outputs of {self.block.name or 'the whole model'} are not linear in its routed weights: choose "
                "how='weights'"
            )
        if self.how != "auto":
            return self.how
        if self.maps is None or self.combine is not None or (w.dim() == 2 and _uniform(w)):
            return "weights"
        if w.dim() > 2 or w.requires_grad:
            return "outputs"
        return "weights" if len(torch.unique(w, dim=0)) <= w.shape[1] else "outputs"

    def merged(self, row: Tensor) -> dict[str, Tensor]:
        """The part's weights at one row w [T], by their names inside it; what is not routed is left out."""
        if self.combine is not None:
            return self._combined(row)
        own = dict(self.inner.named_parameters()) | dict(self.inner.named_buffers())
        chosen = range(len(row)) if row.requires_grad else row.nonzero()[:, 0].tolist()
        made = {}
        for name, residual in self.residuals.items():
            key = self.block.inside(name)
            share = _shares(row) if name in self.block.buffers else row
            total = wide(own[key])
            for t in chosen:
                part = residual.of(t)
                if part is not None:
                    total = total + share[t].to(part.dtype) * part
            made[key] = total.to(own[key].dtype)
        return made

    def _combined(self, row: Tensor) -> dict[str, Tensor]:
        """θs + the merge of the chosen experts' residuals by a method; kept, since few sets of experts come up."""
        assert self.combine is not None
        chosen = tuple((row.detach() > 0).nonzero()[:, 0].tolist())
        if chosen not in self._made:
            own = dict(self.inner.named_parameters()) | dict(self.inner.named_buffers())
            made = {}
            for name, residual in self.residuals.items():
                key = self.block.inside(name)
                base = wide(own[key])
                found = [residual.of(t) for t in chosen]
                stack = [torch.zeros_like(base) if f is None else f for f in found]
                if name in self.block.buffers:
                    total = base + (torch.stack(stack).mean(0) if stack else 0.0)
                elif stack:
                    total = base + self.combine(name, torch.stack(stack).detach()).to(base)
                else:
                    total = base
                made[key] = total.to(own[key].dtype)
            while len(self._made) >= 2 * len(row):
                del self._made[next(iter(self._made))]
            self._made[chosen] = made
        return self._made[chosen]

    def forget(self) -> None:
        """Drop merges that were kept."""
        self._made.clear()

    def _by_outputs(self, w: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        assert self.maps is not None
        called: set[str] = set()

        def hook(path: str, made: Map) -> Callable[..., Tensor]:
            def add(leaf: nn.Module, inputs: tuple[Any, ...], y: Tensor) -> Tensor:
                called.add(path)
                return added(
                    leaf, made, inputs[0], y, w,
                    lambda n, t: self.residuals[n].of(t), lambda n, t: self.residuals[n].factors(t),
                )  # fmt: skip

            return add

        handles = [
            self.inner.get_submodule(p).register_forward_hook(hook(p, m)) for p, m in self.maps.items()
        ]
        try:
            out = self.inner(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if called < self.maps.keys():  # a leaf whose weights are used in another way than by calling it
            if self.how == "outputs" or w.dim() > 2:
                idle = sorted(self.maps.keys() - called)[0]
                raise UsageError(
                    f"{idle} is not called, so nothing can be added to its output: choose how='weights'"
                )
            self.maps = None
            return self.run(w, args, kwargs)
        return out

    def _by_groups(
        self, rows: Tensor, place: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        size, outputs, order = len(place), [], []
        for i, row in enumerate(rows):
            index = (place == i).nonzero()[:, 0]
            taken = pytree.tree_map(lambda v, k=index: _taken(v, k, size), (args, dict(kwargs)))
            outputs.append(functional_call(self.inner, self.merged(row), *taken))
            order.append(index)
        back = torch.cat(order).argsort()
        return pytree.tree_map(lambda *each: _joined(each, order, back), *outputs)

    def _by_vmap(self, w: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        made = [self.merged(row) for row in w]
        stacked = {n: torch.stack([m[n] for m in made]) for n in made[0]}
        axes = pytree.tree_map(lambda v: 0 if _along(v, len(w)) else None, (args, dict(kwargs)))

        def one(weights: dict[str, Tensor], given: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
            flags, spec = pytree.tree_flatten(axes, is_leaf=lambda v: v is None)
            values = [v[None] if a == 0 else v for v, a in zip(spec.flatten_up_to(given), flags, strict=True)]
            positional, named = spec.unflatten(values)
            out = functional_call(self.inner, weights, positional, named)
            return pytree.tree_map(lambda v: v[0] if isinstance(v, Tensor) else v, out)

        return vmap(one, in_dims=(0, axes))(stacked, (args, dict(kwargs)))


def _uniform(w: Tensor) -> bool:
    return len(w) == 1 or bool((w.detach()[:1] == w.detach()).all())


def _shares(row: Tensor) -> Tensor:
    """Weights of running statistics, which mean something only as a mean: those above zero, summing to one."""
    positive = row.detach().clamp_min(0)
    return positive / positive.sum().clamp_min(1e-12)


def _along(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _taken(value: Any, index: Tensor, size: int) -> Any:
    return value[index] if _along(value, size) else value


def _joined(each: Sequence[Any], order: Sequence[Tensor], back: Tensor) -> Any:
    if all(_along(v, len(i)) for v, i in zip(each, order, strict=True)):
        return torch.cat(list(each))[back]
    return each[0]


@contextmanager
def at(parts: Sequence[Gated], now: Now) -> Iterator[Now]:
    """One call of the network: its parts know what was settled for it, and attention calls them one by one."""
    before = [p.now for p in parts]
    for part in parts:
        part.now = now
    try:
        with slow_attention():
            yield now
    finally:
        for part, earlier in zip(parts, before, strict=True):
            part.now = earlier
