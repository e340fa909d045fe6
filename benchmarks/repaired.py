"""`alignment.py repair`: convolutional networks with and without BatchNorm, matched, averaged, and repaired.

Images are 16×16, as the bench's suites have them; `--nets lenet` takes the networks of a tutorial that other people
trained on CIFAR-10 (checkpoints/cifar10_lenet_wild of WEFT_DATA), and 32×32. The midpoint of two networks from
different starts is measured on test images with its running statistics averaged, measured anew, and with REPAIR, on
2 000 training images, for the networks as they are and after each matching. Networks that are trained here are kept
in the bench's cache.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations
from typing import Any

import torch
from torch import nn

import weft
from weft.analysis.network import Network
from weft.bench.cache import code, stored
from weft.bench.suites.data import data_folder, digest, images

Data = tuple[torch.Tensor, torch.Tensor]


def vgg(classes: int, width: int, norm: bool = True) -> nn.Sequential:
    """Five convolutions of widths w, 2w, 4w, 4w, 4w, four poolings, a linear head."""
    layers: list[nn.Module] = []
    into = 3
    for times, pool in ((1, True), (2, True), (4, False), (4, True), (4, True)):
        layers.append(nn.Conv2d(into, times * width, 3, padding=1, bias=not norm))
        layers += [nn.BatchNorm2d(times * width)] if norm else []
        layers += [nn.ReLU(), *([nn.MaxPool2d(2)] if pool else [])]
        into = times * width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(into, classes))


def network(kind: str, classes: int, width: int) -> nn.Module:
    from alignment import ResNet20

    if kind == "resnet20":
        made = ResNet20(width)
        made.head = nn.Linear(4 * width, classes)
        return made
    return vgg(classes, width, norm=kind == "vgg")


class LeNet(nn.Module):
    """The network of PyTorch's tutorial on CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.pool = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5), nn.MaxPool2d(2)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.conv1(x)))
        x = self.pool(torch.relu(self.conv2(x))).flatten(1)
        made: torch.Tensor = self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))
        return made


def strangers(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every pair of the networks that others trained."""
    folder, nets, rows = data_folder(), [], []
    for file in sorted((folder / "checkpoints" / "cifar10_lenet_wild").glob("*.safetensors")):
        nets.append(weft.materialize(str(file), LeNet()).eval())
    found = images(folder, "cifar10_jpeg", 32)
    train, test = found["train"], found["test"]
    for pair, (a, b) in enumerate(combinations(nets, 2)):
        rows += _pair(
            [a, b], "cifar10_jpeg", "lenet", pair, list(train[0][:2000].split(500)), train[0][2000:4000], test
        )
    return rows


def trained(kind: str, classes: int, width: int, data: Data, epochs: int, seed: int, flip: bool) -> nn.Module:
    torch.manual_seed(seed)
    net, n = network(kind, classes, width), len(data[0])
    optimiser = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, epochs * (n // 100), pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(n)[: n // 100 * 100].split(100):
            x = data[0][batch]
            if flip:
                x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(3), x)
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), data[1][batch]).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def repaired(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.nets == "lenet":
        return strangers(options)
    rows = []
    folder = data_folder()
    for name in options.data.split(","):
        found = images(folder, name)
        train, test = found["train"], found["test"]
        classes, flip = int(train[1].max()) + 1, name.startswith("cifar")
        few, inputs = (train[0][:2000].split(500)), train[0][2000:4000]
        for kind in options.nets.split(","):
            for pair in range(options.pairs):
                nets = []
                for i in (0, 1):
                    seed = 2 * pair + i
                    about = {"data": digest(folder, (name,)), "kind": kind, "width": options.width, "seed": seed,
                             "epochs": options.epochs, "code": code(trained, network, vgg)}  # fmt: skip
                    started = time.perf_counter()

                    def make(kind: str = kind, train: Data = train, seed: int = seed) -> Any:
                        made = trained(kind, classes, options.width, train, options.epochs, seed, flip)  # noqa: B023
                        return made.state_dict()

                    net = network(kind, classes, options.width)
                    net.load_state_dict(stored("repair", about, make))
                    nets.append(net.eval())
                    print(f"{name} {kind} seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
                rows += _pair(nets, name, kind, pair, list(few), inputs, test)
    return rows


def _pair(
    nets: list[nn.Module], name: str, kind: str, pair: int, few: list[torch.Tensor], inputs: torch.Tensor,
    test: Data,
) -> list[dict[str, Any]]:  # fmt: skip
    a, b = nets
    spec = weft.align.discover(a, few[0][:2])
    here = Network(a, test, norms="carry")
    ends = [here.measure(here.state(n)) for n in nets]
    level = sum(e.loss for e in ends) / 2
    told = "/".join(f"{100 * (e.error or 0):.1f}" for e in ends)
    ways: dict[str, Callable[[], Any]] = {
        "as they are": lambda: weft.load(b),
        "weights": lambda: spec.apply(b, weft.align.weight_matching(spec, a, b, tries=3)),
        "correlation": lambda: weft.align(b, to=a, how="correlation", data=[(x,) for x in inputs.split(500)]),
    }
    rows = []
    for how, move in ways.items():
        started = time.perf_counter()
        moved = move()
        spent = time.perf_counter() - started
        middle = weft.merge([a, moved], "linear")
        state = here.state(middle)
        mended = {"averaged": here.measure(state)}
        if any(isinstance(m, nn.BatchNorm2d) for m in a.modules()):
            found = weft.calibrate(middle, few, "batchnorm", module=deepcopy(a))
            mended["batchnorm"] = here.measure_module(found.module)
        found = weft.calibrate(middle, few, "repair", parents=[a, moved], module=deepcopy(a))
        mended["repair"] = here.measure_module(found.module)
        cells = []
        for after, value in mended.items():
            rows.append({"data": name, "net": kind, "pair": pair, "matched": how, "after": after, "ends": told,
                         "barrier": value.loss - level, "error": value.error, "seconds": spent})  # fmt: skip
            cells.append(f"{after} {value.loss - level:6.3f}, {100 * (value.error or 0):4.1f} %")
        print(
            f"{name} {kind} pair {pair} (ends {told}) {how:12} {'   '.join(cells)}   {spent:.1f} s",
            flush=True,
        )
    return rows
