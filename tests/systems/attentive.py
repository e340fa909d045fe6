"""A transformer small enough to train in seconds: the rows of a digit are its eight tokens."""

from __future__ import annotations

from functools import cache

import torch
from lab import FEW, UPRIGHT, Data, joined
from torch import Tensor, nn

from weft.demo.tasks import TASKS, examples
from weft.train.loop import finetune


class RowNet(nn.Module):
    """[n, 64] pixels → 8 rows as tokens, two blocks of width 48, mean over tokens, `head` to [n, 10]."""

    def __init__(self, seed: int, width: int = 48) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, width)
        self.place = nn.Parameter(0.5 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.unflatten(-1, (8, 8))) + self.place
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


@cache
def pretrained_rownet(seed: int, epochs: int = 15) -> nn.Module:
    """Trained as the demo's base is: upright digits and a few of every task. One a seed, not to be changed."""
    few: list[Data] = [tuple(v[:FEW] for v in examples(t, "pretrain")) for t in TASKS]  # type: ignore[misc]
    data = joined([examples(UPRIGHT, "pretrain"), *few])
    made = finetune(RowNet(seed), data, epochs=epochs, batch=50, lr=2e-3, seed=seed)
    net = RowNet(seed)
    net.load_state_dict(made.model.weights())
    return net.eval()
