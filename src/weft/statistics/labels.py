"""Which labels a gradient is taken for, and the log-likelihood it is the gradient of.

    model   drawn from the model's own distribution: the true Fisher, by one sample an example (the default)
    exact   every class, weighted with its probability: the true Fisher without sampling, for few classes
    given   the data's: the empirical Fisher, and what gradients and sensitivities need

One example is one draw of data: of a language model a whole sequence, whose log-likelihood is the sum over the
tokens that count. The labels' positions stand at the logits that predict them.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import UsageError
from weft.methods.random import uniform_bits
from weft.methods.step import At
from weft.statistics.batches import Batch

Labels = Literal["model", "exact", "given"]
IGNORED = -100


def sampled(logits: Tensor, batch: Batch, seed: int, first: int) -> Tensor:
    """Labels y ~ softmax(logits), [B, …]; logits [B, …, C]. `first` counts the examples before these.

    The draw of a position depends on seed, example and position alone, not on how the examples were batched.
    """
    p = logits.detach().double().softmax(-1)
    drawn = []
    for i, one in enumerate(p):
        n = one.shape[:-1].numel()
        bits = uniform_bits(At(name="labels", seed=seed), first + i, n).to(one.device)
        u = (bits.double() + 0.5) / 2**32
        upto = one.reshape(n, -1).cumsum(-1)
        y = torch.searchsorted(upto, (u * upto[:, -1])[:, None]).clamp(max=one.shape[-1] - 1)
        drawn.append(y.reshape(one.shape[:-1]))
    return counted(torch.stack(drawn), batch)


def given(logits: Tensor, batch: Batch, module: nn.Module) -> Tensor:
    """The data's labels [B, …], moved to the positions that predict them for a causal language model."""
    labels = batch.labels
    if labels is None:
        raise UsageError(
            "the data have no labels: give (inputs, labels) or a mapping with labels, a loss, or labels='model'"
        )
    if labels.is_floating_point():
        raise UsageError(
            "the labels are no classes: pass loss=lambda outputs, batch: … (one number an example)"
        )
    if type(module).__name__.endswith(("CausalLM", "LMHeadModel")) and labels.shape == logits.shape[:-1]:
        labels = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1)
    if labels.shape != logits.shape[:-1]:
        raise UsageError(
            f"labels of shape {list(labels.shape)} do not fit logits of shape {list(logits.shape)}: pass a loss"
        )
    return counted(labels, batch)


def counted(labels: Tensor, batch: Batch) -> Tensor:
    """The labels, with those of masked positions ignored."""
    for mask in batch.masks:
        if mask.shape == labels.shape:
            return labels.masked_fill(~mask, IGNORED)
    return labels


def log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(y | x) of each example, [B], in float32 at least; logits [B, …, C], labels [B, …]."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(
        wide.reshape(-1, wide.shape[-1]), labels.reshape(-1), reduction="none", ignore_index=IGNORED
    )
    return -losses.reshape(len(labels), -1).sum(1)
