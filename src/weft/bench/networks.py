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


class Residual(nn.Module):
    """relu(s(x) + B(C(relu(B(C(x)))))): C 3×3 convolutions, B BatchNorm, s 1×1 where shapes change."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (
            nn.Conv2d(into, out, 3, stride, 1, bias=False),
            nn.Conv2d(out, out, 3, 1, 1, bias=False),
        )
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False) if into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(self.skip(x) + y)


class ResNet(nn.Module):
    """Images [n, 3, side, side] → logits [n, classes]: three stages of one residual block, mean, head."""

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            Residual(width, width, 1), Residual(width, 2 * width, 2), Residual(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm(self.stem(x))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class Encoder(nn.Module):
    """Tokens [n, t], 0 for padding → logits [n, classes]: embeddings, blocks, mean over the tokens, head."""

    def __init__(
        self, classes: int, *, vocabulary: int = 2048, length: int = 24, width: int = 96, depth: int = 2,
        heads: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = blocks(depth, width, heads, 2)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        there = tokens != 0
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, there)
        weight = there[..., None].to(x.dtype)
        logits: Tensor = self.head((self.norm(x) * weight).sum(1) / weight.sum(1).clamp_min(1))
        return logits


class GPT(nn.Module):
    """Bytes [n, t] → logits of the next [n, t, 256]."""

    def __init__(
        self, classes: int = 256, *, length: int = 64, width: int = 96, depth: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, width)
        self.position = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = blocks(depth, width, heads, 2, causal=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
