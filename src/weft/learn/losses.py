"""Losses: a function of a `Shot`, one batch of one task under the merged weights, to a scalar.

entropy          mean of −Σ p log p of the merged outputs: AdaMerging (arXiv:2310.02575); no labels
cross_entropy …  any loss of `weft.train.objectives` on the labels
distill          KL(expert ‖ merged): the outputs of the task's own model; no labels
self_label       cross-entropy to what the task's own model is sure of: SyMerge; no labels
align(layers)    hidden states and outputs of the task's own model: Expert Merging; no labels
ufm(strong)      pseudo-labels of the merge itself, from a weak to a strong view: aTLAS (arXiv:2407.02880)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.errors import DataError, UsageError, did_you_mean
from weft.learn.mergeable import Mergeable
from weft.statistics.batches import Batch
from weft.train.objectives import LOSSES as LABELLED


@dataclass
class Shot:
    """One batch of one task at one set of weights."""

    merged: Mergeable
    weights: Mapping[str, Tensor]
    batch: Batch
    task: str | None = None
    _hidden: dict[str, Tensor] = field(default_factory=dict)
    _outputs: Tensor | None = None

    def run(self, args: tuple[Any, ...] | None = None, layers: Sequence[str] = ()) -> Tensor:
        """The merged model's output, on other inputs where they are given; hidden states go to `hidden`."""
        with self.merged.watched(layers) as seen:
            made = self.merged.at(
                self.weights, self.batch.args if args is None else args, self.batch.kwargs, self.task
            )
        self._hidden.update(seen)
        return made

    @property
    def outputs(self) -> Tensor:
        """The merged model's output on the batch, computed once."""
        if self._outputs is None:
            self._outputs = self.run()
        return self._outputs

    def hidden(self, layers: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """What the layers give in the merged model and in the task's own, and the latter's output."""
        self._outputs = self.run(layers=layers)
        with self.merged.watched(layers) as seen:
            taught = self.expert
        return self._hidden, dict(seen), taught

    @property
    def expert(self) -> Tensor:
        """The output of the task's own model on the batch; no gradient."""
        if self.task is None:
            raise UsageError(
                "this loss asks a task's own model: name the tasks (tasks=…) and give data by task"
            )
        return self.merged.expert(self.merged.index(self.task), self.batch)

    @property
    def labels(self) -> Tensor:
        if self.batch.labels is None:
            place = "" if self.task is None else f" for task {self.task!r}"
            raise UsageError(
                f"this loss needs labels{place}: give (inputs, labels), or choose a loss without"
            )
        return self.batch.labels


Loss = Callable[[Shot], Tensor]
IGNORED = -100
"""The label that counts for nothing, in torch and transformers."""


def entropy(shot: Shot) -> Tensor:
    """Mean over the positions of −Σ_y p(y|x) log p(y|x)."""
    logs = shot.outputs.log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).mean()


def supervised(name: str) -> Loss:
    """A loss on the labels by name: cross_entropy, causal_lm, squared … DataError for a class that has no logit."""

    def loss(shot: Shot) -> Tensor:
        if name != "squared":
            _check_classes(shot)
        return LABELLED[name](shot.outputs, shot.labels)

    return loss


def _check_classes(shot: Shot) -> None:
    labels, classes = shot.labels, shot.outputs.shape[-1]
    place = "" if shot.task is None else f" of task {shot.task!r}"
    if labels.is_floating_point():
        raise DataError(f"the labels{place} are {labels.dtype}, not numbers of classes")
    wrong = (labels >= classes) | ((labels < 0) & (labels != IGNORED))
    if bool(wrong.any()):
        raise DataError(
            f"the labels{place} go from {int(labels.min())} to {int(labels.max())}, but the model has {classes} "
            "outputs"
        )


