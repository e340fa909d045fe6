"""Independent networks brought into one order: barriers before and after, by matcher, width and seed; and speed.

    python benchmarks/alignment.py barriers [--data mnist,fashion_mnist] [--width 512] [--pairs 3] [--only …]
    python benchmarks/alignment.py speed [--layers 22] [--memory 1GiB]
    python benchmarks/alignment.py zip [--data mnist] [--width 512] [--pairs 3]
    python benchmarks/alignment.py many [--data mnist] [--width 256] [--models 3] [--groups 5]
    python benchmarks/alignment.py repair [--data cifar10_jpeg,gtsrb] [--nets vgg,vgg-plain,resnet20 or lenet]
    python benchmarks/alignment.py fusion [--width 256] [--other 400] [--pairs 3]
    python benchmarks/alignment.py order [--nets resnet20,llama,gpt2,bert] [--pairs 4] [--seeds 5]

`barriers` trains pairs of networks (two or three hidden layers, ReLU, AdamW with weight decay 0.5, one cycle, from
two seeds each) on the images of WEFT_DATA, and prints the barrier of the loss and of the error rate on the test
images, between the original networks, before and after each way to match them. Matchers that need data see
training images only. `speed` takes the time of weight matching for ResNet-20, MLPs of width 1024, and a transformer
of TinyLlama's shape on disk, against itself in another order with noise (2.2 GB three times in `--place`), with the
process's CPU time, its peak memory, and how much of that is its own rather than mapped files. `zip`
makes one trunk of two networks that know other labels, `fusion` one network of two of other widths (zips.py);
`many` brings three or more into one order and averages them (many.py);
`repair` matches and repairs convolutional networks (repaired.py); `order` compares orders in which groups are
visited (orders.py).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import weft
from many import many
from orders import orders
from repaired import repaired
from weft.analysis.barrier import barrier
from weft.analysis.network import Network
from zips import fused, zipped

Data = tuple[Tensor, Tensor]
Aligned = Callable[..., Any]


def images(name: str) -> tuple[Data, Data]:
    """Training and test images, flat, standardised."""
    found = np.load(Path(os.environ["WEFT_DATA"]) / "vision" / f"{name}.npz")
    made = []
    for part in ("train", "test"):
        x = torch.from_numpy(found[f"x_{part}"]).float().flatten(1) / 255
        made.append(((x - 0.13) / 0.31, torch.from_numpy(found[f"y_{part}"]).long()))
    return made[0], made[1]


def trained(data: Data, seed: int, width: int, depth: int, epochs: int, decay: float) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    inputs = data[0].shape[1]
    for _ in range(depth):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    net, n = nn.Sequential(*layers, nn.Linear(width, 10)), len(data[0])
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, epochs * (n // 100), pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(n)[: n // 100 * 100].split(100):
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(data[0][batch]), data[1][batch]).backward()
            optimiser.step()
            schedule.step()
    return net.eval()


def matchers(train: Data) -> dict[str, Aligned]:
    """`align(b, to=a)` by name; each gets the two modules."""
    few = [train[0][i : i + 500] for i in range(0, 4000, 500)]
    return {
        "weights": lambda b, a: weft.align(b, to=a),
        "ste": lambda b, a: weft.align(b, to=a, how="ste", data=train, steps=100),
        "sinkhorn": lambda b, a: weft.align(b, to=a, how="sinkhorn", steps=50),
        "activations": lambda b, a: weft.align(b, to=a, how="activations", data=few),
        "correlation": lambda b, a: weft.align(b, to=a, how="correlation", data=few),
        "ot": lambda b, a: weft.align(b, to=a, how="ot", data=few, by="activations"),
        "cca": lambda b, a: weft.align(b, to=a, how="cca", data=few, gamma=10.0),
    }


def barriers(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in options.data.split(","):
        train, test = images(name)
        for pair in range(options.pairs):
            started = time.perf_counter()
            a, b = (
                trained(train, 2 * pair + i, options.width, options.depth, options.epochs, options.decay)
                for i in (0, 1)
            )
            spent = time.perf_counter() - started
            net = Network(a, test)
            ways: dict[str, Aligned | None] = {"none": None, **matchers(train)}
            for how in ["none", *options.only.split(",")]:
                started, align = time.perf_counter(), ways[how]
                moved = b if align is None else align(b, a)
                took = time.perf_counter() - started
                found = barrier(net, a, b, align=None if align is None else lambda b, a, m=moved: m)
                middle = found.errors[5]
                rows.append({
                    "data": name, "width": options.width, "depth": options.depth, "pair": pair, "how": how,
                    "barrier": found.barrier, "error_barrier": found.error_barrier, "middle_error": middle,
                    "end_errors": found.end_errors, "seconds": took, "training_seconds": spent,
                })  # fmt: skip
                ends = "/".join(f"{100 * e:.1f}" for e in found.end_errors if e is not None)
                print(
                    f"{name} {options.depth}x{options.width} pair {pair} {how:12} "
                    f"barrier {found.barrier:7.4f}  error at the midpoint {100 * (middle or 0):5.1f} % "
                    f"(ends {ends})  {took:6.1f} s",
                    flush=True,
                )
    return rows


def llama(folder: str, layers: int, seed: int) -> None:
    """A transformer of TinyLlama's shape in bfloat16, with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_attention_heads=32, num_key_value_heads=4,
        num_hidden_layers=layers, vocab_size=32000, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    torch.manual_seed(seed)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    own = Own()

    def note(what: str, seconds: float, **more: Any) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        row = {"what": what, "seconds": seconds, "cpu": time.process_time(), "peak_gib": peak,
               "own_gib": own.peak / 2**20, **more}  # fmt: skip
        rows.append(row)
        print(f"{what:60} {seconds:8.1f} s  peak {peak:.2f} GiB, own {own.peak / 2**20:.2f} GiB, "
              f"CPU so far {row['cpu']:.0f} s  {more}", flush=True)  # fmt: skip

    def taken(what: str, make: Callable[[], nn.Module], inputs: Tensor | None) -> None:
        torch.manual_seed(0)
        a, b = make(), make()
        started = time.perf_counter()
        spec = weft.align.discover(a, inputs)
        found = time.perf_counter() - started
        weft.align.weight_matching(spec, a, b)
        note(what, time.perf_counter() - started, discovery=round(found, 2), units=spec.degrees)

    def mlp() -> nn.Module:
        return nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )

    taken("two MLPs 784-1024-1024-10", mlp, None)
    for width in (16, 64):
        taken(f"two ResNet-20 of width {width}", lambda w=width: ResNet20(w), torch.randn(2, 3, 32, 32))
    if not options.layers:
        return rows
    with tempfile.TemporaryDirectory(dir=options.place) as place:
        a, b, other = (Path(place) / n for n in ("a", "b", "other"))
        # made in processes of their own, so that the peak is the matching's
        here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import alignment; "
        for folder, seed in ((a, 0), (other, 1)):
            _process(here + f"alignment.llama({str(folder)!r}, {options.layers}, {seed})")
        _process(here + f"alignment.planted({str(a)!r}, {str(other)!r}, {str(b)!r})")
        started = time.perf_counter()

        def tell(sweep: int, group: str, gain: float) -> None:
            print(
                f"    {time.perf_counter() - started:6.0f} s  sweep {sweep}  {group}  {gain:.4g}", flush=True
            )

        spec = weft.align.spec_of(a)
        discovery = time.perf_counter() - started
        found = weft.align.weight_matching(
            spec, a, b, memory=options.memory, progress=tell if options.verbose else None
        )
        spent = time.perf_counter() - started
        back = spec.compose(spec.random(0), found)
        right = sum(int((back[n] == p).sum()) for n, p in spec.identity().items())
        size = sum(i.numel for i in weft.load(a).tensors.values())
        note(f"Llama of {size / 1e9:.2f} B, {options.layers} layers, bfloat16 on disk", spent,
             discovery=round(discovery, 2), units=spec.degrees, recovered=right, memory=options.memory)  # fmt: skip
    return rows


