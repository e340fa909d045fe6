"""Small adapters trained by peft, for the acceptance tests of systems that combine adapters."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.adapters.factors import Adapter, as_adapter
from weft.checkpoints.adapted import Adapted
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict

Data = tuple[Tensor, Tensor]
LAYERS = ["layers.0", "layers.1", "layers.2"]


def lora_config(targets: Sequence[str], r: int = 8, **more: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(r=r, lora_alpha=r, target_modules=list(targets), **more)


def ia3_config(targets: Sequence[str]) -> Any:
    """Vectors on the outputs of the targets."""
    from peft import IA3Config

    return IA3Config(target_modules=list(targets), feedforward_modules=[])


def trained_adapter(
    base: nn.Module,
    config: Any,
    batch: Callable[[torch.Generator], Data],
    folder: Path,
    *,
    steps: int = 150,
    rate: float = 3e-3,
    seed: int = 0,
    init: int = 0,
) -> Adapter:
    """An adapter over `base` fitted to `batch(generator)`, written and read back. `init` seeds its start."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(init)
        model = get_peft_model(copy.deepcopy(base), config)
        model.train()
        generator = torch.Generator().manual_seed(seed)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
        for _ in range(steps):
            x, y = batch(generator)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
        model.save_pretrained(str(folder))
    return as_adapter(folder)


def drawn(data: Data, size: int = 50) -> Callable[[torch.Generator], Data]:
    """Batches drawn from a data set."""
    x, y = data

    def batch(generator: torch.Generator) -> Data:
        i = torch.randint(len(x), (size,), generator=generator)
        return x[i], y[i]

    return batch


def over(base: nn.Module, adapter: Adapter | Checkpoint) -> Checkpoint:
    """The base with an adapter over it."""
    return Adapted(StateDict(base), as_adapter(adapter).lora)
