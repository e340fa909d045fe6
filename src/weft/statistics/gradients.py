"""Passes with gradients: Fisher information and its kin by example, and the K-FAC factors by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from weft.errors import UsageError
from weft.statistics.batches import Batch, Forward, as_batch, logits_of, outputs_of
from weft.statistics.examples import Examples, one_by_one, per_call, together
from weft.statistics.labels import Labels, given, log_likelihood, sampled
from weft.statistics.observe import Observer
from weft.statistics.sums import Sums
from weft.statistics.uses import Parameters

LossOf = Callable[[Any, Any], Tensor]
"""`loss(outputs, batch) -> [B]`: what the user counts as the loss of each example."""
CLASSES = 1024
"""Labels that are weighed one by one, at most."""


@dataclass(frozen=True)
class Asked:
    """How gradients are to be taken."""

    labels: Labels = "model"
    loss: LossOf | None = None
    forward: Forward | None = None
    seed: int = 0


class _Whole(nn.Module):
    """A module and how its loss on one batch is computed, so that parameters can be put in from outside."""

    def __init__(self, inner: nn.Module, asked: Asked) -> None:
        super().__init__()
        self.inner, self.asked = inner, asked

    def forward(self, batch: Batch, targets: Tensor | None) -> Tensor:
        """The losses [B]."""
        outputs = outputs_of(self.inner, batch, self.asked.forward)
        if targets is None:
            assert self.asked.loss is not None
            losses = self.asked.loss(outputs, batch.raw)
            if not isinstance(losses, Tensor) or losses.shape != (batch.size,):
                told = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise UsageError(f"loss must give one number an example, [{batch.size}], not {told}")
            return losses
        return -log_likelihood(logits_of(outputs, check=False), targets)


def add_examples(
    module: nn.Module,
    batch: Batch,
    asked: Asked,
    examples: Examples,
    first: int,
    chosen: Mapping[str, Tensor],
) -> None:
    """Add one batch's gradients of every example; `first` counts the examples before it."""
    whole = _Whole(module, asked)
    for start in range(0, batch.size, max(1, per_call(chosen))):
        part = batch.part(start, min(batch.size, start + per_call(chosen)))
        if asked.labels == "exact" and asked.loss is None:
            _add_exactly(whole, part, examples, chosen)
            continue
        targets = _targets(module, part, asked, first + start)
        for found in _gradients(whole, part, targets, chosen):
            examples.add(found)


def _targets(module: nn.Module, batch: Batch, asked: Asked, first: int) -> Tensor | None:
    """The labels to take gradients for; None where the user's loss says."""
    if asked.loss is not None and asked.labels == "given":
        return None
    with torch.no_grad():
        logits = logits_of(outputs_of(module, batch, asked.forward))
    if asked.labels == "given":
        return given(logits, batch, module)
    return sampled(logits, batch, asked.seed, first)


def _add_exactly(whole: _Whole, batch: Batch, examples: Examples, chosen: Mapping[str, Tensor]) -> None:
    """Σ_y p(y | x) (∂ log p(y | x))², the classes of one example together, as memory allows."""
    with torch.no_grad():
        logits = logits_of(outputs_of(whole.inner, batch, whole.asked.forward))
    p = _class_probabilities(logits)
    classes = torch.arange(p.shape[1], device=p.device)
    for i in range(batch.size):
        for some in torch.split(classes, per_call(chosen)):
            done = 0
            for found in _gradients(whole, batch.repeated(i, len(some)), some, chosen):
                n = len(next(iter(found.values())))
                examples.add(found, weights=p[i, some[done : done + n]])
                done += n
        examples.count += 1


def _class_probabilities(logits: Tensor) -> Tensor:
    """p(y | x) [B, C] in float64, of few enough classes."""
    if logits.dim() != 2 or logits.shape[1] > CLASSES:
        raise UsageError(
            f"labels='exact' weighs every class of [examples, classes], at most {CLASSES}; these logits have shape "
            f"{list(logits.shape)}: use labels='model'"
        )
    return logits.detach().double().softmax(-1)


def _gradients(
    whole: _Whole, batch: Batch, targets: Tensor | None, chosen: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """∂ loss of every example: [n, *shape] at once where that is possible, else one after the other."""
    leaves, spec = pytree.tree_flatten(batch.raw)
    sliced = [i for i, v in enumerate(leaves) if isinstance(v, Tensor) and v.dim() and len(v) == batch.size]
    whose = {n: f"inner.{n}" for n in chosen}

    def loss(parameters: Mapping[str, Tensor], *tensors: Tensor) -> Tensor:
        held = list(leaves)
        for i, t in zip(sliced, tensors, strict=False):
            held[i] = t[None]
        one = as_batch(pytree.tree_unflatten(held, spec))
        label = None if targets is None else tensors[-1][None]
        put = {whose[n]: p for n, p in parameters.items()}
        losses: Tensor = functional_call(whole, put, (one, label))
        return losses.sum()

    tensors = (*(leaves[i] for i in sliced), *(() if targets is None else (targets,)))
    found = together(whole, chosen, loss, tensors) if batch.size > 1 else None
    if found is not None:
        yield found
        return
    yield from one_by_one(chosen, lambda p, i: loss(p, *(t[i] for t in tensors)), batch.size)


def add_factors(
    module: nn.Module, batch: Batch, asked: Asked, parameters: Parameters, sums: Sums, first: int
) -> set[str]:
    """One batch of inputs and output gradients for K-FAC; the parameters that the mask could not reach.

    Rows are examples, tokens or positions; the gradient of the batch's summed log-likelihood at one row is that of
    the row's own example, since examples do not mix in evaluation mode.
    """
    watch = Observer(parameters, sums.seen, batch.masks, sums.gradient)
    weights = list(parameters.named.values())
    with torch.enable_grad(), watch:
        outputs = outputs_of(module, batch, asked.forward)
    if asked.loss is not None and asked.labels == "given":
        torch.autograd.grad(asked.loss(outputs, batch.raw).sum(), weights, allow_unused=True)
        return watch.unmasked
    logits = logits_of(outputs)
    if asked.labels == "exact":
        p = _class_probabilities(logits)
        for y in range(p.shape[1]):  # √p g at the outputs makes p g gᵀ
            targets = torch.full((batch.size,), y, device=p.device)
            scores = log_likelihood(logits, targets)
            value = (p[:, y].sqrt().to(scores.dtype) * scores).sum()
            torch.autograd.grad(value, weights, retain_graph=y + 1 < p.shape[1], allow_unused=True)
        sums.backward_passes(p.shape[1])
        return watch.unmasked
    targets = (
        given(logits, batch, module) if asked.labels == "given" else sampled(logits, batch, asked.seed, first)
    )
    torch.autograd.grad(log_likelihood(logits, targets).sum(), weights, allow_unused=True)
    return watch.unmasked
