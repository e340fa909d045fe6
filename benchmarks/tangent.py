"""Fine-tuning in the tangent space against plain fine-tuning, added up by task arithmetic, on the vision suite.

    python benchmarks/tangent.py [--tasks 5] [--seeds 3] [--first-seed 0] [--epochs 4] [--ways …]
                                 [--map fashion_mnist,gtsrb] [--html map.html]

All ways fine-tune one base, the transformer of `weft bench vision8` after 600 images of each of its eight tasks, on
3 000 images of the first tasks: the same batches, steps and optimiser (AdamW), the classifier frozen. Each has its
own learning rate, the best of a grid by the validation accuracy of seed 0's experts of two tasks. Experts are added
with the scale that is best on validation images, and measured on the test images: alone, added, and added relative
to alone (normalised accuracy). Tangent experts are run in the network linearised at the base; "full, linearised"
are plain experts run there. "full, slow" are plain experts of the least rate, about as good alone as tangent ones.

The map is ξ(α1, α2) of two tasks on validation images, wherever the experts live; the length is ‖τ‖, the mean over
tasks. Models are kept in the bench's cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import weft
from weft.analysis.disentanglement import Disentanglement, disentanglement
from weft.analysis.network import Network
from weft.analysis.report import write_report
from weft.bench.cache import code, stored
from weft.bench.networks import Block, ViT
from weft.bench.suites.data import data_folder, digest, images
from weft.bench.suites.vision import TASKS, columns
from weft.bench.training import Family, Fit
from weft.train import Charted, Linearised

State = dict[str, Tensor]
Examples = tuple[Tensor, Tensor]
SIZES = {"few": 600, "validation": 300, "train": 3000}
"""Images of a task: for the base, for choosing, for its expert. The test has 400."""
BASE = Fit(epochs=14, lr=1e-3, smoothing=0.1)
ATTENTION = [f"*.{part}.weight" for part in "qkvo"]
SCALES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1.0)
ALPHAS = tuple(round(-1 + 0.25 * i, 2) for i in range(9))
GRID_TASKS = ("fashion_mnist", "gtsrb")


@dataclass(frozen=True)
class Way:
    """How experts are trained, the learning rates to choose from, and whether they live in the tangent space."""

    settings: Mapping[str, Any]
    rates: tuple[float, ...]
    tangent: bool = False


WAYS = {
    "full": Way({"mode": "full"}, (2.5e-4, 5e-4, 1e-3)),
    "full, slow": Way({"mode": "full"}, (2.5e-4,)),
    "tangent": Way({"mode": "tangent"}, (2.5e-4, 5e-4, 1e-3), True),
    "attention": Way({"mode": "full", "which": ATTENTION}, (1e-3, 2e-3)),
    "linear layers, tangent": Way({"mode": "tangent", "which": "linear"}, (2.5e-4, 5e-4, 1e-3), True),
    "lora": Way({"mode": "lora", "lora": {"rank": 16}}, (1e-3, 2e-3, 4e-3)),
    "lora, tangent": Way({"mode": "tangent_lora", "lora": {"rank": 16}}, (4e-3, 8e-3), True),
}  # fmt: skip


@dataclass(frozen=True)
class Images:
    """The parts of one task's images, and its columns of the head."""

    few: Examples
    validation: Examples
    train: Examples
    test: Examples
    columns: tuple[int, int]

    @staticmethod
    def of(folder: Path, task: str, place: tuple[int, int]) -> Images:
        found, start, cut = images(folder, task), 0, {}
        for part, size in SIZES.items():
            cut[part] = tuple(v[start : start + size] for v in found["train"])
            start += size
        return Images(**cut, test=tuple(v[:400] for v in found["test"]), columns=place)  # type: ignore[arg-type]

    def targets(self, part: Examples) -> Examples:
        """Labels as columns of the joint head."""
        return part[0], part[1] + self.columns[0]


