"""Soups by gradient: shares of fine-tunes (learned soups), the span of a run (TWA), a few models at a time (MEHL).

All are affine combinations of weights without a base, Σᵢ cᵢ θᵢ; they differ in the values c may take and in how
many models are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.checkpoints.memory import StateDict
from weft.errors import UsageError
from weft.learn.constraints import Scaled, Simplex, Span
from weft.learn.loop import Learned, learn
from weft.learn.losses import Loss
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Parts
from weft.learn.sources import Sources
from weft.learn.weighed import Weighed


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
    weight_decay: float = 1e-5,
    batch: int = 128,
    seed: int = 0,
    split: str = "train",
    **how: Any,
) -> Learned:
    """Training in the span of a run's checkpoints, from their mean (trainable weight averaging, ICLR 2023).

    θ = P φ with P the Gram–Schmidt basis of the θᵢ, so that SGD on φ is SGD on θ with every gradient projected onto
    the span. P lives in coefficients (`Span`): no basis of the weights' size is made. The paper's rate is 2, for
    networks with BatchNorm (norms="batch"; re-estimate the statistics afterwards); others need less.
    """

    def way(sources: Sources, names: list[str]) -> Weighed:
        return Weighed(sources, names, "model", Span.of(sources.gram(names)), 1 / len(sources.models))

    merged = Mergeable(module, None, models, way=way, **how)
    return learn(
        merged, loss, data, steps=steps, lr=lr, optimizer="sgd", weight_decay=weight_decay, schedule="linear",
        batch=batch, seed=seed, split=split,
    )  # fmt: skip


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
) -> Learned:
    """Learned signed weights on the hyperplane of affine combinations, `model_batch` models in memory at a time.

    θ = c + Σᵢ Pᵢ Xᵢ by tensor, Pᵢ = (θᵢ − c) / ‖θᵢ − c‖ (arXiv:2407.03641): c is first the mean of all models;
    each epoch cuts the shuffled models into batches, each has `steps` steps of AdamW on X from 0 (a fifth of them
    warming up, then a cosine), and where it ends is the next c. What comes back has a coefficient a model and
    tensor, of sum 1, by their arithmetic, and reads the models anew. `counted` has `resident_models` and
    `peak_bytes` (of weights).
    """
    if model_batch < 1 or epochs < 1:
        raise UsageError("model_batch and epochs must be 1 or more")
    merged = Mergeable(module, None, models, "tensor", hold=False, **how)
    soup, sources = merged.way, merged.sources
    assert isinstance(soup, Weighed)
    found = Learned(merged, [], split, counted={"resident_models": 0, "peak_bytes": 0})
    c = {n: t.double() for n, t in soup.coefficients().items()}
    state = {**_values(merged), **{n: sources.averaged(n).cpu() for n in sources.buffers}}
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        for turn, group in enumerate(
            torch.split(torch.randperm(len(models), generator=generator), model_batch)
        ):
            held = [sources.models[i] for i in group.tolist()]
            part = Mergeable(module, StateDict(state, "the centre"), held, way=_on_the_plane, **how)
            moved = learn(
                part, loss, data, steps=steps, lr=lr, optimizer="adamw", schedule="cosine", warmup=steps // 5,
                batch=batch, seed=seed + 1009 * epoch + turn, split=split,
            )  # fmt: skip
            found.losses += moved.losses
            _most(found.counted, resident_models=len(held), peak_bytes=part.sources.held_bytes)
            for name, step in moved.coefficients.items():
                c[name] *= 1 - step.double().sum()
                c[name][group] += step.double()
            state |= _values(part)
    with torch.no_grad():
        for key, phi in zip(soup.keys, soup.phi, strict=True):
            phi.copy_(c[key])
    return found


@torch.no_grad()
def _values(merged: Mergeable) -> dict[str, Tensor]:
    return {n: w.cpu() for n, w in merged.weights().items()}


def _most(counted: dict[str, int], **seen: int) -> None:
    for name, value in seen.items():
        counted[name] = max(counted[name], value)


def _on_the_plane(sources: Sources, names: list[str]) -> Weighed:
    """One number a tensor and model, whose unit is one unit of length in weight space.

    A model that differs from c by rounding errors alone has size 0 and takes no part.
    """
    sizes = {}
    for n in names:
        norms = torch.stack([sources.delta(i, n, torch.float32).norm() for i in range(len(sources.models))])
        sizes[n] = torch.where(norms > 1e-5 * sources.value(None, n).float().norm(), norms, 0.0)
    return Weighed(sources, names, "tensor", Scaled(sizes), 0.0)
