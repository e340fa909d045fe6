"""Gradients of one example at a time, and what is averaged of them.

    fisher       mean over examples of g²             [*shape]     (never the square of a batch's sum)
    gradient     mean of g                            [*shape]
    sensitivity  mean of |θ g|                        [*shape]
    node         mean of (Σ θ g over a unit)²         [units]

g is the gradient of the loss of one example, −log p(y | x). A unit of a layer is one of its outputs (a row of the
weight with its bias), or a group of rows such as an attention head: Σ θ g over its parameters is the gradient of a
mask of ones on its pre-activation, so `node` is the Fisher information of the masks (Fisher-nodes,
Thennal et al. 2024).

Gradients come by `torch.func.vmap(grad)`, a few examples at a time as memory allows, or one by one where the model
does things that vmap cannot. Squares and sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from weft.errors import DataError, UsageError

KINDS = ("fisher", "gradient", "sensitivity", "node")
MEMORY = 1 << 28
"""Bytes of gradients that are held at a time, of examples taken together."""

Loss = Callable[[Mapping[str, Tensor], int], Tensor]
"""The loss of example i with these parameters, a scalar."""


class Examples:
    """Sums over the gradients of single examples."""

    def __init__(
        self, parameters: Mapping[str, Tensor], what: set[str], units: Mapping[str, int] | None = None
    ) -> None:
        self.parameters = {n: p.detach() for n, p in parameters.items()}
        self.what, self.count = what & set(KINDS), 0
        kinds = self.what - {"node"}
        self._sums = {(k, n): torch.zeros_like(p, dtype=torch.float64)
                      for k in kinds for n, p in self.parameters.items()}  # fmt: skip
        self._units = units or {}
        self._turned: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._nodes: dict[str, Tensor] = {}

    def turned(self, names: set[str]) -> None:
        """Lay out "node", before anything is added: units of the weights `names`, stored [in, out], are columns."""
        self._turned = names
        self._sizes = _unit_sizes(self.parameters, self._units, names) if "node" in self.what else {}
        self._nodes = {
            n: torch.zeros(
                outputs(self.parameters[n], n in names) // g,
                dtype=torch.float64,
                device=self.parameters[n].device,
            )
            for n, g in self._sizes.items()
        }

    def add(self, gradients: Mapping[str, Tensor], weights: Tensor | None = None) -> None:
        """Add gradients [n, *shape] of n examples; with `weights` [n] of terms that weigh so, not counted."""
        n = len(next(iter(gradients.values())))
        self.count += n if weights is None else 0
        for name, every in gradients.items():
            if not bool(every.isfinite().all()):
                raise DataError(
                    f"the gradients of {name!r} have NaN or infinite values: measure in a wider dtype"
                )
            for i, g in enumerate(every):
                g = g.double()
                w = 1.0 if weights is None else float(weights[i])
                if "fisher" in self.what:
                    self._sums["fisher", name].add_(g.square(), alpha=w)
                if "gradient" in self.what:
                    self._sums["gradient", name].add_(g, alpha=w)
                if "sensitivity" in self.what:
                    self._sums["sensitivity", name].add_((self.parameters[name].double() * g).abs(), alpha=w)
        for name, size in self._sizes.items():
            masks = self._mask_gradients(name, gradients, size)
            each = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
            self._nodes[name] += (masks.square() * each.to(masks.device)[:, None]).sum(0)

    def _mask_gradients(self, name: str, gradients: Mapping[str, Tensor], group: int) -> Tensor:
        """∂L/∂m of every unit of a layer, [n, units]: Σ θ g over its rows of the weight and its biases."""
        n, turned = len(gradients[name]), name in self._turned
        both = gradients[name].double() * self.parameters[name].detach().double()
        total = both.flatten(1, -2).sum(1) if turned else both.flatten(2).sum(-1)
        bias = _bias(name)
        if bias in gradients and gradients[bias].shape[1:] == total.shape[1:]:
            total = total + gradients[bias].double() * self.parameters[bias].double()
        return total.reshape(n, -1, group).sum(-1)

    def results(self) -> dict[str, Tensor]:
        """`"{kind}/{name}"` → mean over the examples, float64."""
        n = max(1, self.count)
        found = {f"{kind}/{name}": total / n for (kind, name), total in self._sums.items()}
        for name, total in self._nodes.items():
            found[f"node/{name}"] = total / n
            bias = _bias(name)
            if bias in self.parameters and len(self.parameters[bias]) == outputs(
                self.parameters[name], name in self._turned
            ):
                found[f"node/{bias}"] = total / n
        return found


def _bias(weight: str) -> str:
    return weight[: -len("weight")] + "bias" if weight.endswith("weight") else ""


def outputs(weight: Tensor, turned: bool) -> int:
    """How many outputs a weight has, [out, …] or, turned, [in, out]."""
    return weight.shape[-1] if turned else weight.shape[0]


def _unit_sizes(
    parameters: Mapping[str, Tensor], units: Mapping[str, int], turned: set[str]
) -> dict[str, int]:
    """Rows of one unit, for every weight of two axes and more; 1 unless a pattern of `units` says otherwise."""
    sizes = {}
    for name, p in parameters.items():
        if p.dim() < 2:
            continue
        group = next((g for pattern, g in units.items() if fnmatch(name, pattern)), 1)
        rows = outputs(p, name in turned)
        if group < 1 or rows % group:
            raise UsageError(f"units of {group} rows do not fit {name!r}, which has {rows}")
        sizes[name] = group
    unknown = [u for u in units if not any(fnmatch(n, u) for n in sizes)]
    if unknown:
        raise UsageError(f"units: no weight is called {', '.join(unknown)}")
    return sizes


def per_call(parameters: Mapping[str, Tensor]) -> int:
    """How many examples' gradients fit the memory together."""
    return max(1, MEMORY // max(1, sum(p.numel() * p.element_size() for p in parameters.values())))


def one_by_one(parameters: Mapping[str, Tensor], loss: Loss, n: int) -> Iterator[dict[str, Tensor]]:
    """Gradients [1, *shape] of each of n examples, by plain backward passes."""
    held = {k: p.detach().requires_grad_() for k, p in parameters.items()}
    for i in range(n):
        with torch.enable_grad():
            value = loss(held, i)
        found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
        yield {k: (torch.zeros_like(p) if g is None else g)[None]
               for (k, p), g in zip(held.items(), found, strict=True)}  # fmt: skip


def together(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    loss: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
) -> dict[str, Tensor] | None:
    """Gradients [n, *shape] of n examples at once; None where vmap cannot.

    `loss(parameters, *one)` is the loss of one example, given its slices of `tensors` [n, …].
    """
    from torch.func import grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()):
        return None
    try:
        every = vmap(grad(loss), in_dims=(None, *[0] * len(tensors)), randomness="error")
        with sdpa_kernel(
            SDPBackend.MATH
        ):  # others have no rule for batches: example by example, with a warning
            found: dict[str, Tensor] = every(dict(parameters), *tensors)
        return found
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError, IndexError):
        return (
            None  # control flow on values, operations in place …: one by one, which says what is wrong if any
        )
