"""Learned aligners against weight matching, on networks that the aligners have not seen.

    python benchmarks/aligners.py [--widths 32,32] [--seen 6,24] [--unseen 6] [--steps 100] [--loss]

Trains digit networks (scikit-learn's, AdamW with weight decay 1, one cycle of 20 epochs) side by side from as many
starts, an aligner on `seen` of them, and prints the mean barrier of the loss on test images over all pairs of the
`unseen` ones, as they are, by weight matching and by the aligner, with the mean cosine of their weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from weft.align import PermutationSpec, agreement, deep_align, discover, weight_matching
from weft.analysis.barrier import barrier
from weft.analysis.network import Network

Data = tuple[Tensor, Tensor]


def images() -> tuple[Data, Data]:
    bundled = load_digits()
    order = torch.randperm(len(bundled.data), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(bundled.data / 16, dtype=torch.float32)[order], torch.tensor(bundled.target)[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def zoo(
    data: Data, widths: Sequence[int], count: int, epochs: int = 20, rate: float = 3e-3
) -> list[nn.Module]:
    """Networks of as many starts, trained side by side."""
    torch.manual_seed(0)
    nets: list[nn.Module] = []
    for _ in range(count):
        sizes = [64, *widths]
        layers = [m for i, o in pairwise(sizes) for m in (nn.Linear(i, o), nn.ReLU())]
        nets.append(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)))
    free = {n: p.detach().requires_grad_() for n, p in torch.func.stack_module_state(nets)[0].items()}
    optimiser = torch.optim.AdamW(free.values(), lr=rate, weight_decay=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, epochs * 12, pct_start=0.1)
    run = torch.vmap(lambda p, x: torch.func.functional_call(nets[0], p, (x,)))
    for _ in range(epochs):
        for batch in torch.stack([torch.randperm(1200) for _ in range(count)]).split(100, 1):
            loss = nn.functional.cross_entropy(
                run(free, data[0][batch]).flatten(0, 1), data[1][batch].flatten()
            )
            optimiser.zero_grad()
            torch.autograd.backward(loss * count)
            optimiser.step()
            schedule.step()
    for k, net in enumerate(nets):
        net.load_state_dict({n: p[k].detach() for n, p in free.items()})
    return [net.eval().requires_grad_(False) for net in nets]


def measured(
    match: Callable[..., dict[str, Tensor]], spec: PermutationSpec, nets: Sequence[nn.Module], test: Data
) -> tuple[float, float, float]:
    """Mean barrier, mean cosine, and seconds a pair."""
    found, started = [], time.process_time()
    orders = {(i, j): match(spec, nets[i], nets[j]) for i, j in combinations(range(len(nets)), 2)}
    spent = (time.process_time() - started) / len(orders)
    for (i, j), p in orders.items():
        a, b = nets[i], nets[j]
        height = barrier(Network(a, test), a, b, align=lambda b, a, p=p: spec.apply(b, p)).barrier
        found.append((height, agreement(spec, a, b, p)))
    height, cosine = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return height, cosine, spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--widths", default="32,32")
    parser.add_argument("--seen", default="6,24")
    parser.add_argument("--unseen", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--loss", action="store_true", help="learn by the loss between networks too")
    options = parser.parse_args()
    (train, test), seen = images(), [int(n) for n in options.seen.split(",")]
    nets = zoo(train, [int(w) for w in options.widths.split(",")], max(seen) + options.unseen)
    held, spec = nets[max(seen) :], discover(nets[0])

    def tell(what: str, match: Callable[..., dict[str, Tensor]], spent: float = 0.0) -> None:
        height, cosine, each = measured(match, spec, held, test)
        print(f"{what:40} barrier {height:.3f}  cosine {cosine:.3f}  {1000 * each:.0f} ms a pair, after "
              f"{spent:.0f} s of training", flush=True)  # fmt: skip

    tell("as they are", lambda spec, a, b: {})
    tell("weight matching", weight_matching)
    for n in seen:
        started = time.process_time()
        net = Network(nets[0], train, batch_size=200) if options.loss else None
        aligner = deep_align(spec, nets[:n], net, steps=options.steps)
        tell(f"aligner, {n} networks", aligner, time.process_time() - started)


if __name__ == "__main__":
    main()
