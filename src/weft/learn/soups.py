"""Soups by gradient: shares of fine-tunes (learned soups), the span of a run (TWA), a few models at a time (MEHL).

All are affine combinations of weights without a base, Σᵢ cᵢ θᵢ; they differ in the values c may take and in how
many models are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model, merge
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError
from weft.learn.constraints import Scaled, Simplex, Span
from weft.learn.loop import Learned, learn
from weft.learn.losses import Loss
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Parts, Place
from weft.learn.sources import Sources
from weft.learn.weighed import Weighed, weighted


def learned_soup(
    module: nn.Module,
    models: Sequence[Model],
    data: Any,
    *,
    parts: Parts = "model",
    loss: str | Loss = "cross_entropy",
    temperature: float = 1.0,
    steps: int = 100,
    lr: float = 0.05,
    batch: int = 128,
    seed: int = 0,
    split: str = "validation",
    **how: Any,
) -> Learned:
    """Σᵢ softmax(φ / temperature)ᵢ θᵢ by AdamW on held-out data, from equal shares (arXiv:2203.05482).

    parts="tensor" has shares of its own for every tensor. Leave out runs that have left the others' basin.
    """
    merged = Mergeable(module, None, models, parts, Simplex(temperature), **how)
    return learn(
        merged, loss, data, steps=steps, lr=lr, optimizer="adamw", batch=batch, seed=seed, split=split
    )


def twa(
    module: nn.Module,
    models: Sequence[Model],
    data: Any,
    *,
    loss: str | Loss = "cross_entropy",
    steps: int = 200,
    lr: float = 0.1,
    batch: int = 128,
    seed: int = 0,
    split: str = "train",
    **how: Any,
) -> Learned:
    """Training in the span of a run's checkpoints, from their mean (trainable weight averaging, ICLR 2023).

    θ = mean + P φ with P the Gram–Schmidt basis of the θᵢ, so that SGD on φ is SGD on θ with every gradient
    projected onto the span. P lives in coefficients (`Span`): no basis of the weights' size is made.
    """

    def way(sources: Sources, names: list[str]) -> Weighed:
        return Weighed(sources, names, "model", Span.of(sources.gram()), 1 / len(sources.models))

    merged = Mergeable(module, None, models, way=way, **how)
    return learn(
        merged, loss, data, steps=steps, lr=lr, optimizer="sgd", schedule="linear", batch=batch, seed=seed,
        split=split,
    )  # fmt: skip


@dataclass
class Soup:
    """What `mehl_soup` found."""

    checkpoint: Checkpoint
    coefficients: dict[str, Tensor]
    """By tensor, one a model, summing to 1; they may be negative."""
    losses: list[float]
    resident: int
    """Most checkpoints in memory at once: the models of a batch and the point that is moved."""
    peak_bytes: int
    """Most bytes of weights held at once."""
    split: str


def mehl_soup(
    module: nn.Module,
    models: Sequence[Model],
    data: Any,
    *,
    model_batch: int = 18,
    epochs: int = 5,
    steps: int = 20,
    loss: str | Loss = "cross_entropy",
    lr: float = 0.01,
    batch: int = 128,
    seed: int = 0,
    split: str = "validation",
    **how: Any,
) -> Soup:
    """Learned signed weights on the hyperplane of affine combinations, `model_batch` models in memory at a time.

    θ = c + Σᵢ Pᵢ Xᵢ by tensor, Pᵢ = (θᵢ − c) / ‖θᵢ − c‖ (arXiv:2407.03641): c is first the mean of all models; each
    epoch cuts the shuffled models into batches, each has `steps` steps of AdamW on X from 0, and where it ends is
    the next c. The coefficients of all models are kept by their arithmetic, so the result reads the models anew.
    """
    if model_batch < 1 or epochs < 1:
        raise UsageError("model_batch and epochs must be 1 or more")
    known = [load(m) for m in models]
    every = Sources(module, None, known, hold=False)
    k, losses, resident, peak = len(known), list[float](), 0, 0
    centre: Checkpoint = StateDict(merge(known, "linear").state_dict(), "the mean")
    c = {n: torch.full((k,), 1 / k, dtype=torch.float64) for n in every.parameters}
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for turn, group in enumerate(torch.split(torch.randperm(k, generator=generator), model_batch)):
            merged = Mergeable(module, centre, [known[i] for i in group.tolist()], way=_on_the_plane, **how)
            found = learn(
                merged, loss, data, steps=steps, lr=lr, optimizer="adamw", batch=batch,
                seed=seed + 1009 * epoch + turn, split=split,
            )  # fmt: skip
            losses += found.losses
            resident = max(resident, len(group) + 1)
            peak = max(peak, merged.sources.held_bytes)
            for name, step in found.coefficients.items():
                c[name] *= 1 - step.double().sum()
                c[name][group] += step.double()
            with torch.no_grad():
                state = centre.state_dict() | {n: w.cpu() for n, w in merged.weights().items()}
            centre = StateDict(state, "the current point")
    places = {n: (Place(n, (), every.parameters[n].shape, n), t) for n, t in c.items()}
    return Soup(weighted(every, places, {}, {}), c, losses, resident, peak, split)


def _on_the_plane(sources: Sources, names: list[str]) -> Weighed:
    """One number a tensor and model, whose unit is one unit of length in weight space.

    A model that differs from c by rounding errors alone has size 0 and takes no part.
    """
    sizes = {}
    for n in names:
        norms = torch.stack([sources.delta(i, n, torch.float32).norm() for i in range(len(sources.models))])
        sizes[n] = torch.where(norms > 1e-5 * sources.value(None, n).float().norm(), norms, 0.0)
    return Weighed(sources, names, "tensor", Scaled(sizes), 0.0)
