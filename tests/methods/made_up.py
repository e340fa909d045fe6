"""Made-up statistics for tests of methods that need some: of the right shapes, and different for every model."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.methods.kinds import ELEMENTWISE, Need


def _squares(k: int, blocks: tuple[int, ...], d: int, seed: int) -> Tensor:
    r = torch.randn(k, *blocks, d + 3, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return r.transpose(-1, -2) @ r / (d + 3)


def made_up(needs: tuple[Need, ...], x: Tensor, seed: int = 5) -> dict[str, Tensor | None]:
    """Statistics by keyword for a stack x [k, *shape]; None for what such a tensor would not have."""
    k, shape = x.shape[0], tuple(x.shape[1:])
    matrix = len(shape) > 1 and x.numel() > 0
    g = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor | None] = {}
    for need in needs:
        value: Tensor | None = None
        width = x[0].numel() // shape[0] if matrix else 0
        if need.samples:
            value = torch.arange(1, k + 1).double() * 10
        elif need.kind in ELEMENTWISE:
            value = torch.rand(k, *shape, generator=g, dtype=torch.float64)
        elif matrix and need.kind == "node":
            value = torch.rand(k, shape[0], generator=g, dtype=torch.float64)
        elif matrix and need.kind in ("gram", "kfac_a"):
            value = _squares(k, (), width, seed)
        elif matrix and need.kind in ("kfac_g", "cov"):
            value = _squares(k, (), shape[0], seed + 1)
        elif matrix and need.kind in ("mean", "abs_mean"):
            value = torch.rand(k, width, generator=g, dtype=torch.float64)
        found[need.source] = value[0] if value is not None and need.of_base else value
    return found
