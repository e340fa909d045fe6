"""Networks of a few parameters, experts of them, and a dense float64 reference of what a merge is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


class Small(nn.Module):
    """A matrix, a convolution, vectors: [n, 2, 6] to [n, 3]."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, dtype=dtype)
        self.layers = nn.ModuleList(nn.Linear(16, 16, dtype=dtype) for _ in range(2))
        self.head = nn.Linear(16, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x)).flatten(1)
        for layer in self.layers:
            h = torch.tanh(layer(h))
        out: Tensor = self.head(h)
        return out


def near(net: nn.Module, seed: int, size: float = 0.3) -> nn.Module:
    """The network moved by noise: an expert."""
    made = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in made.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
    return made


def family(k: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Small, list[nn.Module]]:
    """A base and experts."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        base = Small(dtype)
    return base, [near(base, i + 1) for i in range(k)]


def inputs(n: int = 12, seed: int = 9, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 6, generator=generator, dtype=torch.float64).to(dtype)


def labels(n: int = 12, seed: int = 10) -> Tensor:
    return torch.randint(3, (n,), generator=torch.Generator().manual_seed(seed))


def dense(base: nn.Module | None, models: list[nn.Module], full: dict[str, list[Tensor]]) -> State:
    """θ0 + Σ Cᵢ ⊙ (θᵢ − θ0), with a coefficient for every entry written out."""
    states = [m.state_dict() for m in models]
    start = {n: torch.zeros_like(t) for n, t in states[0].items()} if base is None else base.state_dict()
    return {
        n: s + sum(c * (m[n] - s) for c, m in zip(full[n], states, strict=True)) for n, s in start.items()
    }
