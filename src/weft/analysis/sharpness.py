"""How sharp a minimum is: the Hessian's trace and largest eigenvalues, and how the loss rises nearby.

    tr H = E_z zᵀHz, z of independent signs (Hutchinson)      λ_max by Lanczos with full orthogonalisation
    SAM: max_{‖ε‖≤ρ} L(θ+ε) − L(θ), ε = ρ∇L/‖∇L‖ to first order (arXiv:2010.01412)
    random: E_{‖ε‖=ρ} L(θ+ε) − L(θ)

H acts through second derivatives of the loss (`Network.hessian_product`); it is never built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network, State
from weft.analysis.space import at, flat, shaped
from weft.api import Model
from weft.errors import UsageError


@dataclass(frozen=True)
class Sharpness(Finding):
    """Measures of one model's minimum."""

    model: str
    loss: float
    parameters: int
    trace: float
    trace_error: float
    """Standard error of the trace; 0 where it is exact."""
    eigenvalues: tuple[float, ...]
    """The largest, falling."""
    smallest: float
    """The lowest Ritz value: an upper bound of the Hessian's lowest eigenvalue."""
    sam: float
    random: float
    radius: float

    about: ClassVar[str] = (
        "Curvature of the loss at one model: trace of the Hessian (Hutchinson), its largest eigenvalues (Lanczos), "
        "the rise at distance ρ towards the gradient (SAM, arXiv:2010.01412) and in random directions."
    )

    @property
    def title(self) -> str:
        return f"Sharpness of {self.model}"

    @property
    def headline(self) -> str:
        return (f"largest eigenvalue {self.eigenvalues[0]:.4g}, trace {self.trace:.4g} ± {self.trace_error:.2g}, "
                f"SAM rise {self.sam:.4g} at ρ = {self.radius:g}")  # fmt: skip

    def plot(self) -> Any:
        made = figure("eigenvalue, falling", "of the Hessian")
        numbers = [str(i + 1) for i in range(len(self.eigenvalues))]
        made.add_trace(graphs().Bar(x=numbers, y=self.eigenvalues))
        made.update_xaxes(type="category")
        return made


def sharpness(
    net: Network,
    model: Model,
    *,
    probes: int = 16,
    eigenvalues: int = 5,
    steps: int = 24,
    radius: float = 0.05,
    samples: int = 8,
    seed: int = 0,
    name: str = "model",
) -> Sharpness:
    """Measure one model over all the data of the network.

    With at least as many probes as parameters the trace is summed over the unit vectors, exactly. Raises
    UsageError for probes, steps or a radius that are not positive.
    """
    if min(probes, steps, eigenvalues, samples) < 1 or radius <= 0:
        raise UsageError("probes, steps, eigenvalues, samples and radius must be positive")
    state = net.state(model)
    loss, gradient = net.loss_and_gradient(state)
    trace, error = hessian_trace(net, state, probes, seed)
    ritz = lanczos(net, state, max(steps, eigenvalues), seed)
    start = flat(state, net.parameters)
    uphill = flat(gradient, net.parameters)

    def rise(direction: Tensor) -> float:
        length = float(direction.norm())
        if length == 0:
            return 0.0
        return net.measure(at(start + radius / length * direction, state, net.parameters)).loss - loss

    generator = torch.Generator().manual_seed(seed)
    moves = [torch.randn(len(start), generator=generator, dtype=torch.float64) for _ in range(samples)]
    rises = [rise(m.to(start.device)) for m in moves]
    return Sharpness(
        name, loss, len(start), trace, error, tuple(ritz.flip(0)[:eigenvalues].tolist()), float(ritz[0]),
        rise(uphill), sum(rises) / samples, radius,
    )  # fmt: skip


def hessian_trace(net: Network, state: State, probes: int = 32, seed: int = 0) -> tuple[float, float]:
    """tr ∇²L and its standard error, by Hutchinson's estimator; exact over unit vectors where probes allow."""
    n = sum(state[p].numel() for p in net.parameters)
    if probes >= n:
        return sum(
            float(_product(net, state, e)[i]) for i, e in enumerate(torch.eye(n, dtype=torch.float64))
        ), 0.0
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(probes):
        z = torch.randint(2, (n,), generator=generator).double() * 2 - 1
        found.append(float(z @ _product(net, state, z)))
    mean = sum(found) / probes
    spread = math.sqrt(sum((v - mean) ** 2 for v in found) / max(probes - 1, 1) / probes)
    return mean, spread


def lanczos(net: Network, state: State, steps: int = 40, seed: int = 0) -> Tensor:
    """Ritz values of ∇²L, rising, [≤ steps]: the extreme ones converge first.

    Every vector is orthogonalised against all before it, twice; the iteration ends where nothing is left.
    """
    n = sum(state[p].numel() for p in net.parameters)
    v = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis, diagonal, off = [v / v.norm()], list[float](), list[float]()
    for _ in range(min(steps, n)):
        w = _product(net, state, basis[-1])
        diagonal.append(float(w @ basis[-1]))
        stacked = torch.stack(basis)
        for _ in range(2):
            w = w - stacked.T @ (stacked @ w)
        length = float(w.norm())
        if length <= 1e-10 * max(map(abs, [*diagonal, *off, 1e-30])):
            break
        off.append(length)
        basis.append(w / length)
    size = len(diagonal)
    tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for i, b in enumerate(off[: size - 1]):
        tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = b
    values: Tensor = torch.linalg.eigvalsh(tridiagonal)
    return values


def _product(net: Network, state: State, vector: Tensor) -> Tensor:
    """Hv as a vector, float64 on the CPU."""
    direction = shaped(vector.to(net.device), state, net.parameters)
    return flat(net.hessian_product(state, direction), net.parameters).cpu()
