"""Merging a model of the shape of Llama 3.2 1B by Gram matrices, in a bounded memory.

    python benchmarks/billion.py [--method regmean] [--experts 4] [--layers 16] [--memory 4GiB] [--folder DIR]

Weights are files of holes, all zero. Gram matrices are files of holes but for their diagonals, random and positive:
dense [in, in] tensors of full rank to whoever reads them, 1.5 GB of disk an expert instead of 6. What they hold
changes neither time nor memory of a merge. It runs in a process of its own, whose anonymous memory is watched;
printed is its peak, what it had after the imports, and what the plan said the largest tensor would take.
"""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path

import numpy as np

Shapes = Mapping[str, tuple[int, ...]]


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """The weights of Llama 3.2 1B, with fewer layers if asked for."""
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 2048),
        "model.norm.weight": (2048,),
    }
    for i in range(layers):
        for part, shape in (
            ("self_attn.q_proj", (2048, 2048)), ("self_attn.k_proj", (512, 2048)),
            ("self_attn.v_proj", (512, 2048)), ("self_attn.o_proj", (2048, 2048)),
            ("mlp.gate_proj", (8192, 2048)), ("mlp.up_proj", (8192, 2048)),
            ("mlp.down_proj", (2048, 8192)), ("input_layernorm", (2048,)), ("post_attention_layernorm", (2048,)),
        ):  # fmt: skip
            found[f"model.layers.{i}.{part}.weight"] = shape
    return found


def write(folder: Path, tensors: Shapes, dtype: str, config: object, seed: int | None) -> None:
    """A model of holes; with a seed the diagonals of its matrices are random."""
    folder.mkdir(parents=True)
    width = {"BF16": 2, "F32": 4}[dtype]
    header, at = {}, 0
    for name, shape in tensors.items():
        size = prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    if seed is not None:
        values = np.memmap(folder / "model.safetensors", np.float32, "r+", 8 + len(text), (at // 4,))
        chance = np.random.default_rng(seed)
        for name, shape in tensors.items():
            start, n = header[name]["data_offsets"][0] // 4, shape[-1]
            step = n + 1 if len(shape) > 1 else 1
            values[start : start + prod(shape) : step] = chance.uniform(0.5, 2, n)
        values.flush()
    (folder / "config.json").write_text(json.dumps(config))


def grams(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """Gram matrices of the layers, [in, in]; of tables and scales their diagonals."""
    return {
        f"gram/{n}": (s[0],) if "embed" in n else (s[-1], s[-1]) if len(s) > 1 else s
        for n, s in tensors.items()
    }


def held() -> int:
    """Bytes of this process that are its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


def merge(folder: Path, method: str, experts: int, memory: str, threads: int) -> None:
    """Merge in this process, and print what it took."""
    import weft
    from weft.engine.budget import parse_size
    from weft.engine.plan import make_plan

    how = weft.METHODS[method]
    models = [folder / f"expert{i}" for i in range(experts)]
    known = [folder / f"grams{i}" for i in range(experts)] if how.needs else None
    more = {"outside": "mean"} if "outside" in how.params else {}
    base = folder / "base" if how.base == "required" else None
    node = weft.merge(models, method, base=base, statistics=known, **more)
    before, peak, done = held(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    planned = make_plan(node, threads=threads, memory=parse_size(memory)).largest
    weft.save(node, folder / f"out-{method}", memory=memory, threads=threads)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    done.set()
    watcher.join()
    print(
        f"{method}, {experts} experts, --memory {memory}: peak {peak[0] / 2**30:.2f} GiB in all, "
        f"{before / 2**30:.2f} of them before; largest tensor planned {planned / 2**30:.2f} GiB; "
        f"{seconds:.0f} s, CPU {cpu:.0f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", nargs="+", default=["regmean"])
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--memory", default="4GiB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        merge(args.folder, args.one, args.experts, args.memory, args.threads)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        folder, model = Path(tmp), shapes(args.layers)
        told = {"weft_statistics": {"samples": 256, "transposed": [], "tied": {}}}
        write(folder / "base", model, "BF16", {"model_type": "llama"}, None)
        for i in range(args.experts):
            write(folder / f"expert{i}", model, "BF16", {"model_type": "llama"}, None)
            write(folder / f"grams{i}", grams(model), "F32", told, i)
        print(f"{sum(map(prod, model.values())) / 1e9:.2f} B parameters, {args.threads} threads", flush=True)
        for method in args.method:
            command = [sys.executable, __file__, "--one", method, "--folder", tmp, "--experts", str(args.experts),
                       "--memory", args.memory, "--threads", str(args.threads)]  # fmt: skip
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
