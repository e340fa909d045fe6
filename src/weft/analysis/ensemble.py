"""The output ensemble, what merging is measured against: several models run side by side, their outputs mixed.

    probabilities   p(x) = Σ wᵢ softmax(fᵢ(x)/T)             logits      f(x) = Σ wᵢ fᵢ(x)
    geometric       p(x) ∝ exp Σ wᵢ log softmax(fᵢ(x)/T)      confident   the model with the largest probability

It costs as many runs as there are models. Its gap to the average of the weights is what averaging loses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from weft.analysis.finding import Finding, figure, graphs
from weft.analysis.network import Network
from weft.analysis.space import affine
from weft.api import Model
from weft.errors import UsageError, did_you_mean

Mixing = Literal["probabilities", "logits", "geometric", "confident"]


def mixed_outputs(
    logits: Sequence[Tensor] | Tensor,
    how: Mixing = "probabilities",
    weights: Sequence[float] | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Outputs [..., C] of the ensemble of logits [k, ..., C]: log-probabilities, for `logits` mixed logits.

    `weights` are 1/k by default and must add up to 1. Raises UsageError for weights that do not, or an unknown way.
    """
    if how not in get_args(Mixing):
        raise UsageError(
            f"outputs are mixed by {', '.join(get_args(Mixing))}, not {how!r}{did_you_mean(how, get_args(Mixing))}"
        )
    stack = logits if isinstance(logits, Tensor) else torch.stack(list(logits))
    w = torch.full((len(stack),), 1.0 / len(stack)) if weights is None else torch.tensor(list(weights))
    if len(w) != len(stack) or abs(float(w.sum()) - 1) > 1e-5 or bool((w < 0).any()):
        raise UsageError(f"the ensemble of {len(stack)} models needs as many weights ≥ 0 that add up to 1")
    if temperature <= 0:
        raise UsageError(f"the temperature must be positive, not {temperature}")
    w = w.to(stack.device, stack.dtype).reshape(-1, *[1] * (stack.dim() - 1))
    if how == "logits":
        return (w * stack).sum(0)
    logp = (stack / temperature).log_softmax(-1)
    if how == "probabilities":
        return torch.logsumexp(logp + w.log(), 0)
    if how == "geometric":
        return (w * logp).sum(0).log_softmax(-1)
    sure = logp.amax(-1).argmax(0)
    return logp.gather(0, sure[None, ..., None].expand(1, *logp.shape[1:]))[0]


class Ensemble(nn.Module):
    """Models run side by side as one module; arguments are passed to each."""

    def __init__(
        self, models: Sequence[nn.Module], how: Mixing = "probabilities",
        weights: Sequence[float] | None = None, temperature: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if not models:
            raise UsageError("an ensemble needs at least one model")
        mixed_outputs(torch.zeros(len(models), 1, 2), how, weights, temperature)
        self.models = nn.ModuleList(models)
        self.how, self.weights, self.temperature = how, weights, temperature

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return mixed_outputs(
            [m(*args, **kwargs) for m in self.models], self.how, self.weights, self.temperature
        )


@dataclass(frozen=True)
class EnsembleGap(Finding):
    """Losses and errors of every model, of the average of their weights, and of the ensembles."""

    names: tuple[str, ...]
    """The models, then `weight average`, then the ways of mixing outputs."""
    losses: tuple[float, ...]
    errors: tuple[float | None, ...]
    count: int
    """How many of them are single models."""

    about: ClassVar[str] = (
        "The average of the weights against the ensemble of outputs. Where the models lie in one basin the two "
        "agree to second order in the distance between the weights (arXiv:2205.09739)."
    )

    @property
    def title(self) -> str:
        return "Ensemble and average"

    @property
    def gap(self) -> float:
        """Loss of the average less that of the ensemble of probabilities: what averaging costs."""
        return self.losses[self.count] - self.losses[self.count + 1]

    @property
    def headline(self) -> str:
        told = f"the average has loss {self.losses[self.count]:.4g}, {self.gap:+.4g} against the ensemble"
        average, ensemble = self.errors[self.count], self.errors[self.count + 1]
        if average is None or ensemble is None:
            return told
        return f"{told}; error rate {100 * average:.2f} % against {100 * ensemble:.2f} %"

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"gap": self.gap}

    def plot(self) -> Any:
        known = all(e is not None for e in self.errors)
        made = figure("", "error rate" if known else "loss")
        colours = ["#9fb6de"] * self.count + ["#d9602b"] + ["#2a9d5c"] * (len(self.names) - self.count - 1)
        made.add_trace(graphs().Bar(
            x=self.names, y=self.errors if known else self.losses, marker_color=colours, customdata=self.losses,
            hovertemplate="%{x}: %{y:.4f}, loss %{customdata:.4g}<extra></extra>",
        ))  # fmt: skip
        made.update_xaxes(type="category")
        return made


def ensemble_gap(
    net: Network,
    models: Sequence[Model],
    *,
    ways: Sequence[Mixing] = ("probabilities", "logits"),
    names: Sequence[str] | None = None,
) -> EnsembleGap:
    """Measure models, the average of their weights and their ensembles on the data of the network.

    The losses of ensembles are taken of log-probabilities, so the loss must be one of classification. Raises
    UsageError for fewer than two models.
    """
    if len(models) < 2:
        raise UsageError("an ensemble needs at least two models")
    ways = ("probabilities", *(w for w in ways if w != "probabilities"))
    states = net.states(models)
    average = net.settled(affine([1.0 / len(states)] * len(states), states))
    found = [net.measure(s) for s in (*states, average)]
    ensembles = [net.measure_module(Ensemble([net.place(s) for s in states], how)) for how in ways]
    labels = tuple(names) if names is not None else tuple(f"model {i}" for i in range(len(models)))
    every = [*found, *ensembles]
    return EnsembleGap(
        (*labels, "weight average", *(f"ensemble: {w}" for w in ways)), tuple(m.loss for m in every),
        tuple(m.error for m in every), len(models),
    )  # fmt: skip
