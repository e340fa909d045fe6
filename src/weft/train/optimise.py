"""Optimisers and learning rates by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from weft.errors import UsageError, did_you_mean

MakeOptimizer = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
Factor = Callable[[float], float]
"""Share of the run that is over, 0 to 1 → factor of the learning rate."""

SCHEDULES: dict[str, Factor] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1.0 - t,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
}


def make_optimizer(
    name: str | MakeOptimizer, parameters: list[Tensor], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """adamw, adam, sgd (momentum 0.9), or a function of the parameters that ignores `lr` and `weight_decay`."""
    if not isinstance(name, str):
        return name(parameters)
    made: dict[str, MakeOptimizer] = {
        "adamw": lambda p: torch.optim.AdamW(p, lr=lr, weight_decay=weight_decay),
        "adam": lambda p: torch.optim.Adam(p, lr=lr, weight_decay=weight_decay),
        "sgd": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9, weight_decay=weight_decay),
    }
    if name not in made:
        raise UsageError(
            f"there is no optimizer {name!r}{did_you_mean(name, made)}; known: {', '.join(made)}"
        )
    if not (math.isfinite(lr) and lr >= 0):
        raise UsageError(f"lr must be a number from 0 up, not {lr}")
    return made[name](parameters)


def make_schedule(
    optimizer: torch.optim.Optimizer, name: str | Factor, warmup: int, steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rises linearly over `warmup` steps, then follows the schedule to the end."""
    if isinstance(name, str):
        if name not in SCHEDULES:
            raise UsageError(
                f"there is no schedule {name!r}{did_you_mean(name, SCHEDULES)}; known: {', '.join(SCHEDULES)}"
            )
        name = SCHEDULES[name]
    if not 0 <= warmup <= steps:
        raise UsageError(f"warmup must be 0 to {steps} steps, not {warmup}")
    after = name

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return after(min(1.0, (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
