"""The solvers on experts of ViT-B/32's shape, against FusionBench and the plain formulas, on one machine.

    python benchmarks/solvers.py [--peer PYTHON] [--only METHOD …] [--ranks 16 0] [--rows ROWS.json] [--folder DIR]

TSV-M, Iso-C, RegMean (Gram matrices of full rank, one file of float32 an expert) and SWUDI merge eight experts of
twelve blocks; task vectors of rank 16, as of adapters, or 0 for full rank. Each side is a process of its own that
reads safetensors files of float32 and writes one:

    weft       weft.merge and weft.save
    peer       FusionBench's functions for TSV-M, Iso-C and RegMean, by an interpreter that can import fusion_bench
    plain      the paper's formula in float32, all task vectors at once, as published codes do: for SWUDI, which
               FusionBench lacks, for all without --peer, and, of rank 16, for TSV-M and Iso-C at the numerical
               rank, since FusionBench takes null directions for real ones

Seconds are wall and CPU time of the merge without imports, memory is the process's peak of its own (anonymous)
memory above what it holds after its imports. Weights that a side maps from files do not count, though weft maps
none; Gram matrices are in memory, where FusionBench's hooks leave them. The difference is the largest relative
Frobenius distance of an update. A row is kept in --rows as soon as it is measured, and not measured again;
--folder keeps the experts (8 GB for both ranks).
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
METHODS = (*SPECTRAL, *GRAM)
PEER = ("tsv", "iso_c", "regmean")
"""What FusionBench has."""


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
    """Statistics of inputs: Gram matrices of full rank, some features of which are larger than others.

    One an expert and number of inputs, its features moved on from block to block.
    """
    import weft
    from weft.checkpoints.memory import StateDict
    from weft.checkpoints.model import Model
    from weft.methods.kinds import ABOUT

    g = torch.Generator().manual_seed(1)
    told = {ABOUT: {"samples": 256, "transposed": [], "tied": {}}}
    for i in range(experts):
        seen = {}
        for n in (width, 4 * width):
            x = torch.randn(2 * n, n, generator=g) * torch.linspace(0.5, 2, n)
            seen[n] = x.T @ x / len(x)
        values = {}
        for at, (name, shape) in enumerate(shapes(blocks, width).items()):
            if len(shape) == 2:
                values[f"gram/{name}"] = seen[shape[1]].roll((at, at), (0, 1))
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


def loaded(folder: Path, method: str, experts: int) -> tuple[dict[str, Tensor], list[Any], list[Any]]:
    """The base, the experts, and for RegMean their Gram matrices."""
    known = [folder.parent / f"grams{i}" / "model.safetensors" for i in range(experts)]
    return (
        load_file(folder / "base.safetensors"),
        [load_file(folder / f"expert{i}.safetensors") for i in range(experts)],
        [{n: g.clone() for n, g in load_file(f).items()} for f in known] if method == "regmean" else [],
    )


def plain(method: str, folder: Path, experts: int, rank: int, out: Path) -> None:
    """The whole model, all task vectors at once."""
    base, tuned, grams = loaded(folder, method, experts)
    deltas = [{n: t - base[n] for n, t in e.items()} for e in tuned]
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


def peer(method: str, folder: Path, experts: int, out: Path) -> None:
    """FusionBench's own functions, as its algorithms call them."""
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.regmean.regmean import merging_with_regmean_weights
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_sub

    base, tuned, grams = loaded(folder, method, experts)
    with torch.no_grad():
        if method == "regmean":
            own = [{n[5:].removesuffix(".weight"): g for n, g in e.items()} for e in grams]
            values = {n: [e[n] for e in tuned] for n in base}
            merged = merging_with_regmean_weights(values, own, reduce_non_diagonal_ratio=0.9)
        else:
            deltas = [state_dict_sub(e, base) for e in tuned]
            by = iso_c if method == "iso_c" else compute_and_sum_svd_mem_reduction
            merged = state_dict_add(base, by(deltas, accelerator="cpu"))
    save_file({n: t.contiguous() for n, t in merged.items()}, out)


def ours(method: str, folder: Path, experts: int, out: Path, threads: int) -> None:
    """weft.merge and weft.save."""
    import weft

    models = [folder / f"expert{i}.safetensors" for i in range(experts)]
    known = [folder.parent / f"grams{i}" for i in range(experts)] if method == "regmean" else None
    node = weft.merge(models, method, base=folder / "base.safetensors", statistics=known)
    weft.save(node, out, threads=threads)


