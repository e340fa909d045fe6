"""Making gates from data: means of features, a classifier of tasks, or gradients through the routed model.

fit_prototypes   unlabelled inputs by task: one mean a task                         ESM++, DAM
fit_router       unlabelled inputs by task: cross-entropy of the task               Twin-Merging, Ye et al.
train            any loss of `weft.learn` through the routed model: labels          SMEAR, PWE-MoE
                 or the entropy of its outputs at test time                         WEMoE
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.errors import DataError, UsageError
from weft.learn.data import Feed, feeds
from weft.learn.loop import TEST_TIME, seeded
from weft.learn.losses import Loss, as_loss
from weft.learn.losses import Shot as _Shot
from weft.routing.gates import Prototypes, Router
from weft.routing.gating import LEARNED
from weft.routing.routed import Fitted, Routed
from weft.statistics.batches import Batch
from weft.train.forward import logits_of
from weft.train.optimise import make_optimizer, make_schedule

What = Literal["gate", "residuals", "all"]
Balance = Literal["mean", "ls", "epo"]
LABEL_FREE = ("entropy", "distill", "self_label")


def _by_task(routed: Routed, data: Any, batch: int, seed: int) -> dict[str, Feed]:
    """A feed a task; UsageError where a task has none."""
    found = feeds(data, routed.tasks, batch, seed, routed.device)
    return {str(t): f for t, f in found.items()}


def _features(routed: Routed, data: Any, samples: int | None, seed: int) -> dict[str, list[Tensor]]:
    """Gate → T of features [n, d] at the resting weights, of up to `samples` inputs a task."""
    if samples is not None and samples < 1:
        raise UsageError(f"samples must be at least 1, not {samples}")
    found: dict[str, list[Tensor]] = {}
    routed.eval()
    for feed in _by_task(routed, data, 256, seed).values():
        seen: dict[str, list[Tensor]] = {}
        left = math.inf if samples is None else samples
        for whole in feed.once():
            part = whole if whole.size <= left else whole.first(int(left))
            for key, x in routed.features_by_gate(part.args, part.kwargs).items():
                seen.setdefault(key, []).append(x)
            left -= part.size
            if left <= 0:
                break
        for key, parts in seen.items():
            found.setdefault(key, []).append(torch.cat(parts).float())
    return found


def fit_prototypes(
    routed: Routed, data: Any, *, samples: int | None = 32, split: str = "validation"
) -> Routed:
    """One mean a task of the features of unlabelled inputs, for each gate."""
    if routed.gating.kind != "prototype":
        raise UsageError(f"a {routed.gating.kind} gate has no prototypes")
    for key, each in _features(routed, data, samples, 0).items():
        centres = torch.stack([F.normalize(x, dim=-1).mean(0) for x in each])
        routed.set_gate(key, Prototypes(centres))
    routed.fitted.append(Fitted("prototypes", "unlabelled inputs by task", split))
    return routed


def fit_router(
    routed: Routed, data: Any, *, steps: int = 300, lr: float = 1e-2, weight_decay: float = 1e-3, batch: int = 256,
    samples: int | None = None, seed: int = 0, split: str = "validation",
) -> list[float]:  # fmt: skip
    """Train each router to tell the task of an input from its features; the losses, a mean over gates a step.

    Needs inputs by task, no labels. Features are taken once, at the resting weights, and standardised.
    """
    gating = routed.gating
    if gating.kind != "router":
        raise UsageError(f"a {gating.kind} gate is not fitted to tasks")
    found = _features(routed, data, samples, seed)
    total = [0.0] * steps
    for key, each in found.items():
        x, y = (
            torch.cat(each),
            torch.cat([torch.full((len(e),), t) for t, e in enumerate(each)]).to(routed.device),
        )
        router = Router(x.shape[1], len(routed.tasks), gating)
        routed.set_gate(key, router)
        router.standardise(x)
        optimizer = make_optimizer("adam", list(router.parameters()), lr, weight_decay)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            index = torch.randperm(len(x), generator=generator)[:batch].to(routed.device)
            loss = F.cross_entropy(router(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total[step] += float(loss.detach()) / len(found)
        router.requires_grad_(False)
    routed.fitted.append(Fitted("router", "inputs by task", split))
    return total


def start_routers(routed: Routed, data: Any, *, standardise: bool = False) -> None:
    """Routers at their start, as wide as what they look at. One batch of `data` says how wide that is."""
    if routed.gating.kind != "router":
        raise UsageError(f"a {routed.gating.kind} gate has no routers")
    for key, each in _features(routed, data, None if standardise else 2, 0).items():
        x = torch.cat(each)
        router = Router(x.shape[1], len(routed.tasks), routed.gating)
        if standardise:
            router.standardise(x)
        routed.set_gate(key, router)


# -- through the model -----------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """The routed model as losses of `weft.learn` see a merge."""

    routed: Routed
    preference: Tensor | None = None
    tell: bool = False

    def at(
        self, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None,
        task: str | None = None,
    ) -> Tensor:  # fmt: skip
        told: dict[str, Any] = {} if self.preference is None else {"preference": self.preference}
        return logits_of(self.routed(*args, **told, **dict(kwargs or {})))

    def index(self, task: str) -> int:
        return self.routed.tasks.index(task)

    def expert(self, i: int, batch: Batch) -> Tensor:
        return logits_of(self.routed._at_row(i, batch.args, batch.kwargs))

    def watched(self, layers: Any) -> Any:
        if layers:
            raise UsageError("hidden layers cannot be compared in a routed model: leave layers out")
        from contextlib import nullcontext

        return nullcontext({})


@dataclass
class Trained:
    """What training gave: the loss of every step, and each task's."""

    losses: list[float]
    by_task: list[list[float]]
    preferences: list[list[float]]


