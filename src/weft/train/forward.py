"""Running a network with other weights, and its first-order expansion around its own.

f_lin(x; φ) = f(x; θ(φ0)) + ∂f/∂φ (φ − φ0), by one forward-mode product; the Jacobian is never formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from weft.errors import UsageError
from weft.train.chart import Chart

Output = Callable[[Any], Tensor]


def logits_of(outputs: Any) -> Tensor:
    """The tensor that a loss is computed from: the output itself, or its `logits`."""
    if isinstance(outputs, Tensor):
        return outputs
    found = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the module returns a {type(outputs).__name__} without logits: say which tensor of it is meant "
            "(output=…)"
        )
    return found


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as explicit products: fused kernels have no forward-mode derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def run(
    module: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any],
    output: Output,
) -> Tensor:  # fmt: skip
    """f(x; θ): the module's output with `weights` in place of its own, in the module's dtypes."""
    own = dict(module.named_parameters())
    typed = {n: w.to(own[n].dtype) for n, w in weights.items()}
    return output(functional_call(module, typed, args, dict(kwargs)))


def run_tangent(
    module: nn.Module, chart: Chart, phi: Mapping[str, Tensor], args: tuple[Any, ...],
    kwargs: Mapping[str, Any], output: Output,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(f(x; θ0), ∂f/∂φ (φ − φ0)) by torch.func.jvp. UsageError where an operation has no such derivative."""
    start = dict(chart.start)
    step = {n: phi[n] - start[n] for n in start}

    def f(p: dict[str, Tensor]) -> Tensor:
        return run(module, chart(p), args, kwargs, output)

    try:
        with plain_attention():
            value, tangent = jvp(f, (start,), (step,))[:2]
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward-mode" not in str(error):
            raise
        raise UsageError(
            f"{type(module).__name__} has an operation without a forward-mode derivative: "
            f"{str(error).splitlines()[0]}; for a model of transformers choose attn_implementation='eager'"
        ) from error
    return value, tangent
