"""Modules whose losses are known in closed form, and small networks trained on scikit-learn's digits."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from weft.analysis.network import Network

F64 = torch.float64


class Potential(nn.Module):
    """A point in space; its output is a function of it, whatever the input."""

    def __init__(self, function, start) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.point = nn.Parameter(torch.as_tensor(start, dtype=F64))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.function(self.point)
        return value.expand(len(x))


def potential(function, dimension: int = 2) -> Network:  # type: ignore[no-untyped-def]
    """A network whose loss is `function` of its one parameter, `point`."""
    module = Potential(function, torch.zeros(dimension, dtype=F64))
    data = torch.zeros(3, 1, dtype=F64), torch.zeros(3, dtype=F64)
    return Network(module, data, loss=lambda out, _: out.mean())


def point(*values: float) -> dict[str, Tensor]:
    return {"point": torch.tensor(values, dtype=F64)}


class Mlp(nn.Module):
    """Linear layers with ReLU between, or BatchNorm and ReLU."""

    def __init__(self, sizes: tuple[int, ...], seed: int, norm: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(o) for o in sizes[1:-1]) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i + 1 < len(self.layers):
                x = self.norms[i](x) if self.norms is not None else x
                x = x.relu()
        return x


@cache
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train, test) of scikit-learn's digits, inputs [n, 64]."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x = torch.from_numpy(bunch.data).float() / 8 - 1
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1200], order[1200:]
    return (x[train], y[train]), (x[test], y[test])


def fit(
    net: nn.Module, data: tuple[Tensor, Tensor], *, epochs: int = 12, rate: float = 2e-3, seed: int = 0
) -> nn.Module:
    """Adam; in place."""
    x, y = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=rate)
    net.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


@cache
def trained(seed: int, width: int = 48, norm: bool = False) -> nn.Module:
    """An MLP of two hidden layers, trained from its own initialisation."""
    return fit(Mlp((64, width, width, 10), seed, norm), digits()[0], seed=seed)