def planted(a: str, other: str, out: str) -> None:
    """`a` in a random order, with half as much noise as weights."""
    spec = weft.align.spec_of(a)
    weft.save(spec.apply(a, spec.random(0)) + 0.5 * weft.load(other), out)


def _process(code: str) -> None:
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True)


class Own(threading.Thread):
    """The most anonymous memory that this process has held, in KiB: peaks of resident memory count mapped files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            told = Path("/proc/self/status").read_text()
            now = int(told.partition("RssAnon:")[2].split()[0])
            self.peak = max(self.peak, now)
            time.sleep(0.05)


class ResNet20(nn.Module):
    """Three stages of three blocks (arXiv:1512.03385, section 4.2), projections as shortcuts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList()
        now = width
        for stage in range(3):
            for i in range(3):
                out, stride = width << stage, 2 if stage and not i else 1
                short = nn.Identity() if now == out else nn.Conv2d(now, out, 1, stride, bias=False)
                inside = nn.Sequential(
                    nn.Conv2d(now, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                    nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
                )  # fmt: skip
                self.blocks.append(nn.ModuleList([inside, short]))
                now = out
        self.head = nn.Linear(now, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for inside, short in self.blocks:  # type: ignore[misc]
            x = (inside(x) + short(x)).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(required=True)
    of = ways.add_parser("barriers")
    of.add_argument("--data", default="mnist,fashion_mnist")
    of.add_argument("--width", type=int, default=512)
    of.add_argument("--depth", type=int, default=2)
    of.add_argument("--pairs", type=int, default=3)
    of.add_argument("--epochs", type=int, default=15)
    of.add_argument("--decay", type=float, default=0.5)
    of.add_argument("--only", default="weights,ste,sinkhorn,activations,correlation,ot,cca")
    of.set_defaults(run=barriers)
    fast = ways.add_parser("speed")
    fast.add_argument("--layers", type=int, default=22, help="of the transformer; 0: none")
    fast.add_argument("--memory", default="1GiB")
    fast.add_argument("--place", default=None, help="where its files go")
    fast.add_argument("--verbose", action="store_true")
    fast.set_defaults(run=speed)
    zips, fusion, several = (ways.add_parser(n) for n in ("zip", "fusion", "many"))
    several.set_defaults(run=many)
    several.add_argument("--models", type=int, default=3)
    several.add_argument("--groups", type=int, default=5)
    several.add_argument(
        "--tries", type=int, default=4, help="of C2M3, the first from the models as they are"
    )
    zips.set_defaults(run=zipped)
    fusion.add_argument("--other", type=int, default=400)
    fusion.set_defaults(run=fused)
    mended = ways.add_parser("repair")
    mended.set_defaults(run=repaired)
    mended.add_argument("--data", default="cifar10_jpeg,gtsrb")
    mended.add_argument("--nets", default="vgg,vgg-plain,resnet20")
    mended.add_argument("--width", type=int, default=32)
    mended.add_argument("--pairs", type=int, default=1)
    mended.add_argument("--epochs", type=int, default=8)
    visits = ways.add_parser("order")
    visits.set_defaults(run=orders)
    visits.add_argument("--nets", default="resnet20,llama,gpt2,bert")
    visits.add_argument("--pairs", type=int, default=4)
    visits.add_argument("--seeds", type=int, default=5)
    for one, width in ((zips, 512), (fusion, 256), (several, 256)):
        one.add_argument("--data", default="mnist")
        one.add_argument("--width", type=int, default=width)
        one.add_argument("--depth", type=int, default=2)
        if one is not several:
            one.add_argument("--pairs", type=int, default=3)
        one.add_argument("--epochs", type=int, default=5)
        one.add_argument("--decay", type=float, default=0.5)
    for one in (of, fast, zips, fusion, several, mended, visits):
        one.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = options.run(options)
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
