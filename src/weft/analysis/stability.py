"""How far one training example moves the result of SGD, and what averaging the last iterates changes.

Two runs of logistic regression see the same indices, but one example of the second data set is another one. With
L = max‖x‖ and β = max‖x‖²/4, convex, α ≤ 2/β (Hardt et al., arXiv:1509.01240):

    E‖w_t − w'_t‖ ≤ (2L/n) Σ_{s≤t} α_s,        hence stability  ε ≤ L · that

The mean of the last k iterates is within the mean of their bounds: half of the last one's for k = T (averaging over
finite windows: Wang et al., ICML 2024). Both hold for sampling with replacement and by random permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from weft.analysis.finding import Finding, figure, graphs
from weft.errors import UsageError

Sampling = Literal["replacement", "permutation"]


@dataclass(frozen=True)
class Stability(Finding):
    """Means over the replicas, for the mean of the last `windows[i]` iterates; 1 is the last iterate alone."""

    windows: tuple[int, ...]
    distance: tuple[float, ...]
    """E‖w̄ − w̄'‖."""
    bound: tuple[float, ...]
    loss_change: tuple[float, ...]
    """The largest change of the loss of any example, mean over the replicas."""
    lipschitz: float
    smoothness: float
    sampling: str
    steps: int
    examples: int

    about: ClassVar[str] = (
        "Distance between two runs of SGD whose data differ in one example, for means of the last k iterates, and "
        "its bound for convex losses (arXiv:1509.01240): the longer the window, the more stable."
    )

    @property
    def title(self) -> str:
        return f"Stability of SGD (sampling: {self.sampling})"

    @property
    def headline(self) -> str:
        return (f"last iterate {self.distance[0]:.4g} (bound {self.bound[0]:.4g}), mean of {self.windows[-1]} "
                f"{self.distance[-1]:.4g} (bound {self.bound[-1]:.4g})")  # fmt: skip

    def plot(self) -> Any:
        made = figure("iterates averaged, k", "distance of the weights")
        for name, values in (("measured", self.distance), ("bound", self.bound)):
            made.add_trace(graphs().Scatter(x=self.windows, y=values, name=name, mode="lines+markers"))
        made.update_yaxes(rangemode="tozero")
        return made


def sgd_stability(
    inputs: Tensor,
    targets: Tensor,
    *,
    steps: int,
    rate: float | None = None,
    windows: Sequence[int] | None = None,
    sampling: Sampling = "replacement",
    replicas: int = 64,
    seed: int = 0,
) -> Stability:
    """Run pairs of logistic regressions, inputs [n, d], targets [n] of 0 and 1, each pair with its own sampling.

    In each pair a random example is replaced by another random one of the data with the opposite label, which is
    as bad as a replacement from them can be. `rate` is 1/β by default. Raises UsageError for a step
    above 2/β or other targets.
    """
    x = inputs.double().flatten(1)
    y = targets.double()
    n = len(x)
    lipschitz = float(x.norm(dim=1).max())
    beta = lipschitz**2 / 4
    step = 1 / beta if rate is None else rate
    if n < 2 or len(y) != n or not bool(((y == 0) | (y == 1)).all()):
        raise UsageError("stability needs at least two inputs and as many targets, each 0 or 1")
    if not 0 < step <= 2 / beta:
        raise UsageError(f"the step must be at most 2/β = {2 / beta:.4g} for the bound to hold, not {step:g}")
    wanted = (
        [1, *sorted({max(1, steps * i // 8) for i in range(1, 9)} - {1})]
        if windows is None
        else list(windows)
    )
    if not wanted or min(wanted) < 1 or max(wanted) > steps:
        raise UsageError(f"windows must lie between 1 and the {steps} steps")
    generator = torch.Generator().manual_seed(seed)
    order = _order(n, steps, replicas, sampling, generator)  # [replicas, steps]
    replaced = torch.randint(n, (replicas,), generator=generator)
    substitute = torch.randint(n, (replicas,), generator=generator)
    runs = [
        _run(x, y, order, step, None),
        _run(x, y, order, step, (replaced, substitute)),
    ]  # [steps, replicas, d]
    distances, changes = [], []
    for k in wanted:
        w, v = (run[-k:].mean(0) for run in runs)
        distances.append(float((w - v).norm(dim=1).mean()))
        losses = [torch.nn.functional.softplus((1 - 2 * y) * (p @ x.T)) for p in (w, v)]
        changes.append(float((losses[0] - losses[1]).abs().amax(1).mean()))
    bounds = [2 * lipschitz / n * step * (steps - (k - 1) / 2) for k in wanted]
    return Stability(
        tuple(wanted), tuple(distances), tuple(bounds), tuple(changes), lipschitz, beta, sampling, steps, n
    )


def _order(n: int, steps: int, replicas: int, sampling: Sampling, generator: torch.Generator) -> Tensor:
    if sampling == "replacement":
        return torch.randint(n, (replicas, steps), generator=generator)
    if sampling != "permutation":
        raise UsageError(f"sampling must be replacement or permutation, not {sampling!r}")
    epochs = -(-steps // n)
    rows = [
        torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)]) for _ in range(replicas)
    ]
    return torch.stack(rows)[:, :steps]


def _run(x: Tensor, y: Tensor, order: Tensor, rate: float, swap: tuple[Tensor, Tensor] | None) -> Tensor:
    """All iterates after the first step on, [steps, replicas, d]; `swap` = (replaced, by) for every replica."""
    w = torch.zeros(len(order), x.shape[1], dtype=torch.float64)
    found = []
    for chosen in order.T:
        labels = y[chosen]
        if swap is not None:
            hit = chosen == swap[0]
            chosen = torch.where(hit, swap[1], chosen)
            labels = torch.where(hit, 1 - y[chosen], labels)
        xs = x[chosen]
        w = w - rate * ((w * xs).sum(1).sigmoid() - labels)[:, None] * xs
        found.append(w)
    return torch.stack(found)
