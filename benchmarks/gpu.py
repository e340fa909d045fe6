"""A CUDA device against this machine's CPU: are the merges equal, and how fast is each?

    python benchmarks/gpu.py [--folder .bench] [--device cuda] [--methods linear,ties]

Merges a 0.5 B-parameter model (base and three fine-tunes, bf16) on both and compares every value. Elementwise
methods must agree to the bit, the others to one unit of the last place of bfloat16. Where torch sees no CUDA
device it says so.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

import weft
from models import make

METHODS = {
    "linear": {"weight": [0.5, 0.3, 0.2]}, "task_arithmetic": {"scale": 0.5}, "slerp": {"t": 0.4}, "karcher": {},
    "ties": {"density": 0.5, "scope": "tensor"}, "dare_ties": {"density": 0.5}, "della": {"density": 0.5},
    "breadcrumbs": {"density": 0.5}, "model_stock": {},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--memory", default="8GiB")
    args = parser.parse_args()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("torch sees no CUDA device here: nothing to compare")
        return
    base, *models = make(args.folder, args.parameters)
    print(f"{'method':16} {'CPU s':>7} {args.device + ' s':>8}  {'GB/s':>6}  {'values that differ':>20}")
    for name in args.methods.split(","):
        method = weft.METHODS[name]
        seconds = {}
        for device in ("cpu", args.device):
            node = weft.merge(
                models[: method.models[1] or len(models)], name,
                base=base if method.base == "required" else None, **METHODS[name],
            )  # fmt: skip
            out = args.folder / f"out-{device.replace(':', '-')}"
            shutil.rmtree(out, ignore_errors=True)
            saved = weft.save(node, out, device=device, memory=args.memory, digests=False)
            seconds[device] = saved.seconds
        pair = [weft.load(args.folder / f"out-{d.replace(':', '-')}") for d in ("cpu", args.device)]
        differ = sum(int((pair[0].read(n) != pair[1].read(n)).sum()) for n in pair[0])
        moved = sum(node.bytes_read(n) for n in node) + node.nbytes
        rate = moved / seconds[args.device] / 1e9
        print(
            f"{name:16} {seconds['cpu']:7.1f} {seconds[args.device]:8.1f}  {rate:6.2f}  "
            f"{differ:12,} of {sum(i.numel for i in node.tensors.values()):,}",
            flush=True,
        )


if __name__ == "__main__":
    main()
