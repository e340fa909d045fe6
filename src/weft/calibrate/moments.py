"""Mean and variance of every channel at some layers, exact over the data however they are cut into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.network import Site, hooked, rows
from weft.errors import DataError
from weft.statistics.batches import Batch, Forward, outputs_of
from weft.statistics.observe import slow_attention


class Moments:
    """n, mean and Σ (x − mean)² by channel, float64; batches are joined as by Chan et al. (1979)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = torch.zeros(())
        self.squares = torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Rows x [n, channels]."""
        x = x.double()
        n, mean = len(x), x.mean(0)
        squares = (x - mean).square().sum(0)
        if self.n == 0:
            self.n, self.mean, self.squares = n, mean, squares
        elif n:
            gap, whole = mean - self.mean, self.n + n
            self.mean = self.mean + gap * (n / whole)
            self.squares = self.squares + squares + gap.square() * (self.n * n / whole)
            self.n = whole

    @property
    def var(self) -> Tensor:
        """Σ (x − mean)² / n."""
        return self.squares / self.n

    @property
    def std(self) -> Tensor:
        return self.var.sqrt()

    @property
    def unbiased(self) -> Tensor:
        """Σ (x − mean)² / (n − 1), as BatchNorm keeps it."""
        return self.squares / max(1, self.n - 1)


class _Reached(Exception):
    """Everything that was asked for has been seen: the rest of the network need not run."""


def measured(
    net: nn.Module, data: Sequence[Batch], where: Sequence[Site], forward: Forward | None = None
) -> dict[str, Moments]:
    """Moments at sites: of a BatchNorm's input, of every other layer's output. One pass, no further than needed.

    DataError naming the layer where a value is not finite.
    """
    found = {s.name: Moments() for s in where}
    left = dict[str, int]()

    def see(site: Site, value: Tensor, masks: Sequence[Tensor]) -> None:
        if not bool(value.isfinite().all()):
            side = "input" if site.kind == "batchnorm" else "output"
            raise DataError(
                f"the {side} of {site.name} is NaN or infinite for these data: look at the weights before it, "
                "and at running variances, which task arithmetic can make negative (how='batchnorm')"
            )
        found[site.name].add(rows(value, site.axis, masks))
        left[site.name] -= 1
        if not any(n > 0 for n in left.values()):
            raise _Reached

    def handle(site: Site, masks: Sequence[Tensor]) -> Any:
        m = net.get_submodule(site.name)
        if site.kind == "batchnorm":
            return m.register_forward_pre_hook(lambda m, args: see(site, args[0], masks))
        return m.register_forward_hook(lambda m, args, y: see(site, y, masks))

    for batch in data:
        left.update({s.name: s.calls for s in where})
        seen = hooked(handle(s, batch.masks) for s in where)
        with seen, torch.no_grad(), slow_attention(), suppress(_Reached):
            outputs_of(net, batch, forward)
    return found


def mixed(
    each: Sequence[Mapping[str, Moments]], weights: Sequence[float], name: str
) -> tuple[Tensor, Tensor]:
    """Σ w μ and Σ w σ (of standard deviations, not of variances) at one layer."""
    mean = sum((w * m[name].mean for w, m in zip(weights, each, strict=True)), torch.zeros(()))
    std = sum((w * m[name].std for w, m in zip(weights, each, strict=True)), torch.zeros(()))
    return mean, std
