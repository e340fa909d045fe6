"""`alignment.py zip` and `alignment.py fusion`: networks of other labels, and of other widths, made into one."""

from __future__ import annotations

import argparse
import time
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

import weft

Data = tuple[Tensor, Tensor]
TASKS = (range(5), range(5, 10))


def accuracy(model: Any, like: nn.Module, data: Data, classes: range = range(10)) -> float:
    """Of the images of these classes, told apart among these classes."""
    mine = (data[1] >= classes.start) & (data[1] < classes.stop)
    net = weft.materialize(model, deepcopy(like)).eval()
    with torch.no_grad():
        found = torch.cat([net(x)[:, classes.start : classes.stop] for x in data[0][mine].split(2000)])
    return float((found.argmax(1) + classes.start == data[1][mine]).double().mean())


def part(data: Data, classes: range) -> Data:
    mine = (data[1] >= classes.start) & (data[1] < classes.stop)
    return data[0][mine], data[1][mine]


def zipped(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two networks of disjoint labels and other starts, one trunk, a classifier each."""
    from alignment import images, trained

    rows = []
    for name in options.data.split(","):
        train, test = images(name)
        few = [(x,) for x in train[0][:4000].split(500)]
        for pair in range(options.pairs):
            a, b = (
                trained(
                    part(train, t), 2 * pair + i, options.width, options.depth, options.epochs, options.decay
                )
                for i, t in enumerate(TASKS)
            )
            head = f"{2 * options.depth}."

            def both(models: list[Any], a: nn.Module = a, test: Data = test) -> float:
                return sum(accuracy(m, a, test, t) for m, t in zip(models, TASKS, strict=True)) / 2

            def mean(moved: Any, a: nn.Module = a, head: str = head) -> list[Any]:
                x, y = weft.load(a).state_dict(), weft.load(moved).state_dict()
                trunk = {n: (t + y[n]) / 2 for n, t in x.items()}
                return [trunk | {n: t for n, t in s.items() if n.startswith(head)} for s in (x, y)]

            def zips(
                private: list[str], weight: float = 0.0, a: nn.Module = a, b: nn.Module = b, few: Any = few
            ) -> list[Any]:
                return weft.align.zip_models([a, b], few, private=private, weight=weight).checkpoints

            later = [f"{2 * i}.*" for i in range(1, options.depth + 1)]
            ways = {
                "ends": lambda a=a, b=b: [a, b],
                "mean": lambda b=b: mean(b),
                "correlation": lambda a=a, b=b, few=few: mean(
                    weft.align(b, to=a, how="correlation", data=few)
                ),
                "zip": lambda head=head: zips([f"{head}*"]),
                "zip, half by weights": lambda head=head: zips([f"{head}*"], 0.5),
                "zip of the first layer": lambda later=later: zips(later),
            }
            for how, make in ways.items():
                started = time.perf_counter()
                found = make()
                spent, value = time.perf_counter() - started, both(found)
                rows.append({"data": name, "pair": pair, "how": how, "accuracy": value, "seconds": spent})
                print(f"{name} pair {pair} {how:24} {100 * value:5.1f} %  {spent:6.1f} s", flush=True)
    return rows


def fused(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A network of another width transported onto one, and their mean."""
    from alignment import images, trained

    rows = []
    for name in options.data.split(","):
        train, test = images(name)
        few = [(x,) for x in train[0][:2000].split(500)]
        for pair in range(options.pairs):
            a, b = (
                trained(train, 2 * pair + i, width, options.depth, options.epochs, options.decay)
                for i, width in enumerate((options.width, options.other))
            )
            print(
                f"{name} pair {pair} ends {accuracy(a, a, test):.4f} {accuracy(b, b, test):.4f}", flush=True
            )
            for how, given in {
                "weights": {}, "activations": {"by": "activations"}, "soft": {"by": "activations", "reg": 0.01}
            }.items():  # fmt: skip
                started = time.perf_counter()
                found = weft.align.ot_fusion(b, a, few, **given)
                spent = time.perf_counter() - started
                moved, merged = (accuracy(m, a, test) for m in (found.checkpoint, found.merged()))
                rows.append({"data": name, "pair": pair, "how": how, "widths": [options.width, options.other],
                             "moved": moved, "merged": merged, "seconds": spent})  # fmt: skip
                told = f"{name} pair {pair} {options.other} onto {options.width} {how:12} moved"
                print(
                    f"{told} {100 * moved:5.1f} %  merged {100 * merged:5.1f} %  {spent:6.1f} s", flush=True
                )
    return rows
