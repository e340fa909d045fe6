"""Merging adapters by their factors against the dense route and against PEFT, on one machine, in one run.

    python benchmarks/adapters.py [--size 2048] [--adapters 4] [--rank 16] [--peft] [--json OUT.json]

Every route makes the best approximation of Σ wᵢBᵢAᵢ of one weight [size, size], all in float64 but PEFT's, which is
float32. `dense` builds the sum and decomposes it (reduced SVD); KnOTS's dense route decomposes the updates side by
side. The difference is the largest relative Frobenius distance of the results; ratios are of wall time.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.adapters.factors import Factors
from weft.adapters.lowrank import difference, truncated
from weft.adapters.spaces import knots_basis


def updates(count: int, size: int, rank: int) -> list[Factors]:
    """Random updates of one weight."""
    g = torch.Generator().manual_seed(0)
    return [
        Factors(
            torch.randn(size, rank, generator=g, dtype=torch.float64),
            torch.randn(rank, size, generator=g, dtype=torch.float64) / size**0.5,
            (size, size),
        )
        for _ in range(count)
    ]


def timed(run: Callable[[], Any], rounds: int) -> tuple[float, Any]:
    """The best wall time of some rounds, and the result."""
    best, made = float("inf"), None
    for _ in range(rounds):
        began = time.perf_counter()
        made = run()
        best = min(best, time.perf_counter() - began)
    return best, made


def dense_svd(found: list[Factors], weights: list[float], rank: int) -> Factors:
    """Form Σ wᵢBᵢAᵢ, decompose it, keep a rank."""
    whole = torch.zeros(found[0].shape, dtype=torch.float64)
    for f, w in zip(found, weights, strict=True):
        whole.addmm_(f.b, f.a, alpha=w)
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    return Factors(u[:, :rank] * s[:rank], vh[:rank], found[0].shape)


def peft_svd(found: list[Factors], weights: list[float], rank: int, rounds: int) -> tuple[float, Factors]:
    """The same by PEFT's add_weighted_adapter, which is given reduced rather than full matrices."""
    from peft import LoraConfig, get_peft_model

    size = found[0].shape[0]
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(nn.Sequential(nn.Linear(size, size, bias=False)), settings, adapter_name="0")
        for i in range(1, len(found)):
            model.add_adapter(str(i), settings)
        layer = model.base_model.model[0]
        with torch.no_grad():
            for i, f in enumerate(found):
                layer.lora_A[str(i)].weight.copy_(f.a)
                layer.lora_B[str(i)].weight.copy_(f.b)
        names = [str(i) for i in range(len(found))]
        best = float("inf")
        for n in range(rounds):
            began = time.perf_counter()
            model.add_weighted_adapter(
                names, weights, f"merged{n}", "svd", svd_rank=rank, svd_full_matrices=False
            )
            best = min(best, time.perf_counter() - began)
    b, a = (getattr(layer, side)["merged0"].weight.detach().double() for side in ("lora_B", "lora_A"))
    return best, Factors(b, a, found[0].shape)


def dense_knots(found: list[Factors]) -> Tensor:
    """Singular values of the updates side by side."""
    s: Tensor = torch.linalg.svd(torch.cat([f.b @ f.a for f in found], 1), full_matrices=False).S
    return s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--peft", action="store_true", help="PEFT's svd as well")
    parser.add_argument("--knots", action="store_true", help="KnOTS's dense basis as well (slow)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of the factors' route; the dense ones run once"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = updates(args.adapters, args.size, args.rank)
    weights = [(i + 1) / args.adapters for i in range(args.adapters)]
    print(
        f"{args.adapters} adapters of rank {args.rank} on [{args.size}, {args.size}], {torch.get_num_threads()} "
        f"threads, torch {torch.__version__}"
    )
    rows: dict[str, dict[str, float]] = {}

    def row(name: str, seconds: float, against: float, distance: float) -> None:
        rows[name] = {"seconds": seconds, "ratio": seconds / against, "difference": distance}
        print(
            f"{name:28} {seconds:10.4f} s   {seconds / against:8.1f} x   difference {distance:.1e}",
            flush=True,
        )

    ours, made = timed(lambda: truncated(found, weights, rank=args.rank), args.rounds)
    row("factors (weft svd)", ours, ours, 0.0)
    seconds, theirs = timed(lambda: dense_svd(found, weights, args.rank), 1)
    row("dense, reduced SVD", seconds, ours, difference(made.factors, theirs))
    if args.peft:
        seconds, theirs = peft_svd(found, weights, args.rank, 1)
        row("PEFT svd (float32)", seconds, ours, difference(made.factors, theirs))
    if args.knots:
        ours, basis = timed(lambda: knots_basis(found), args.rounds)
        row("KnOTS basis, factors", ours, ours, 0.0)
        seconds, s = timed(lambda: dense_knots(found), 1)
        spectrum = basis.values.square().sum((0, 2)).sqrt()
        kept = s[: len(spectrum)]
        row("KnOTS basis, dense SVD", seconds, ours, float((spectrum - kept).norm() / kept.norm()))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
