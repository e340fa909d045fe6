"""What hooks see of a run, whoever runs it: weft's loop, the Trainer of transformers, or Lightning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.train.model import Charted


@dataclass
class State:
    """A run as it stands. `parameters` are live: a hook may change them, or their `.grad`, in place."""

    step: int
    """Optimiser steps done."""
    steps: int | None
    """Steps that there will be, where that is known."""
    epoch: float
    loss: float
    parameters: Mapping[str, Tensor]
    """φ by name; with plain fine-tuning θ itself."""
    start: Mapping[str, Tensor]
    """φ0."""
    optimizer: torch.optim.Optimizer | None
    model: nn.Module
    stop: bool = False
    """A hook that sets this ends the run after this step."""

    def weights(self) -> dict[str, Tensor]:
        """The network's whole state, copied: later steps do not change it."""
        if isinstance(self.model, Charted):
            return self.model.weights()
        return {n: t.detach().clone() for n, t in self.model.state_dict().items()}


Hook = Callable[[State], Any]
Hooks = Hook | Sequence[Hook]


def as_hooks(hooks: Hooks) -> tuple[Hook, ...]:
    """One hook or several, as several."""
    return (hooks,) if callable(hooks) else tuple(hooks)


def call(hooks: Sequence[Hook], state: State) -> list[Any]:
    """What each hook returns, in order; nothing is recorded for gradients."""
    with torch.no_grad():
        return [hook(state) for hook in hooks]
