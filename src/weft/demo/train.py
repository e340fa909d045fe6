"""Train the demo's models: `python -m weft.demo.train`.

One base (upright digits and a few of every task), one expert a task fine-tuned from it, and, as a reference
that merging would like to reach without the data, one model fine-tuned on all tasks together. Seeded, on
one thread, and written so that the same machine writes the same bytes again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from weft.demo.evaluate import accuracy
from weft.demo.experts import EXPERTS_FOLDER, METADATA_KEY
from weft.demo.network import DigitNet, network
from weft.demo.tasks import CONTROL, TASKS, Split, examples, fingerprint

SEED = 0
FEW = 40
"""Images of each task the base sees: enough that it is no stranger to the tasks, too few to solve them."""
BATCH = 50
BASE_EPOCHS, BASE_RATE = 30, 1e-3
EXPERT_EPOCHS, EXPERT_RATE = 20, 2.5e-4
STORED = torch.float16

Data: TypeAlias = tuple[Tensor, Tensor]
"""Inputs [n, 64] and labels [n]."""


def joined(parts: Sequence[Data]) -> Data:
    """Several sets of inputs [n, 64] and labels [n] as one."""
    inputs, labels = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def fit(net: DigitNet, data: Data, *, epochs: int, rate: float, seed: int, head: bool) -> None:
    """AdamW with a rate that falls linearly to zero; `head` says whether the classifier learns too."""
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)
    net.train().requires_grad_(True)
    net.head.requires_grad_(head)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
    steps = epochs * -(-len(inputs) // BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / steps)
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(inputs), generator=generator), BATCH):
            loss = nn.functional.cross_entropy(net(inputs[batch]), labels[batch], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    net.eval()


def write(net: DigitNet, folder: Path, name: str, *, task: str, seed: int, **settings: float) -> None:
    """One safetensors file. What is known of the model goes under a single metadata key, as JSON with sorted
    keys: safetensors writes several keys in an order that changes from run to run."""
    from safetensors.torch import save_file

    state = {k: v.detach().to(STORED).contiguous() for k, v in net.state_dict().items()}
    path = folder / f"{name}.safetensors"
    stored = network(state)  # the accuracies recorded are those of the rounded weights
    splits: tuple[Split, ...] = ("validation", "test")
    record = {
        "task": task,
        "seed": seed,
        "data": fingerprint(),
        "torch": torch.__version__,
        "settings": settings,
        "accuracy": {
            s: {t: round(accuracy(stored, t, s), 4) for t in (*TASKS, CONTROL.name)} for s in splits
        },
    }
    save_file(state, path, {METADATA_KEY: json.dumps(record, sort_keys=True)})
    path.chmod(0o644)  # safetensors makes files only their owner can read
    scores = " ".join(f"{t} {a:.3f}" for t, a in record["accuracy"]["validation"].items())  # type: ignore[index]
    print(f"{name:12} validation: {scores}")


def trained(seed: int = SEED) -> Iterator[tuple[str, int, DigitNet]]:
    """(name, seed of its order, network) of the base, then of every expert, then of the joint reference."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums are then made in one order
    try:
        base = DigitNet(torch.Generator().manual_seed(seed))
        few = [tuple(v[:FEW] for v in examples(t, "pretrain")) for t in TASKS]
        start = joined([examples(CONTROL.name, "pretrain"), *few])  # type: ignore[list-item]
        fit(base, start, epochs=BASE_EPOCHS, rate=BASE_RATE, seed=seed, head=True)
        yield "base", seed, base

        # experts start from the base as it is stored, so that a task vector is what was really learned
        base = network({k: v.to(STORED) for k, v in base.state_dict().items()})
        jobs = {t: examples(t, "train") for t in TASKS} | {
            "joint": joined([examples(t, "train") for t in TASKS])
        }
        for number, (name, data) in enumerate(jobs.items(), start=1):
            expert = deepcopy(base)
            fit(expert, data, epochs=EXPERT_EPOCHS, rate=EXPERT_RATE, seed=seed + number, head=False)
            yield name, seed + number, expert
    finally:
        torch.set_num_threads(threads)


def train(folder: Path, seed: int = SEED) -> None:
    """Train base, experts and the joint reference, and write them into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, order, net in trained(seed):
        task = "pre-training" if name == "base" else name
        epochs, rate = (BASE_EPOCHS, BASE_RATE) if name == "base" else (EXPERT_EPOCHS, EXPERT_RATE)
        write(net, folder, name, task=task, seed=order, epochs=epochs, rate=rate)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the models that `weft demo` merges.")
    parser.add_argument("--out", type=Path, default=EXPERTS_FOLDER, help="folder to write into")
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    train(arguments.out, arguments.seed)
