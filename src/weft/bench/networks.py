"""Small networks that the suites train: a vision transformer, a ResNet with BatchNorm, a text encoder, a GPT.

Linear layers stand alone (q, k, v apart), as methods that look at matrices want them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm transformer block: x + A(N(x)), then x + M(N(x)); [b, t, d] → [b, t, d]."""

    def __init__(self, width: int, heads: int, ratio: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, ratio * width), nn.Linear(ratio * width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask` [b, t] says which positions may be looked at."""
        b, t, d = x.shape
        n = self.norm1(x)
        q, k, v = (f(n).reshape(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = None if mask is None else mask[:, None, None, :]
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=self.causal)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, d))
        made: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return made


def blocks(depth: int, width: int, heads: int, ratio: int, causal: bool = False) -> nn.ModuleList:
    return nn.ModuleList(Block(width, heads, ratio, causal) for _ in range(depth))


class ViT(nn.Module):
    """Images [n, 3, side, side] → logits [n, classes]: two convolutions that halve the sides, blocks, mean, head.

    A convolutional stem instead of plain patches: small data teach it in a tenth of the steps.
    """

    def __init__(
        self,
        classes: int,
        *,
        side: int = 16,
        width: int = 144,
        depth: int = 2,
        heads: int = 4,
        ratio: int = 2,
    ) -> None:
        super().__init__()
        self.stem1 = nn.Conv2d(3, width // 3, 3, 2, 1)
        self.stem2 = nn.Conv2d(width // 3, width, 3, 2, 1)
        self.position = nn.Parameter(0.02 * torch.randn((side // 4) ** 2, width))
        self.blocks = blocks(depth, width, heads, ratio)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem2(F.gelu(self.stem1(x)))
        x = x.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