def distill(temperature: float = 1.0) -> Loss:
    """T² KL(softmax(z_expert / T) ‖ softmax(z / T)), mean over the positions."""
    if temperature <= 0:
        raise UsageError(f"the temperature must be above 0, not {temperature}")

    def loss(shot: Shot) -> Tensor:
        return _divergence(shot.expert, shot.outputs, temperature)

    return loss


def self_label(threshold: float = 0.0) -> Loss:
    """Cross-entropy to the class of the task's own model, where its probability is `threshold` or more."""

    def loss(shot: Shot) -> Tensor:
        sure, label = shot.expert.softmax(-1).max(-1)
        return _where_sure(shot.outputs, label, sure >= threshold)

    return loss


def align(
    layers: Sequence[str] = (), hidden: float = 1.0, logits: float = 1.0, temperature: float = 1.0
) -> Loss:
    """hidden · mean over the layers of ‖h − h_expert‖² / ‖h_expert‖² + logits · KL(expert ‖ merged)."""

    def loss(shot: Shot) -> Tensor:
        ours, theirs, taught = shot.hidden(layers)
        total = logits * _divergence(taught, shot.outputs, temperature)
        for name in layers:
            error = (ours[name] - theirs[name]).square().sum() / theirs[name].square().sum().clamp_min(1e-12)
            total = total + hidden * error / len(layers)
        return total

    return loss


def ufm(strong: Callable[[Tensor], Tensor], threshold: float = 0.99) -> Loss:
    """Cross-entropy of a strong view to a label: the batch's, where it is 0 or more (trusted), or what the merge
    says of the weak view, where its probability exceeds `threshold`; elsewhere nothing counts.

    The paper's method as it was meant; its code trusts every example (see `trusted`).
    """

    def loss(shot: Shot) -> Tensor:
        with torch.no_grad():
            sure, label = shot.outputs.softmax(-1).max(-1)
        fixed = shot.labels
        label = torch.where(fixed >= 0, fixed, label)
        seen = shot.run(tuple(strong(x) for x in shot.batch.args))
        return _where_sure(seen, label, (fixed >= 0) | (sure > threshold))

    return loss


def trusted(probabilities: Tensor, compat: bool = False) -> Tensor:
    """[n, C] → [n] labels: of each class the min(n / 10C, 100) examples most probable in it; −1 elsewhere.

    `compat=True` trusts every prediction, as the paper's released code does by a slip.
    """
    n, classes = probabilities.shape
    if compat:
        return probabilities.argmax(1)
    labels = torch.full((n,), -1, dtype=torch.int64, device=probabilities.device)
    best = torch.zeros(n, device=probabilities.device, dtype=probabilities.dtype)
    for c in range(classes):
        value, row = probabilities[:, c].topk(max(1, min(n // (10 * classes), 100)))
        surer = value > best[row]  # an example that two classes claim goes to the likelier one
        labels[row[surer]], best[row[surer]] = c, value[surer]
    return labels


def _divergence(taught: Tensor, ours: Tensor, temperature: float) -> Tensor:
    p, q = (taught / temperature).log_softmax(-1), (ours / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1).mean()


def _where_sure(outputs: Tensor, label: Tensor, sure: Tensor) -> Tensor:
    each = F.cross_entropy(outputs.flatten(0, -2), label.flatten(), reduction="none")
    return (each * sure.flatten()).sum() / sure.sum().clamp_min(1)


LOSSES: dict[str, Loss] = {
    "entropy": entropy, "distill": distill(), "self_label": self_label(),
    **{name: supervised(name) for name in LABELLED},
}  # fmt: skip


def as_loss(given: str | Loss) -> Loss:
    """By name, or a function of a `Shot`."""
    if callable(given):
        return given
    if given not in LOSSES:
        raise UsageError(
            f"there is no loss {given!r}{did_you_mean(str(given), LOSSES)}; known: {', '.join(LOSSES)}, or a "
            "function of a Shot"
        )
    return LOSSES[given]
