"""The solvers on experts of ViT-B/32's shape against the plain formulas in torch, on one machine, in one run.

    python benchmarks/solvers.py spectral|gram [--blocks 12] [--experts 8] [--rank 16 | --rank 0] [--json OUT.json]

Each route is a process of its own that reads safetensors files of float32 and writes one: `plain` holds all
task vectors, as the published codes do, and follows the paper's formula with torch.linalg.svd in float32 (at the
numerical rank where the experts have one, since it gives something else otherwise); `weft` is weft.merge and
weft.save. `--rank 0` gives task vectors of full rank. Seconds are wall and CPU time of the merge without imports,
memory is the process's peak above what it holds after its imports; the difference is the largest relative Frobenius
distance of an update between the two outputs. `gram` merges by RegMean (Gram matrices of inputs of full rank, one
file of float32 an expert) and by SWUDI, in float32 with torch.inverse and torch.linalg.eigh as their codes do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

SPECTRAL = ("tsv", "iso_c")
GRAM = ("regmean", "swudi")


def shapes(blocks: int, width: int = 768) -> dict[str, tuple[int, ...]]:
    """Weights of the blocks of a vision transformer."""
    found: dict[str, tuple[int, ...]] = {}
    for i in range(blocks):
        for part, shape in (
            ("q_proj", (width, width)), ("k_proj", (width, width)), ("v_proj", (width, width)),
            ("out_proj", (width, width)), ("fc1", (4 * width, width)), ("fc2", (width, 4 * width)),
        ):  # fmt: skip
            found[f"layers.{i}.{part}.weight"] = shape
            found[f"layers.{i}.{part}.bias"] = shape[:1]
    return found


def make(folder: Path, blocks: int, experts: int, rank: int, width: int) -> None:
    """A base and its experts; rank 0 for task vectors of full rank."""
    g = torch.Generator().manual_seed(0)
    base = {n: 0.02 * torch.randn(s, generator=g) for n, s in shapes(blocks, width).items()}
    save_file(base, folder / "base.safetensors")
    for i in range(experts):
        tuned = {}
        for name, t in base.items():
            if rank and t.ndim == 2:
                b, a = (torch.randn(*s, generator=g) for s in ((t.shape[0], rank), (rank, t.shape[1])))
                step = b @ a / rank**0.5
            else:
                step = torch.randn(t.shape, generator=g)
            tuned[name] = t + 0.01 * step
        save_file(tuned, folder / f"expert{i}.safetensors")


def make_grams(folder: Path, blocks: int, experts: int, width: int) -> None:
    """Statistics of inputs: Gram matrices of full rank, some features of which are larger than others."""
    import weft
    from weft.checkpoints.memory import StateDict
    from weft.checkpoints.model import Model
    from weft.methods.kinds import ABOUT

    g = torch.Generator().manual_seed(1)
    told = {ABOUT: {"samples": 256, "transposed": [], "tied": {}}}
    for i in range(experts):
        values = {}
        for name, shape in shapes(blocks, width).items():
            if len(shape) == 2:
                x = torch.randn(2 * shape[1], shape[1], generator=g) * torch.linspace(0.5, 2, shape[1])
                values[f"gram/{name}"] = x.T @ x / len(x)
        weft.save(Model(StateDict(values), told, (), "grams"), folder / f"grams{i}", overwrite=True)


def plain_gram(method: str, deltas: list[Tensor], grams: list[Tensor]) -> Tensor:
    """RegMean or SWUDI of one matrix as their codes write them."""
    if method == "regmean":
        keep = [g * 0.9 + torch.diag(g.diagonal()) * 0.1 for g in grams]
        weighted = torch.stack([g @ d.T for g, d in zip(keep, deltas, strict=True)]).sum(0)
        return (torch.inverse(torch.stack(keep).sum(0)) @ weighted).T
    x = torch.stack(deltas)
    own = 1 / x.flatten(1).norm(dim=1).square()
    squares = x.mT @ x
    c, d = torch.einsum("n,nbc->bc", own, squares), torch.einsum("n,nac->ac", own, x @ squares)
    values, v = torch.linalg.eigh(c)
    values = values.clamp(min=1e-8)
    f = 1 - torch.exp(-values * 1300.0)
    f[: c.shape[0] - int(0.65 * c.shape[0] + 0.999)] = 0
    start = x.sum(0)
    return start - (start @ v * f) @ v.T + (d @ v * (f / values)) @ v.T


def plain_spectral(method: str, deltas: list[Tensor], clip: bool) -> Tensor:
    """TSV-M or Iso-C of one matrix as the papers write them."""

    def svd(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, s, vh = torch.linalg.svd(t, full_matrices=False)
        r = int((s > 1e-4 * s[0]).sum()) if clip else len(s)
        return u[:, :r], s[:r], vh[:r]

    if method == "iso_c":
        u, s, vh = svd(torch.stack(deltas).sum(0))
        return s.mean() * (u @ vh)
    r = min(deltas[0].shape) // len(deltas)
    parts = [tuple(p[..., :r] if i < 2 else p[:r] for i, p in enumerate(svd(d))) for d in deltas]
    u, s, vh = (
        torch.cat([p[0] for p in parts], 1),
        torch.cat([p[1] for p in parts]),
        torch.cat([p[2] for p in parts]),
    )
    (ul, _, ur), (vl, _, vr) = svd(u), svd(vh)
    return (ul @ ur * s) @ (vl @ vr)


def plain(method: str, folder: Path, experts: int, rank: int, out: Path) -> None:
    """The whole model, all task vectors at once."""
    base = load_file(folder / "base.safetensors")
    loaded = [load_file(folder / f"expert{i}.safetensors") for i in range(experts)]
    deltas = [{n: t - base[n] for n, t in e.items()} for e in loaded]
    grams = (
        [load_file(folder / f"grams{i}" / "model.safetensors") for i in range(experts)]
        if method == "regmean" else []
    )  # fmt: skip
    merged = {}
    for name, t in base.items():
        own = [d[name] for d in deltas]
        if t.ndim < 2:
            step = torch.stack(own).mean(0)
        elif method in GRAM:
            step = plain_gram(method, own, [g[f"gram/{name}"] for g in grams])
        else:
            step = plain_spectral(method, own, rank > 0)
        merged[name] = t + step
    save_file(merged, out)


def ours(method: str, folder: Path, experts: int, out: Path, threads: int) -> None:
    """weft.merge and weft.save."""
    import weft

    models = [folder / f"expert{i}.safetensors" for i in range(experts)]
    known = [folder / f"grams{i}" for i in range(experts)] if method == "regmean" else None
    node = weft.merge(models, method, base=folder / "base.safetensors", statistics=known)
    weft.save(node, out, threads=threads)


def held() -> float:
    """MiB of this process that are its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def one(route: str, method: str, folder: Path, experts: int, rank: int, out: Path, threads: int) -> None:
    """Run a route in this process and print what it took."""
    import threading

    import weft  # noqa: F401  (imported before the clock starts)
    from weft.methods.registry import METHODS

    len(METHODS)
    torch.set_num_threads(threads)
    before, peak, done = held(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    if route == "plain":
        plain(method, folder, experts, rank, out)
    else:
        ours(method, folder, experts, out, threads)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": peak[0] - before}))


def distance(base: Path, a: Path, b: Path) -> float:
    """The largest relative distance of an update, over tensors."""
    start, one, other = load_file(base), load_file(a), load_file(b)
    found = [
        float((one[n] - other[n]).double().norm() / (other[n] - t).double().norm()) for n, t in start.items()
    ]
    return max(found)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """TSV-M and Iso-C, or RegMean and SWUDI, both routes."""
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        make(folder, args.blocks, args.experts, args.rank, args.width)
        if args.half == "gram":
            make_grams(folder, args.blocks, args.experts, args.width)
        for method in args.only or (GRAM if args.half == "gram" else SPECTRAL):
            outs = {}
            for route in ("plain", "weft"):
                outs[route] = folder / f"{method}-{route}.safetensors"
                command = [sys.executable, __file__, args.half, "--one", route, "--method", method,
                           "--folder", tmp, "--out", str(outs[route]), "--experts", str(args.experts),
                           "--rank", str(args.rank), "--threads", str(args.threads)]  # fmt: skip
                env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
                best: dict[str, float] = {}
                for _ in range(args.rounds):
                    outs[route].unlink(missing_ok=True)
                    found = json.loads(
                        subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout
                    )
                    best = min(best or found, found, key=lambda f: f["seconds"])
                rows[f"{method} {route}"] = best
            p, w = rows[f"{method} plain"], rows[f"{method} weft"]
            w["difference"] = distance(folder / "base.safetensors", outs["weft"], outs["plain"])
            print(
                f"{method:8} plain {p['seconds']:7.2f} s, CPU {p['cpu']:7.2f} s {p['mib']:7.0f} MiB   "
                f"weft {w['seconds']:7.2f} s, CPU {w['cpu']:7.2f} s "
                f"{w['mib']:7.0f} MiB   {p['seconds'] / w['seconds']:5.1f} x faster "
                f"{p['mib'] / w['mib']:5.1f} x less   difference {w['difference']:.1e}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("half", choices=["spectral", "gram"])
    parser.add_argument("--only", nargs="+", choices=[*SPECTRAL, *GRAM], metavar="METHOD")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="768 is that of ViT-B, 192 of ViT-Ti")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of the task vectors; 0 for full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    for name in ("one", "method", "folder", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.method, Path(args.folder), args.experts, args.rank, Path(args.out), args.threads)
        return
    print(
        f"{args.experts} experts, {args.blocks} blocks of width {args.width}, rank {args.rank or 'full'}, "
        f"{args.threads} threads, torch {torch.__version__}"
    )
    rows = compare(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
