"""Objectives: losses and regularisers as functions of a point of training, which add up and scale.

    objective = Supervised("cross_entropy") + 0.5 * Quadratic(fisher)
    weft.finetune(module, data, objective=sharpness_aware(objective, rho=0.05), …)

An objective is any callable from a `Point` to a scalar; `Objective` wraps one so that it can be added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems, UsageError, did_you_mean
from weft.train.model import Charted

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Batch:
    """What the network is called with, and what its output is held against."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    targets: Any


@dataclass(frozen=True)
class Point:
    """Where training stands: φ and a batch."""

    model: Charted
    phi: Mapping[str, Tensor]
    batch: Batch

    def outputs(self) -> Tensor:
        """The network's output on the batch at φ."""
        return self.model.at(self.phi, self.batch.args, self.batch.kwargs)

    def delta(self) -> dict[str, Tensor]:
        """θ(φ) − θ0 by parameter."""
        return self.model.delta(self.phi)


class Objective:
    """A scalar function of a `Point`. Sums and multiples of objectives are objectives."""

    def __init__(self, function: Callable[[Point], Tensor]) -> None:
        self.function = function

    def __call__(self, point: Point) -> Tensor:
        return self.function(point)

    def __add__(self, other: Objective) -> Objective:
        return Objective(lambda point: self(point) + other(point))

    def __mul__(self, factor: float) -> Objective:
        return Objective(lambda point: factor * self(point))

    __rmul__ = __mul__


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean of −log p(target); outputs [..., classes], targets [...] where −100 counts for nothing."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def causal_lm(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token: outputs [n, t, vocabulary] at i against targets [n, t] at i + 1."""
    return cross_entropy(outputs[:, :-1], targets[:, 1:])


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error against targets of the same shape."""
    if outputs.shape != targets.shape:
        raise UsageError(
            f"outputs are {list(outputs.shape)}, targets {list(targets.shape)}: squared needs one shape"
        )
    return F.mse_loss(outputs, targets.to(outputs.dtype))


def one_hot_squared(scale: float = 15.0) -> Loss:
    """‖z − κ·onehot(y)‖² / n: what keeps linearised classifiers convex (arXiv:2307.08122). κ is `scale`."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        wanted = scale * F.one_hot(targets, outputs.shape[-1]).to(outputs.dtype)
        return (outputs - wanted).square().sum(-1).mean()

    return loss


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy, "causal_lm": causal_lm, "squared": squared,
    "one_hot_squared": one_hot_squared(),
}  # fmt: skip


def supervised(loss: str | Loss = "cross_entropy") -> Objective:
    """The loss of the network's output against the targets; by name (`LOSSES`) or any function of the two."""
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise UsageError(
                f"there is no loss {loss!r}{did_you_mean(loss, LOSSES)}; known: {', '.join(LOSSES)}, or a function"
            )
        loss = LOSSES[loss]
    return Objective(lambda point: loss(point.outputs(), point.batch.targets))


def quadratic(importance: Mapping[str, Tensor] | Checkpoint) -> Objective:
    """½ (θ − θ0)ᵀ diag(F) (θ − θ0): EWC about the pre-trained weights (ITA, arXiv:2405.16350).

    F by parameter, or a checkpoint of statistics that holds `fisher/<parameter>` (weft.measure). With a
    `Shared` chart it acts on the mean, cross terms of the models included (IEL). DataProblems where a trained
    parameter has none, or of another shape.
    """

    known: dict[str, Tensor] = {}

    def loss(point: Point) -> Tensor:
        moved = point.delta()
        if not known:
            known.update(_importances(importance, moved))
        return 0.5 * _sum((known[n].to(d, non_blocking=True) * d.square()).sum() for n, d in moved.items())

    return Objective(loss)


def l2_sp() -> Objective:
    """½ ‖θ − θ0‖²: stay near the start (L2-SP, arXiv:1802.01483)."""
    return Objective(lambda point: 0.5 * _sum(d.square().sum() for d in point.delta().values()))


def sharpness_aware(objective: Objective, rho: float = 0.05) -> Objective:
    """L(φ + ρ g/‖g‖) with g = ∇L(φ) held constant: its gradient is SAM's (arXiv:2010.01412). Twice the cost."""
    if rho < 0:
        raise UsageError(f"rho must be 0 or more, not {rho}")

    def loss(point: Point) -> Tensor:
        names = list(point.phi)
        slopes = torch.autograd.grad(objective(point), [point.phi[n] for n in names], allow_unused=True)
        g = {n: s.detach() for n, s in zip(names, slopes, strict=True) if s is not None}
        norm = _sum(s.square().sum() for s in g.values()).sqrt().clamp_min(1e-12)
        lifted = {n: p + rho * g[n] / norm if n in g else p for n, p in point.phi.items()}
        return objective(replace(point, phi=lifted))

    return Objective(loss)


def _sum(terms: Any) -> Tensor:
    first, *rest = terms
    return sum(rest, first)  # type: ignore[no-any-return]


def _importances(
    importance: Mapping[str, Tensor] | Checkpoint, moved: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    def find(name: str) -> Tensor | None:
        if isinstance(importance, Checkpoint):
            key = f"fisher/{name}"
            return importance.tensor(key) if key in importance else None
        return importance.get(name)

    found = {n: find(n) for n in moved}
    problems = [
        f"{n}: has none" if f is None else f"{n}: shape {list(f.shape)}, not {list(moved[n].shape)}"
        for n, f in found.items()
        if f is None or f.shape != moved[n].shape
    ]
    problems += [
        f"{n}: has values that are negative or not finite"
        for n, f in found.items()
        if f is not None and not bool((f.isfinite() & (f >= 0)).all())
    ]
    if problems:
        raise DataProblems("the importances do not fit the parameters that are trained", problems)
    return {n: f.to(moved[n]) for n, f in found.items() if f is not None}
