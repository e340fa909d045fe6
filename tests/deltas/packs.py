"""Small fine-tunes and their base as state dicts, and a pack of them read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weft
from weft.deltas.node import Delta

Model = dict[str, Tensor]


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32) -> Model:
    g = torch.Generator().manual_seed(seed)
    return {
        "layers.0.weight": (torch.randn(48, 40, generator=g) * 0.1).to(dtype),
        "layers.1.weight": (torch.randn(24, 3, 3, 3, generator=g) * 0.1).to(dtype),
        "experts.weight": (torch.randn(3, 16, 20, generator=g) * 0.1).to(dtype),
        "norm.weight": torch.ones(48, dtype=dtype),
        "steps": torch.tensor([3, 5]),
    }


def tuned(base: Model, seed: int = 1, size: float = 0.01) -> Model:
    g = torch.Generator().manual_seed(seed)
    return {
        n: (t.double() + size * torch.randn(t.shape, generator=g, dtype=torch.float64)).to(t.dtype)
        if t.is_floating_point() else t.clone()
        for n, t in base.items()
    }  # fmt: skip


def packed(model: object, base: object, folder: Path, **settings: Any) -> Delta:
    """The delta after a trip through files."""
    weft.save(weft.pack_delta(model, base, **settings), folder)
    found = weft.load(folder, base=base)
    assert isinstance(found, Delta)
    return found


def lost(delta: Delta, model: Model, base: Model, name: str) -> float:
    """‖θ̂ − θ‖ / ‖θ − θ0‖"""
    tau = model[name].double() - base[name].double()
    return float((delta.tensor(name).double() - model[name].double()).norm() / tau.norm())
