"""Small networks of every kind that symmetries are found in, with weights of which every one matters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and running statistics moved off their initial values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for t in module.state_dict().values():
            if t.is_floating_point():
                t.add_(0.2 * torch.randn(t.shape, generator=generator, dtype=torch.float64))
        for name, t in module.named_buffers():
            if name.endswith("running_var"):
                t.abs_().add_(0.3)
    return module.eval()


class Residual(nn.Module):
    """Two convolutions beside a shortcut, as in ResNet (ResNeXt where `groups` > 1)."""

    def __init__(self, narrow: int, wide: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(wide)
        self.conv2 = nn.Conv2d(wide, wide, 3, 1, 1, groups=groups, bias=False)
        self.bn2 = nn.BatchNorm2d(wide)
        self.short: nn.Module = nn.Identity()
        if narrow != wide or stride != 1:
            self.short = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.short(x))


class ResNet(nn.Module):
    """The three stages of the ResNets for CIFAR-10."""

    def __init__(self, width: int = 8, blocks: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        now = width
        for stage in range(3):
            for i in range(blocks):
                stages.append(Residual(now, width << stage, 2 if stage and not i else 1, groups))
                now = width << stage
        self.blocks = nn.Sequential(*stages)
        self.fc = nn.Linear(now, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class Joined(nn.Module):
    """A layer that reads two others side by side, as in DenseNet and U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.c, self.f = nn.Conv2d(10, 5, 1), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.f(self.c(torch.cat([x, F.relu(self.b(x))], 1)).mean((2, 3)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """torch's own transformer layers, whose q, k and v are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, activation="gelu")
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids)).mean(1))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """An autoencoder of one matrix, used both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b, self.c = (nn.Parameter(torch.zeros(s)) for s in ((7, 5), (7,), (5,)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w.T + self.b) @ self.w + self.c


class Recurrent(nn.Module):
    """A group along both axes of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for _ in range(3):
            h = torch.tanh(self.again(h) + self.enter(x))
        return self.leave(h)  # type: ignore[no-any-return]


class Shuffled(nn.Module):
    """Channels that become positions and the reverse, a normed weight, gates in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.gates, self.leave = nn.GRUCell(8, 5), nn.utils.parametrizations.weight_norm(nn.Linear(5, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pixel_unshuffle(F.relu(F.pixel_shuffle(self.a(x), 2)), 2)
        x = F.relu(self.b(x)).mean((2, 3))
        h = torch.zeros(len(x), 5, dtype=x.dtype)
        for _ in range(2):
            h = self.gates(x, h)
        return self.head(torch.tanh(self.leave(h)))  # type: ignore[no-any-return]


def mlp(widths: tuple[int, ...] = (6, 8, 8, 3), seed: int | None = None) -> nn.Sequential:
    if seed is not None:
        torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def vgg() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(12 * 4, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 10),
    )  # fmt: skip


def mobile() -> nn.Sequential:
    """Depthwise and grouped convolutions, GroupNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 12, 1), nn.GroupNorm(3, 12), nn.SiLU(), nn.Conv2d(12, 6, 3, groups=3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


IMAGE = torch.linspace(-2, 2, 2 * 3 * 8 * 8, dtype=torch.float64).sin().reshape(2, 3, 8, 8)


@dataclass(frozen=True)
class Kind:
    """A network, an input, and how many units of it may change places."""

    make: Callable[[], nn.Module]
    inputs: Any
    degrees: int


KINDS: dict[str, Kind] = {
    "mlp": Kind(mlp, torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6), 16),
    "vgg": Kind(vgg, IMAGE, 8 + 12 + 20),
    "resnet": Kind(ResNet, IMAGE, 2 * (8 + 16 + 32)),
    # a grouped convolution has its groups, and channels within each on both sides of it; the first stage's
    # residual stream is the stem's
    "resnext": Kind(lambda: ResNet(groups=4), IMAGE, 3 * 4 + 2 * (8 + 16 + 32)),
    "mobile": Kind(mobile, IMAGE, 8 + 3 + 12 + 6),
    "joined": Kind(Joined, IMAGE, 4 + 6 + 5),
    "encoder": Kind(Encoder, torch.arange(8).reshape(2, 4), 12 + 2 * (3 + 12 + 12 + 20)),
    "tied": Kind(Tied, torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(2, 5), 7),
    "shuffled": Kind(Shuffled, IMAGE, 4 + 8 + 5 + 6),
    "recurrent": Kind(Recurrent, torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(2, 4), 6),
}


def made(kind: str) -> nn.Module:
    """In float64, so that nothing but a wrong symmetry changes what it computes."""
    torch.manual_seed(0)
    return shaken(KINDS[kind].make().double())
