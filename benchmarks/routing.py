"""Merges, routed models and experts on the demo's five tasks: `python benchmarks/routing.py --seeds 0 1 2`.

Every seed trains a base and five experts anew; seed 0 are the shipped ones. Gates are made from validation images,
accuracies are of the test split. The table is docs/routing.md's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.demo.evaluate import as_network
from weft.demo.experts import expert_paths
from weft.demo.network import DigitNet, network
from weft.demo.tasks import CONTROL, TASKS, examples
from weft.demo.train import EXPERT_EPOCHS, EXPERT_RATE, FEW, fit, joined
from weft.routing import Routed
from weft.systems import routing as systems

LAYERS = ["layers.*"]


def models(seed: int) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A base and an expert a task."""
    if seed == 0:
        paths = expert_paths()
        return as_network(paths["base"]), {t: as_network(paths[t]) for t in TASKS}
    base = DigitNet(torch.Generator().manual_seed(seed))
    few = [tuple(v[:FEW] for v in examples(t, "pretrain")) for t in TASKS]
    fit(base, joined([examples(CONTROL.name, "pretrain"), *few]), epochs=30, rate=1e-3, seed=seed, head=True)
    base, experts = network(base.state_dict()), {}
    for i, task in enumerate(TASKS):
        net = deepcopy(base)
        fit(
            net,
            examples(task, "train"),
            epochs=EXPERT_EPOCHS,
            rate=EXPERT_RATE,
            seed=10 * seed + i,
            head=False,
        )
        experts[task] = net.requires_grad_(False)
    return base, experts


def accuracies(call: Callable[..., Tensor], split: str = "test", told: bool = False) -> list[float]:
    found = []
    for task in TASKS:
        x, y = examples(task, split)
        with torch.no_grad():
            out = call(x, task=task) if told else call(x)
        found.append(float((out.argmax(1) == y).double().mean()))
    return found


def candidates(
    base: nn.Module, experts: Mapping[str, nn.Module]
) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    """Name, how it is made, and whether it is told the task."""
    val = {t: examples(t, "validation") for t in TASKS}
    free = {t: v[0] for t, v in val.items()}
    few = {t: x[:32] for t, x in free.items()}
    every = list(experts.values())

    def merged(method: str, **params: Any) -> Callable[[], nn.Module]:
        return lambda: as_network(weft.merge(every, method, base=base, **params))

    def kept(residual: str, **how: Any) -> Callable[[], Routed]:
        return lambda: weft.route(base, base, experts, residual=residual, **how)

    def essential(rank: int) -> Routed:
        """ESM's scale is chosen on validation data, by the shared merge alone."""
        made = [systems.esm_plus(base, base, experts, few, scale=s, rank=rank) for s in (0.1, 0.2, 0.3, 0.5)]
        return max(
            made, key=lambda r: sum(accuracies(lambda x: r(x, weights=[0.0] * len(TASKS)), "validation"))
        )

    def gates(loss: str, data: Any, lr: float, **how: Any) -> Callable[[], Routed]:
        split = "validation"
        return lambda: systems.wemoe(
            base,
            base,
            experts,
            data,
            loss=loss,
            steps=300,
            lr=lr,
            batch=32,
            split=split,
            **({"where": LAYERS} | how),
        )

    yield "task arithmetic 0.3", merged("task_arithmetic", weight=0.3), False
    yield "TSV-M", merged("tsv"), False
    yield "EMR", kept("emr", shared="base"), True
    yield "TALL masks 0.4", kept("tall:0.4", shared="base"), True
    yield "TSV-C", kept("lowrank", shared="base"), True
    yield "1 bit over task arithmetic", kept("sign"), True
    yield "Twin-Merging 10 %", lambda: systems.twin_merging(base, base, experts, free), False
    yield "WEMoE, labels", gates("cross_entropy", val, 1e-2), False
    yield "WEMoE, entropy 1e-4", gates("entropy", free, 1e-4), False
    yield "WEMoE, entropy 1e-3", gates("entropy", free, 1e-3), False
    yield "E-WEMoE 10 %, labels", gates("cross_entropy", val, 1e-2, where=["layers.1", "layers.2"], tied=True,
                                        density=0.1), False  # fmt: skip
    yield (
        "SMEAR, labels",
        lambda: systems.smear(base, base, experts, val, steps=200, lr=1e-3, batch=32),
        False,
    )
    yield "SMILE 32", lambda: systems.smile(base, base, experts, where=LAYERS), False
    yield "ESM++ 32", lambda: essential(32), False
    yield "ESM++ 8", lambda: essential(8), False
    yield "MASS at layer 0", lambda: systems.mass(base, base, experts, at="layers.0", rank=12), False
    yield "DaWin", lambda: systems.dawin(base, base, experts), False
    yield "Ye et al., all gated", lambda: systems.gated_where_dissimilar(base, base, experts, free, share=1.0,
                                                                         where=LAYERS), False  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    table: dict[str, list[dict[str, Any]]] = {}
    for seed in asked.seeds:
        base, experts = models(seed)
        ends = [accuracies(e)[i] for i, e in enumerate(experts.values())]
        for name, found in (("base", accuracies(base)), ("experts, told", ends)):
            table.setdefault(name, []).append({"seed": seed, "accuracy": found})
        for name, make, told in candidates(base, experts):
            begin = time.process_time()
            made = make()
            row: dict[str, Any] = {"seed": seed, "accuracy": accuracies(made, told=told)}
            row["seconds"] = time.process_time() - begin
            if isinstance(made, Routed):
                row["cost"] = made.cost().to_json()
            table.setdefault(name, []).append(row)
            print(f"{seed} {name:28} {sum(row['accuracy']) / 5:.4f} {row['seconds']:6.1f} s", flush=True)
    print(
        "| | mean | lowest seed | worst task | bytes | passes before | products |\n|---|---|---|---|---|---|---|"
    )
    for name, rows in table.items():
        means = [100 * sum(r["accuracy"]) / 5 for r in rows]
        worst = sum(100 * min(r["accuracy"]) for r in rows) / len(rows)
        cost = rows[0].get("cost")
        told = f"{cost['ratio']:.1f} | {cost['passes']:g} | {cost['products']:.1f}" if cost else "| |"
        print(f"| {name} | {sum(means) / len(means):.1f} | {min(means):.1f} | {worst:.1f} | {told} |")
    if asked.out:
        asked.out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
