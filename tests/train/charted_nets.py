"""Small networks for the tests of fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]


class Attentive(nn.Module):
    """[n, t, 5] → [n, 3]: two blocks of torch's own transformer, dropout included."""

    def __init__(self, norm_first: bool = True, activation: str = "gelu") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 16)
        layer = nn.TransformerEncoderLayer(
            16, 4, 32, batch_first=True, activation=activation, norm_first=norm_first
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        made: Tensor = self.head(self.blocks(self.embed(x), src_key_padding_mask=hidden).mean(1))
        return made


class Convolved(nn.Module):
    """[n, 2, 6, 6] → [n, 3]: convolutions, BatchNorm, pooling."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(2),
            nn.Conv2d(6, 8, 3), nn.GroupNorm(1, 8), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3),
        )  # fmt: skip
        self.body[1].running_mean.normal_()
        self.body[1].running_var.uniform_(0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.body(x)
        return made


def perceptron(seed: int = 0, width: int = 24) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3)
    )


def moved(model: nn.Module, size: float, seed: int = 1) -> nn.Module:
    """The model with its parameters moved at random, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model
