"""`Network`: a module as a function of its weights, θ ↦ outputs, loss, gradient, on fixed data.

Analyses move through weight space: they mix the weights of models, shift them along directions, and look at
what the module then does. The module that is given is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.api import Model, materialize
from weft.errors import DataError, DataProblems, UsageError, did_you_mean

State = dict[str, Tensor]
"""Parameters and buffers by name, tied ones once."""
Loss = Callable[[Any, Any], Tensor]
"""`loss(outputs, targets)`: a scalar, the mean over the batch."""
Batch = tuple[Any, Any]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets but those of −100; outputs [..., classes], targets [...]."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def next_token(outputs: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of every token from those before it; outputs [n, t, vocabulary], targets [n, t]."""
    return cross_entropy(outputs[:, :-1], targets[:, 1:])


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error."""
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def error_rate(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of targets (but those of −100) that are not the class with the largest output."""
    counted = targets != -100
    wrong = (outputs.argmax(-1) != targets) & counted
    return wrong.sum().double() / counted.sum().clamp(min=1)


LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy, "next_token": next_token, "mse": mse}


@dataclass(frozen=True)
class Measured:
    """Means over the data."""

    loss: float
    error: float | None
    """The metric: the error rate for classifiers; None where there is no metric."""


class Network:
    """A module with data and a loss.

    `data` is a pair (inputs, targets) of tensors, or batches of them (a DataLoader, a list). Inputs may be a
    tensor, a tuple (several arguments) or a mapping (keywords); outputs a tensor, an object with `logits`, or a
    tuple whose first entry counts. `loss` is a function or the name of one of LOSSES; `metric(outputs, targets)`
    is the second figure that is taken, by default the error rate of classifiers. `norms="recompute"` has
    BatchNorm's running statistics measured anew wherever weights are mixed, as the literature on linear mode
    connectivity demands; "carry" interpolates them with the weights.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Any,
        *,
        loss: str | Loss = "cross_entropy",
        metric: Loss | None = None,
        norms: Literal["recompute", "carry"] = "recompute",
        batch_size: int = 1024,
    ) -> None:
        self.module = deepcopy(module).eval().requires_grad_(False)
        if isinstance(loss, str) and loss not in LOSSES:
            raise UsageError(f"there is no loss {loss!r}{did_you_mean(loss, LOSSES)}; give a function")
        self.loss: Loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.metric = error_rate if metric is None and loss == "cross_entropy" else metric
        self.norms = norms
        first = next(iter(self.module.parameters()), None)
        if first is None:
            raise UsageError(f"{type(module).__name__} has no parameters, so there is nothing to analyse")
        self.device = first.device
        self.batches: list[Batch] = [_moved(b, self.device) for b in batched(data, batch_size)]
        self.parameters = [n for n, p in self.module.named_parameters() if p.is_floating_point()]

    def on(self, data: Any) -> Network:
        """The same module and loss on other data."""
        made = Network(self.module, data, loss=self.loss, metric=self.metric, norms=self.norms)
        return made

    def state(self, model: Model) -> State:
        """The weights of a model, checked against the module: names, shapes, finite values."""
        made = materialize(model, deepcopy(self.module))
        kept = made.state_dict()
        found = {n: p.detach() for n, p in made.named_parameters()}
        found |= {n: b.detach() for n, b in made.named_buffers() if n in kept}
        bad = [n for n, t in found.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if bad:
            raise DataProblems(
                "these weights are NaN or infinite, so no loss can be measured",
                [f"{n}: {int((~found[n].isfinite()).sum())} of {found[n].numel()} values" for n in bad],
            )
        return found

    def states(self, models: Sequence[Model]) -> list[State]:
        return [self.state(m) for m in models]

    def place(self, state: State) -> nn.Module:
        """A copy of the module with these weights in it."""
        made = deepcopy(self.module)
        with torch.no_grad():
            for name, tensor in (*made.named_parameters(), *made.named_buffers()):
                if name in state:
                    tensor.copy_(state[name])
        return made

    def call(self, state: State, inputs: Any, module: nn.Module | None = None) -> Tensor:
        """Outputs for one batch."""
        args, kwargs = _arguments(inputs)
        return _logits(torch.func.functional_call(module or self.module, state, args, kwargs))

    def outputs(self, state: State) -> Tensor:
        """Outputs for all the data, [n, ...]."""
        with torch.no_grad():
            return torch.cat([self.call(state, inputs) for inputs, _ in self.batches])

    @property
    def targets(self) -> Tensor:
        """All targets, [n, ...]."""
        return torch.cat([t for _, t in self.batches])

    @property
    def examples(self) -> int:
        return sum(weight(t) for _, t in self.batches)

    def measure(self, state: State) -> Measured:
        """Loss and metric at these weights."""
        with torch.no_grad():
            return _mean(
                (weight(t), self._figures(self.call(state, inputs), t)) for inputs, t in self.batches
            )

    def measure_module(self, module: nn.Module) -> Measured:
        """Loss and metric of a module of whatever structure (a repaired one, say) on the data."""
        module.eval()
        with torch.no_grad():
            found = []
            for inputs, t in self.batches:
                args, kwargs = _arguments(inputs)
                found.append((weight(t), self._figures(_logits(module(*args, **kwargs)), t)))
        return _mean(found)

    def _figures(self, outputs: Tensor, targets: Any) -> tuple[float, float]:
        error = math.nan if self.metric is None else float(self.metric(outputs, targets))
        return float(self.loss(outputs, targets)), error

    # -- BatchNorm --------------------------------------------------------------------------------

    @property
    def has_running_statistics(self) -> bool:
        return any(
            isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats
            for m in self.module.modules()
        )

    def settled(self, state: State) -> State:
        """The state with BatchNorm's running statistics measured on the data, where that is asked for."""
        if self.norms == "carry" or not self.has_running_statistics:
            return state
        from torch.optim.swa_utils import update_bn

        module = self.place(state)
        update_bn([_single(inputs) for inputs, _ in self.batches], module)
        buffers = {n: b.detach() for n, b in module.named_buffers()}
        return {n: buffers.get(n, t) for n, t in state.items()}

    # -- derivatives ------------------------------------------------------------------------------

    def split(self, state: State) -> tuple[State, State]:
        """The parameters, and the rest."""
        return {n: state[n] for n in self.parameters}, {
            n: t for n, t in state.items() if n not in set(self.parameters)
        }

    def loss_of(
        self, rest: State, batch: Batch, module: nn.Module | None = None
    ) -> Callable[[State], Tensor]:
        """θ ↦ the loss of one batch, differentiable."""
        inputs, targets = batch
        return lambda parameters: self.loss(self.call({**rest, **parameters}, inputs, module), targets)

    def loss_and_gradient(self, state: State) -> tuple[float, State]:
        """L(θ) and ∇L(θ) over all the data."""
        parameters, rest = self.split(state)
        loss, total = 0.0, {n: torch.zeros_like(t) for n, t in parameters.items()}
        with exact_attention():
            for batch in self.batches:
                share = weight(batch[1]) / self.examples
                gradient, value = torch.func.grad_and_value(self.loss_of(rest, batch))(parameters)
                loss += share * float(value)
                total = {n: t + share * gradient[n] for n, t in total.items()}
        return loss, total

    def hessian_product(self, state: State, direction: State) -> State:
        """∇²L(θ) v = ∇⟨∇L(θ), v⟩ over all the data.

        Backward twice: forward derivatives are not there for every module (attention's softmax, for one).
        """
        parameters, rest = self.split(state)
        total = {n: torch.zeros_like(t) for n, t in parameters.items()}
        with exact_attention():
            for batch in self.batches:
                share = weight(batch[1]) / self.examples
                slope = torch.func.grad(self.loss_of(rest, batch))

                def along(p: State, slope: Callable[[State], State] = slope) -> Tensor:
                    found = slope(p)
                    return torch.stack([(found[n] * direction[n]).sum() for n in found]).sum()

                product = torch.func.grad(along)(parameters)
                total = {n: t + share * product[n] for n, t in total.items()}
        return total


