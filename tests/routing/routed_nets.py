"""Small networks with what real ones have: attention in one call, convolutions, BatchNorm, tied tables."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn


class Mlp(nn.Module):
    """Two linear maps with GELU between, and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class Perceptron(nn.Module):
    """[B, 6] → [B, 4]."""

    def __init__(self, width: int = 8, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Mlp(width) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Reader(nn.Module):
    """Token ids [B, L] → [B, L, 11]: a table, attention, an MLP, and a head tied to the table."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, width))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(x + self.mlp(x))
        return out


class Conv(nn.Module):
    """Images [B, 2, 6, 6] → [B, 3], with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        out: Tensor = self.head(self.second(x).mean((2, 3)))
        return out


def family(
    kind: type[nn.Module], count: int = 3, seed: int = 0, step: float = 0.3
) -> tuple[nn.Module, list[nn.Module]]:
    """A base and experts a random step away, running statistics included."""
    torch.manual_seed(seed)
    base = kind().eval().requires_grad_(False)
    experts = []
    for i in range(count):
        generator = torch.Generator().manual_seed(100 * seed + i + 1)
        made = deepcopy(base)
        for p in made.parameters():
            p.add_(step * torch.randn(p.shape, generator=generator))
        for name, b in made.named_buffers():
            if name.endswith("running_var"):
                b.add_(torch.rand(b.shape, generator=generator))
            elif name.endswith("running_mean"):
                b.add_(torch.randn(b.shape, generator=generator))
        experts.append(made)
    return base, experts


def inputs(kind: type[nn.Module], size: int = 7, seed: int = 5) -> Tensor:
    """A batch for one of them."""
    generator = torch.Generator().manual_seed(seed)
    if kind is Reader:
        return torch.randint(0, 11, (size, 5), generator=generator)
    shape = (size, 2, 6, 6) if kind is Conv else (size, 6)
    return torch.randn(shape, generator=generator)
