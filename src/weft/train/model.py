"""Modules to train: a network with a chart of some of its weights, plain (`Charted`) or linearised.

They hold a frozen copy of the network with θ0; their only parameters are φ, and their state dict is that of the
network with θ(φ): an ordinary checkpoint. So any trainer, and `weft.load`, can take them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

import weft.train.forward as forward_mode
from weft.errors import UsageError
from weft.train.chart import Chart, Direct
from weft.train.forward import Output, logits_of
from weft.train.lowrank import LowRank
from weft.train.select import Which, chosen

Engine = Literal["jvp", "closed"]
_PREFIX = "phi/"


class Charted(nn.Module):
    """f(x; θ(φ)) with φ as parameters in float32 at least. `module` is copied and stays as it is.

    Without a chart the parameters that `which` means are trained themselves; "lora" means the factors of a
    module that peft has wrapped (for LoRA without peft give `LowRank`). Calls return the tensor that `output`
    takes from what the module returns, its logits by default.
    """

    def __init__(
        self,
        module: nn.Module,
        chart: Chart | None = None,
        which: Which = "all",
        *,
        output: Output = logits_of,
    ) -> None:
        super().__init__()
        # not registered: θ0 is no parameter of this module and no part of its state
        self.__dict__["inner"] = copy.deepcopy(module).requires_grad_(False)
        self.chart = Direct(self.inner, chosen(module, which)) if chart is None else chart
        self.output = output
        for name, start in self.chart.start.items():
            self.register_parameter(_PREFIX + name.replace(".", "/"), nn.Parameter(start.clone()))
        self._tied = _tied(self.inner)

    @property
    def phi(self) -> dict[str, Tensor]:
        """φ by name, live."""
        own = self._parameters
        return {n: own[_PREFIX + n.replace(".", "/")] for n in self.chart.start}  # type: ignore[misc]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.at(self.phi, args, kwargs)

    def at(
        self, phi: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        """The output at any φ."""
        return forward_mode.run(self.inner, self.chart(phi), args, kwargs or {}, self.output)

    def delta(self, phi: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """θ(φ) − θ0 of the parameters that φ moves; differentiable in φ."""
        moved, before = self.chart(self.phi if phi is None else phi), dict(self.inner.named_parameters())
        return {n: t - before[n].to(t.dtype) for n, t in moved.items()}

    def weights(self) -> dict[str, Tensor]:
        """A copy of the network's whole state with θ(φ) in it, rounded to the dtypes that it is stored in."""
        with torch.no_grad():
            made = {n: t.detach().clone() for n, t in self.inner.state_dict().items()}
            for name, value in self.chart({n: p.detach() for n, p in self.phi.items()}).items():
                for place in (name, *self._tied.get(name, ())):
                    if place in made:
                        made[place] = value.to(made[place].dtype, copy=True)
        return made

    def take(self, theta: Mapping[str, Tensor]) -> None:
        """Go on from these weights: φ with θ(φ) = θ, and the buffers that are there (BatchNorm's statistics)."""
        with torch.no_grad():
            for name, value in self.chart.of(theta).items():
                self.phi[name].copy_(value)
            for name, buffer in self.inner.named_buffers():
                if name in theta:
                    buffer.copy_(theta[name])

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.inner.train(mode)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inner._apply(fn)  # type: ignore[no-untyped-call]
        # casts are the network's affair; φ0 only follows to its device
        self.chart = self.chart.to(next(self.inner.parameters()).device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + n: t for n, t in self.weights().items()})

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        known = {prefix + n for n in self.inner.state_dict()}
        missing_keys += sorted(known - state_dict.keys())
        unexpected_keys += sorted(n for n in state_dict if n.startswith(prefix) and n not in known)
        theta = {n.removeprefix(prefix): t for n, t in state_dict.items() if n in known}
        if all(n in theta for n in self.chart.names):
            self.take(theta)

    @property
    def inner(self) -> nn.Module:
        """The network with θ0, frozen."""
        return self.__dict__["inner"]  # type: ignore[no-any-return]


class Linearised(Charted):
    """f_lin(x; φ) = f(x; θ0) + ∂f/∂φ (φ − φ0): linear in φ, and equal to f at φ0 (arXiv:2305.12827).

    The network stays in evaluation mode (dropout and batch statistics would break linearity) and its buffers are
    frozen. `engine="jvp"` is torch's forward mode, for any operation that has it; "closed" carries (x, ẋ)
    through the layers by their own rules (arXiv:2307.08122), for operations that `weft.train.rules` knows: the same
    numbers in plain operations of torch, which work wherever backward does.

    `base` is θ0, where it is not what `module` holds. The state dict is θ, which means something in this
    module only: the plain network with it is another function.
    """

    def __init__(
        self,
        module: nn.Module,
        base: Any = None,
        which: Which = "all",
        *,
        chart: Chart | None = None,
        engine: Engine = "jvp",
        output: Output = logits_of,
    ) -> None:
        if engine not in ("jvp", "closed"):
            raise UsageError(f"there is no engine {engine!r}: use jvp or closed")
        if base is not None:
            from weft.api import materialize

            module = materialize(base, copy.deepcopy(module))
        super().__init__(module, chart, which, output=output)
        self.engine = engine
        self.eval()

    def at(
        self, phi: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
    ) -> Tensor:
        if self.engine == "closed":
            from weft.train.pair import run_pairs

            value, tangent = run_pairs(self.inner, self.chart, phi, args, kwargs or {}, self.output)
        else:
            value, tangent = forward_mode.run_tangent(
                self.inner, self.chart, phi, args, kwargs or {}, self.output
            )
        return value + tangent

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.inner.eval()
        return self


def _tied(module: nn.Module) -> dict[str, list[str]]:
    """First name of a parameter → its other names."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {first: rest for first, *rest in names.values() if rest}


def lowrank_of(model: Charted) -> LowRank | None:
    """The model's chart, where that is low-rank."""
    return model.chart if isinstance(model.chart, LowRank) else None
