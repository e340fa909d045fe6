"""Damaged images: what a model meets outside of its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

SEED = 11


def noise(x: Tensor) -> Tensor:
    """Gaussian noise of a deviation of 0.4, the range being [-1, 1]."""
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(SEED))
    return (x + 0.4 * drawn).clamp(-1, 1)


def blur(x: Tensor) -> Tensor:
    """The mean of 3×3 pixels."""
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)


def contrast(x: Tensor) -> Tensor:
    """A third of the contrast around each image's mean."""
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) / 3


DAMAGES: Mapping[str, Callable[[Tensor], Tensor]] = {"noise": noise, "blur": blur, "contrast": contrast}


def damaged(x: Tensor, how: str) -> Tensor:
    """Images [n, c, h, w] in [-1, 1], damaged."""
    return DAMAGES[how](x)