@contextmanager
def exact_attention() -> Iterator[None]:
    """Attention by plain matrix products: the fused kernels have no second or forward derivatives."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.MATH]):
        yield


def weight(targets: Any) -> int:
    """How many examples a batch counts for: its targets that are not −100, its rows otherwise."""
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        return int((targets != -100).sum())
    return len(targets)


def batched(data: Any, batch_size: int) -> list[Batch]:
    """Any accepted form of data as batches. DataError where there are none, UsageError for no pairs."""
    if isinstance(data, tuple) and len(data) == 2 and not _is_pair(data[0]):
        inputs, targets = data
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            if len(inputs) != len(targets):
                raise UsageError(
                    f"there are {len(inputs)} inputs and {len(targets)} targets: they must pair up"
                )
            # of equal size, since BatchNorm's statistics are means over batches
            parts = -(-len(inputs) // batch_size)
            cut = [torch.tensor_split(x, max(parts, 1)) for x in (inputs, targets)]
            found = list(zip(*cut, strict=True))
        else:
            found = [(inputs, targets)]
    elif isinstance(data, Iterable) and not isinstance(data, Mapping | str | Tensor):
        found = [_pair(b) for b in data]
    else:
        raise UsageError(f"data must be (inputs, targets) or batches of them, not {type(data).__name__}")
    found = [b for b in found if len(b[1])]
    if not found:
        raise DataError("the data hold no examples: give at least one batch")
    return found


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2 and isinstance(value[1], Tensor)


def _pair(batch: Any) -> Batch:
    if isinstance(batch, Mapping) and "labels" in batch:
        return {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    raise UsageError(
        f"a batch must be (inputs, targets) or a mapping with labels, not {type(batch).__name__}"
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {k: _moved(v, device) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_moved(v, device) for v in value)
    return value


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def _single(inputs: Any) -> Tensor:
    if isinstance(inputs, Tensor):
        return inputs
    raise UsageError('BatchNorm can only be measured anew for inputs of one tensor: give norms="carry"')


def _logits(found: Any) -> Tensor:
    if isinstance(found, Mapping) and "logits" in found:
        found = found["logits"]
    found = getattr(found, "logits", found)
    found = found[0] if isinstance(found, tuple | list) else found
    if not isinstance(found, Tensor):
        raise UsageError(
            f"the module gives {type(found).__name__}; wrap it so that it gives a tensor of outputs"
        )
    return found


def _mean(parts: Iterable[tuple[int, tuple[float, float]]]) -> Measured:
    every = list(parts)
    n = sum(w for w, _ in every)
    if not n:
        raise DataError("the data hold no target that counts: give examples with labels")
    loss, error = (math.fsum(w * f[i] for w, f in every) / n for i in (0, 1))
    return Measured(loss, None if math.isnan(error) else error)