class Lab:
    """One seed: its base, the images, and experts as they are asked for."""

    def __init__(self, seed: int, tasks: Sequence[str], epochs: int) -> None:
        folder = data_folder()
        self.seed, self.tasks, self.epochs = seed, tuple(tasks), epochs
        about = {"files": digest(folder, TASKS), "sizes": SIZES, "split": 1}
        self.family = Family("vit", ViT, columns(TASKS), BASE, BASE, about, (ViT, Block))
        self.images = {t: Images.of(folder, t, self.family.classes[t]) for t in TASKS}
        weights = self.family.pretrained(
            lambda: {t: p.targets(p.few) for t, p in self.images.items()}, seed, print
        )
        self.base: nn.Module = ViT(self.family.width).eval()
        self.base.load_state_dict(weights)

    def expert(self, way: str, task: str, rate: float) -> State:
        """The weights of one expert."""
        settings, images = WAYS[way].settings, self.images[task]
        about = {"family": self.family._about(task, self.seed, ""), "way": dict(settings), "rate": rate,
                 "epochs": self.epochs, "code": code(Lab.expert, masked)}  # fmt: skip

        def make() -> State:
            started = time.perf_counter()
            found = weft.finetune(
                self.base, images.targets(images.train), freeze=["head.*"], loss=masked(images.columns),
                epochs=self.epochs, batch=64, lr=rate, warmup=20, seed=1000 * self.seed + TASKS.index(task),
                **settings,
            )  # fmt: skip
            print(f"trained {way} {task} seed {self.seed} rate {rate:g}: loss {found.losses[-1]:.3f}, "
                  f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
            return found.model.weights()

        return stored("tangent", about, make)

    def model(self, linear: bool, task: str, weights: Any) -> Charted:
        """The network, or its expansion at the base, with these weights; outputs are the task's own columns."""
        start, stop = self.images[task].columns
        kind = Linearised if linear else Charted
        made = kind(self.base, output=lambda out: out[..., start:stop])
        made.take(weft.load(weights).state_dict())
        return made.eval()

    def length(self, weights: State) -> float:
        """‖τ‖ over all parameters."""
        return sum(float((weights[n] - t).square().sum()) for n, t in self.base.state_dict().items()) ** 0.5

    def accuracy(self, model: Charted, task: str, split: str) -> float:
        x, y = getattr(self.images[task], split)
        with torch.no_grad():
            found = torch.cat([model(part) for part in x.split(200)])
        return float((found.argmax(-1) == y).double().mean())

    def accuracies(self, linear: bool, weights: Any, split: str) -> dict[str, float]:
        return {t: self.accuracy(self.model(linear, t, weights), t, split) for t in self.tasks}

    def added(self, experts: Mapping[str, State], scale: float) -> weft.Checkpoint:
        return weft.merge(list(experts.values()), "task_arithmetic", base=self.base, scale=scale)


def masked(columns: tuple[int, int]) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of the task's own columns, labels smoothed by 0.1, as the suite's experts have it."""
    start, stop = columns

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs[:, start:stop], targets - start, label_smoothing=0.1)

    return loss


def chosen_rate(lab: Lab, way: str) -> float:
    """The learning rate with the best experts of two tasks, by validation images."""
    if len(WAYS[way].rates) == 1:
        return WAYS[way].rates[0]

    def value(rate: float) -> float:
        found = [
            lab.accuracy(lab.model(WAYS[way].tangent, t, lab.expert(way, t, rate)), t, "validation")
            for t in GRID_TASKS
        ]
        return statistics.mean(found)

    tried = {rate: value(rate) for rate in WAYS[way].rates}
    print(f"{way}: validation by rate " + ", ".join(f"{r:g}: {v:.4f}" for r, v in tried.items()), flush=True)
    return max(tried, key=tried.__getitem__)


def row(lab: Lab, name: str, way: str, linear: bool, rate: float) -> dict[str, Any]:
    """Experts of every task, added up."""
    experts = {t: lab.expert(way, t, rate) for t in lab.tasks}
    alone = {t: lab.accuracy(lab.model(linear, t, w), t, "test") for t, w in experts.items()}
    held = {t: lab.accuracy(lab.model(linear, t, w), t, "validation") for t, w in experts.items()}

    def value(scale: float) -> float:
        found = lab.accuracies(linear, lab.added(experts, scale), "validation")
        return statistics.mean(found[t] / held[t] for t in lab.tasks)

    scale = max(SCALES, key=value)
    merged = lab.accuracies(linear, lab.added(experts, scale), "test")
    made = {
        "way": name, "seed": lab.seed, "rate": rate, "scale": scale, "alone": alone, "merged": merged,
        "alone_mean": statistics.mean(alone.values()), "merged_mean": statistics.mean(merged.values()),
        "normalised": statistics.mean(merged[t] / alone[t] for t in lab.tasks),
        "length": statistics.mean(lab.length(w) for w in experts.values()),
    }  # fmt: skip
    cells = "  ".join(f"{k} {100 * made[k]:5.1f}" for k in ("alone_mean", "merged_mean", "normalised"))
    told = f"rate {rate:<7g} scale {scale:<5g} {cells}  length {made['length']:.2f}"
    print(f"seed {lab.seed} {name:24} {told}", flush=True)
    return made


def mapped(lab: Lab, way: str, rate: float, pair: tuple[str, str]) -> Disentanglement:
    """ξ over both scales, where the experts live."""
    linear, experts = WAYS[way].tangent, [lab.expert(way, t, rate) for t in pair]
    nets = []
    for task in pair:
        x, y = lab.images[task].validation
        nets.append(Network(lab.model(linear, task, lab.base), (x[:150], y[:150])))
    names = (f"{pair[0]} ({way})", f"{pair[1]} ({way})")
    return disentanglement(nets, lab.base, experts, alphas=ALPHAS, names=names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=5, help="how many of the suite's, from the first")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--ways", default=";".join(WAYS), help=f"of {'; '.join(WAYS)}")
    parser.add_argument("--map", default=",".join(GRID_TASKS), help="two tasks")
    parser.add_argument("--html", type=Path, help="where the maps are drawn")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    ways, rows, maps, rates = options.ways.split(";"), [], [], {}
    unknown = [w for w in ways if w not in WAYS]
    if unknown:
        parser.error(f"--ways: there is no {unknown[0]!r}; {'; '.join(WAYS)}")
    tasks = TASKS[: options.tasks]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        lab = Lab(seed, tasks, options.epochs)
        whole = lab.accuracies(False, lab.base, "test")
        print(f"seed {seed} base {100 * statistics.mean(whole.values()):.1f}", flush=True)
        for way in ways:
            if way not in rates:
                rates[way] = chosen_rate(Lab(0, tasks, options.epochs), way)
            rows.append(row(lab, way, way, WAYS[way].tangent, rates[way]))
            if way == "full":
                rows.append(row(lab, "full, linearised", way, True, rates[way]))
            pair = tuple(options.map.split(","))
            maps.append(mapped(lab, way, rates[way], pair))
            print(f"seed {seed} {way:24} mean ξ over 0 < α ≤ 1: {maps[-1].mean:.4f}", flush=True)
    print(f"\n{'':24} {'alone':>12} {'merged':>12} {'normalised':>12}  scales")
    for name in dict.fromkeys(r["way"] for r in rows):
        mine = [r for r in rows if r["way"] == name]
        cells = [f"{100 * statistics.mean(r[k] for r in mine):6.1f} ± {100 * spread([r[k] for r in mine]):3.1f}"
                 for k in ("alone_mean", "merged_mean", "normalised")]  # fmt: skip
        print(f"{name:24} {' '.join(c.rjust(12) for c in cells)}  {[r['scale'] for r in mine]}")
    if options.html is not None:
        write_report(maps, options.html, heading="Weight disentanglement")
    if options.json is not None:
        options.json.write_text(json.dumps({"rows": rows, "maps": [m.to_json() for m in maps]}, indent=1))


def spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
