"""Pairs (x, ẋ) carried through a network: the derivative in closed form, layer by layer (TAFT, arXiv:2307.08122).

A `Pair` is a tensor that knows how it changes as the weights move from θ0 towards θ. Every operation of torch
that meets one answers with a pair, by the rules of rules.py; operations on plain tensors run as ever, so layers
before the first trained one cost nothing more. x is a constant to backward: training differentiates the ẋ
chain alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.errors import UsageError
from weft.train.chart import Chart
from weft.train.forward import Output

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}
"""Operation → its rule, which takes the operation's own arguments, pairs among them."""

_ABOUT = (
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.__len__, Tensor.is_floating_point,
    Tensor.is_contiguous, Tensor.ndimension, Tensor.is_complex, Tensor.get_device, torch.is_floating_point,
    torch.numel, Tensor.storage_offset,
)  # fmt: skip
"""Questions about the shape and kind of a tensor, which a pair answers as any other does."""


class Pair(Tensor):
    """A value and its tangent, both of one shape."""

    x: Tensor
    dx: Tensor

    @staticmethod
    def __new__(cls, x: Tensor, dx: Tensor) -> Pair:
        made: Pair = x.detach().as_subclass(cls)  # type: ignore[assignment]
        made.x, made.dx = x, dx
        return made

    def __init__(self, x: Tensor, dx: Tensor) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        import weft.train.rules  # noqa: F401  # fills RULES

        rule = RULES.get(func)
        if rule is None and (func in _ABOUT or getattr(func, "__name__", "") == "__get__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if rule is None:
            name = getattr(func, "__name__", None) or str(func)
            raise UsageError(
                f"there is no closed form for {name} in weft.train.rules: linearise with engine='jvp', or "
                "declare a rule for it"
            )
        return rule(*args, **(kwargs or {}))


def rule(*operations: Any) -> Callable[[Rule], Rule]:
    """Declare the rule of some operations."""

    def declare(made: Rule) -> Rule:
        for operation in operations:
            RULES[operation] = made
        return made

    return declare


def value(x: Any) -> Any:
    """x of a pair; anything else as it is."""
    return x.x if isinstance(x, Pair) else x


def tangent(x: Any) -> Tensor | None:
    """ẋ of a pair; None for a constant."""
    return x.dx if isinstance(x, Pair) else None


def run_pairs(
    module: nn.Module, chart: Chart, phi: Mapping[str, Tensor], args: tuple[Any, ...],
    kwargs: Mapping[str, Any], output: Output,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(f(x; θ0), ∂f/∂φ (φ − φ0)) by the rules; the chart's own derivative is torch's.

    UsageError naming the operation where one has no rule.
    """
    own, start = dict(module.named_parameters()), dict(chart.start)
    step = {n: phi[n] - start[n] for n in start}
    moved = torch.func.jvp(lambda p: chart(p), (start,), (step,))[1]
    weights: dict[str, Tensor] = {n: Pair(own[n].detach(), d.to(own[n].dtype)) for n, d in moved.items()}
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        made = output(functional_call(module, weights, args, dict(kwargs)))
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    if not isinstance(made, Pair):  # nothing that is trained reaches the output
        return made, torch.zeros_like(made)
    return made.x, made.dx