def held() -> float:
    """MiB of this process that are its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    return 0.0


def one(side: str, method: str, folder: Path, args: argparse.Namespace, rank: int, out: Path) -> None:
    """Run a side in this process and print what it took."""
    import threading

    if side == "weft":  # imported before the clock starts
        from weft.methods.registry import METHODS as known

        len(known)
    elif side == "peer":
        import fusion_bench.method.regmean.regmean  # noqa: F401
    torch.set_num_threads(args.threads)
    before, peak, done = held(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began, used = time.perf_counter(), time.process_time()
    if side == "plain":
        plain(method, folder, args.experts, rank, out)
    elif side == "peer":
        peer(method, folder, args.experts, out)
    else:
        ours(method, folder, args.experts, out, args.threads)
    seconds, cpu = time.perf_counter() - began, time.process_time() - used
    done.set()
    watcher.join()
    print(json.dumps({"seconds": seconds, "cpu": cpu, "mib": peak[0] - before}))


def sides(method: str, rank: int, peered: bool) -> list[str]:
    """Who merges; weft last."""
    with_peer = peered and method in PEER
    right = method == "regmean" or not rank  # whether FusionBench's result is the formula's
    return [*(["peer"] if with_peer else []), *([] if with_peer and right else ["plain"]), "weft"]


def distance(base: Path, a: Path, b: Path) -> float:
    """The largest relative distance of an update, over tensors."""
    start, one, other = load_file(base), load_file(a), load_file(b)
    found = [
        float((one[n] - other[n]).double().norm() / (other[n] - t).double().norm()) for n, t in start.items()
    ]
    return max(found)


def measured(method: str, rank: int, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One method on experts of one rank by every side."""
    row: dict[str, Any] = {}
    outs = {s: folder / f"{method}-{s}.safetensors" for s in sides(method, rank, args.peer is not None)}
    for side, out in outs.items():
        command = [str(args.peer) if side == "peer" else sys.executable, __file__, "--one", side, "--only", method,
                   "--folder", str(folder), "--out", str(out), "--experts", str(args.experts),
                   "--ranks", str(rank), "--threads", str(args.threads)]  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        for _ in range(args.rounds):
            out.unlink(missing_ok=True)
            told = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(told.splitlines()[-1])
            row[side] = min(row.get(side, found), found, key=lambda f: f["seconds"])
    for side in outs:
        if side != "weft":
            row[side]["difference"] = distance(folder / "base.safetensors", outs["weft"], outs[side])
    for out in outs.values():
        out.unlink()
    return row


def show(name: str, row: dict[str, Any]) -> None:
    """A row as text; how many times faster and smaller weft is."""
    own = row["weft"]
    print(f"{name}: weft {own['seconds']:.1f} s, CPU {own['cpu']:.1f} s, {own['mib']:.0f} MiB")
    for side, it in row.items():
        if side != "weft":
            print(
                f"  {side} {it['seconds']:.1f} s, CPU {it['cpu']:.1f} s, {it['mib']:.0f} MiB: "
                f"{it['seconds'] / own['seconds']:.1f} x the time, {it['cpu'] / own['cpu']:.1f} x the CPU time, "
                f"{it['mib'] / own['mib']:.1f} x the memory, difference {it['difference']:.1e}",
                flush=True,
            )


def compare(folder: Path, args: argparse.Namespace) -> None:
    """Every method and rank that has no row yet."""
    rows = json.loads(args.rows.read_text()) if args.rows and args.rows.exists() else {}
    for rank in args.ranks:
        for method in args.only:
            name = f"{method}, {args.experts} experts, {args.blocks} blocks, rank {rank or 'full'}"
            if name not in rows:
                home = folder / f"{args.blocks}-{args.width}-{args.experts}"
                own = home / f"rank{rank}"
                if not (own / "done").exists():
                    own.mkdir(parents=True, exist_ok=True)
                    make(own, args.blocks, args.experts, rank, args.width)
                    (own / "done").touch()
                if method == "regmean" and not (home / "grams-done").exists():
                    make_grams(home, args.blocks, args.experts, args.width)
                    (home / "grams-done").touch()
                rows[name] = measured(method, rank, own, args)
                if args.rows:
                    args.rows.write_text(json.dumps(rows, indent=1) + "\n")
            show(name, rows[name])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD")
    parser.add_argument("--ranks", nargs="+", type=int, default=[16, 0], help="of task vectors; 0 for full")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="768 is that of ViT-B, 192 of ViT-Ti")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="an interpreter that can import fusion_bench")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--rows", type=Path)
    for name in ("one", "out"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one, args.only[0], args.folder, args, args.ranks[0], Path(args.out))
        return
    print(f"{args.threads} threads, torch {torch.__version__}")
    if args.folder:
        compare(args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as tmp:
            compare(Path(tmp), args)


if __name__ == "__main__":
    main()
