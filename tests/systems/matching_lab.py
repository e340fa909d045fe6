"""Networks trained from different starts on scikit-learn's digits, for tests of matching and transport."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn

import weft

Data = tuple[Tensor, Tensor]


@lru_cache
def digits() -> tuple[Data, Data]:
    """1200 images [n, 64] to train with and 597 to test with, with labels."""
    bundled = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(bundled.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bundled.data / 16, dtype=torch.float32)[order], torch.tensor(bundled.target)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def only(data: Data, classes: Sequence[int]) -> Data:
    """The examples of some classes."""
    kept = torch.isin(data[1], torch.tensor(classes))
    return data[0][kept], data[1][kept]


def mlp(*widths: int) -> nn.Module:
    """64 inputs, hidden layers of these widths, 10 outputs."""
    sizes = [64, *widths, 10]
    layers: list[nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fitted(
    net: nn.Module, seed: int, data: Data | None = None, *, epochs: int = 12, rate: float = 3e-3, decay: float = 0.0
) -> nn.Module:  # fmt: skip
    """A network trained by AdamW; in place."""
    x, y = digits()[0] if data is None else data
    generator = torch.Generator().manual_seed(seed)
    net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(list(net.parameters()), lr=rate, weight_decay=decay)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).split(100):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval().requires_grad_(False)


@lru_cache
def trained(seed: int, *widths: int) -> nn.Module:
    """An MLP of its own start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fitted(mlp(*widths), seed)


def accuracy(
    model: object, like: nn.Module, data: Data | None = None, classes: Sequence[int] = range(10)
) -> float:
    """Of a model's weights in a network like this one, on the test images, choosing among some classes."""
    x, y = digits()[1] if data is None else data
    net, among = weft.materialize(model, deepcopy(like)).eval(), torch.tensor(list(classes))  # type: ignore[arg-type]
    with torch.inference_mode():
        return float((among[net(x)[:, among].argmax(1)] == y).double().mean())


def unlabelled(n: int = 600) -> list[tuple[Tensor]]:
    """Training images without labels, in two batches."""
    x = digits()[0][0][:n]
    return [(x[: n // 2],), (x[n // 2 :],)]


class Reader(nn.Module):
    """A transformer of one block that reads a digit row by row: two heads, a residual stream, norms."""

    def __init__(self, width: int = 24, heads: int = 2, hidden: int = 32) -> None:
        super().__init__()
        self.heads = heads
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width) * 0.3)
        self.norm1, self.norm2, self.last = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.head = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            nn.Linear(width, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x.unflatten(-1, (8, 8))) + self.place
        z = self.norm1(h)
        q, k, v = (m(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        h = h + self.o(mixed.transpose(1, 2).flatten(2))
        h = h + self.down(torch.relu(self.up(self.norm2(h))))
        return self.head(self.last(h).mean(1))


@lru_cache
def reader(seed: int, width: int = 24, hidden: int = 32, epochs: int = 15) -> nn.Module:
    """A transformer of its own start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return fitted(Reader(width, 2, hidden), seed, epochs=epochs, rate=5e-3)
