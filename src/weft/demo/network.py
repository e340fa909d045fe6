"""The demo's network: a multilayer perceptron small enough to ship seven times over."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor, nn

from weft.demo.tasks import CLASSES, SIDE

WIDTH = 256


class DigitNet(nn.Module):
    """64 → 256 → 256 → 256 → 10 with GELU between: pixels [n, 64] to logits [n, 10].

    `head` is trained with the base and frozen afterwards, as classifiers are in the merging literature:
    the experts disagree about features only.
    """

    def __init__(self, generator: torch.Generator | None = None) -> None:
        super().__init__()
        sizes = (SIDE * SIDE, WIDTH, WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.head = nn.Linear(WIDTH, CLASSES)
        for module in (*self.layers, self.head):
            assert isinstance(module, nn.Linear)
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
            nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.gelu(layer(x))
        logits: Tensor = self.head(x)
        return logits


def network(state: Mapping[str, Tensor]) -> DigitNet:
    """The network with these weights, in float32 whatever they are stored as."""
    net = DigitNet()
    net.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return net.eval().requires_grad_(False)