def train(
    routed: Routed, loss: str | Loss, data: Any, *, steps: int, lr: float = 1e-3, what: What = "gate",
    balance: Balance = "mean", batch: int = 16, optimizer: str = "adam", schedule: str = "constant",
    weight_decay: float = 0.0, clip: float | None = None, seed: int = 0, split: str = "validation",
) -> Trained:  # fmt: skip
    """Gradient steps on the gate (or the residuals, or both) through the routed model; `data` by task.

    `loss` is any of `weft.learn`'s: cross_entropy needs labels, entropy none. `split` says which data these are:
    "test-time" declares that they are inputs of the test, which the model then remembers. `balance` joins the
    tasks' losses: their mean; for a preference gate, at a preference r drawn evenly each step, "ls" Σ rₜlₜ or
    "epo", whose steps make rₜlₜ equal (epo.py). Raises DataError where a loss or gradient is not finite.
    """
    found, gating = as_loss(loss), routed.gating
    if steps < 0:
        raise UsageError(f"there cannot be {steps} steps")
    if balance not in ("mean", "ls", "epo"):
        raise UsageError(f"balance must be mean, ls or epo, not {balance!r}")
    if (gating.kind == "preference") != (balance != "mean"):
        raise UsageError("a preference gate is trained with balance='ls' or 'epo', another with 'mean'")
    if gating.kind == "router" and what != "residuals" and not len(routed.gates):
        start_routers(routed, data)
    trained = _trained(routed, what)
    sources = _by_task(routed, data, batch, seed)
    streams = {t: iter(f) for t, f in sources.items()}
    made = make_optimizer(optimizer, list[Tensor](trained), lr, weight_decay)
    rate = make_schedule(made, schedule, 0, steps)
    result = Trained([], [], [])
    dirichlet = torch.Generator().manual_seed(seed)
    routed.train(True)
    routed.net.eval()
    for part in routed.parts:
        part.training = True  # experts are left out at random; dropout and statistics stay off
        part.forget()
    for p in trained:
        p.requires_grad_(True)
    try:
        with seeded(seed, routed.device):
            for step in range(steps):
                r = _drawn(len(routed.tasks), dirichlet, routed.device) if balance != "mean" else None
                subject: Any = _Subject(routed, r)
                each = [found(_Shot(subject, {}, next(s), t)) for t, s in streams.items()]
                values = [float(v.detach()) for v in each]
                _check(values, list(streams), step)
                made.zero_grad()
                total = _joint(each, r, balance, trained)
                total.backward()  # type: ignore[no-untyped-call]
                if any(p.grad is not None and not bool(p.grad.isfinite().all()) for p in trained):
                    raise DataError(f"a gradient is NaN or infinite at step {step}: lower lr, or clip")
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(trained, clip)
                made.step()
                rate.step()
                result.losses.append(float(total.detach()))
                result.by_task.append(values)
                result.preferences.append([] if r is None else r.tolist())
    finally:
        for p in trained:
            p.requires_grad_(False)
            p.grad = None
        routed.eval()
        for part in routed.parts:
            part.forget()
    labels = (
        "unlabelled inputs by task"
        if isinstance(loss, str) and loss in LABEL_FREE
        else "labelled inputs by task"
    )
    routed.fitted.append(Fitted(what, labels, split))
    return result


def _trained(routed: Routed, what: What) -> list[nn.Parameter]:
    if what not in ("gate", "residuals", "all"):
        raise UsageError(f"what is trained must be gate, residuals or all, not {what!r}")
    gates = list(routed.gates.parameters()) if what != "residuals" else []
    if what != "residuals" and (routed.gating.kind not in LEARNED or not gates):
        raise UsageError(f"a {routed.gating.kind} gate is not trained: choose router or preference")
    stored = list(routed.residuals.parameters()) if what != "gate" else []
    if what != "gate" and not all(r.trainable for r in routed.residuals):  # type: ignore[union-attr]
        raise UsageError("residuals in few bits cannot be trained: keep them full, or lowrank")
    return gates + stored


def _drawn(count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """A preference drawn evenly from the simplex (Dirichlet(1)), never quite at its edge."""
    e = -torch.log(torch.rand(count, generator=generator).clamp(1e-6, 1 - 1e-6))
    return (e / e.sum()).to(device)


def _joint(each: list[Tensor], r: Tensor | None, balance: Balance, trained: list[nn.Parameter]) -> Tensor:
    if r is None:
        return torch.stack(each).mean()
    if balance == "ls":
        return (r * torch.stack(each)).sum()
    from weft.routing.epo import epo_weights

    rows = []
    for loss in each:
        grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, trained, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in flat]))
    g = torch.stack(rows).double()
    alpha = epo_weights(torch.stack(each).detach().double().cpu(), r.double().cpu(), (g @ g.T).cpu())
    return (alpha.to(each[0]) * torch.stack(each)).sum() * len(each)


def _check(values: Iterable[float], tasks: list[str], step: int) -> None:
    for value, task in zip(values, tasks, strict=True):
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at step {step} for task {task!r}: lower lr, or look at the data"
            )


__all__ = ["TEST_TIME", "Trained", "fit_prototypes", "fit_router", "start_routers", "train"]
