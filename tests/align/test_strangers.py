"""Networks that four people trained, each from a start of their own: the tutorial's LeNet on CIFAR-10."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import weft
from weft.align import discover, merge_many
from weft.align.many import mean
from weft.analysis.network import Network

DATA = Path(os.environ.get("WEFT_DATA", "/nowhere"))
FILES = sorted((DATA / "checkpoints" / "cifar10_lenet_wild").glob("*.safetensors"))
pytestmark = pytest.mark.skipif(len(FILES) < 4, reason="WEFT_DATA has no such networks")


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x))).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))  # type: ignore[no-any-return]


def test_weights_of_strangers_are_put_in_one_order_and_their_mean_is_repaired() -> None:
    images = np.load(DATA / "vision" / "cifar10_jpeg.npz")
    x, seen = (
        torch.from_numpy(images[f"x_{part}"][:1000]).float().permute(0, 3, 1, 2) / 127.5 - 1
        for part in ("test", "train")
    )
    module = LeNet()
    net = Network(module, (x, torch.from_numpy(images["y_test"][:1000]).long()))
    spec = discover(module, x[:2])
    assert spec.degrees == 6 + 16 + 120 + 84

    def accuracy(*models: weft.Checkpoint) -> float:
        return 1 - net.measure(net.state(mean(models))).error  # type: ignore[operator]

    models = [weft.load(f) for f in FILES]
    assert min(map(accuracy, models)) > 0.5
    for a, b in ((models[0], models[1]), (models[2], models[3])):
        moved = weft.align(b, to=a, spec=spec)
        assert accuracy(a, moved) > accuracy(a, b) + 0.07
        mended = weft.calibrate(mean([a, moved]), [seen], "repair", parents=[a, moved], module=module)
        repaired = 1 - net.measure_module(mended.module).error  # type: ignore[operator]
        assert repaired > accuracy(a, moved) + 0.05
        assert repaired > (accuracy(a) + accuracy(b)) / 2 - 0.12
    orders = merge_many(spec, models)
    assert accuracy(*models) < 0.15 < accuracy(*map(spec.apply, models, orders))
