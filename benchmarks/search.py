"""What a search's memory saves: processor seconds a candidate, merged afresh and by the search's evaluator.

    python benchmarks/search.py [--layers 12] [--width 1024] [--method ties]

Three models with a transformer's names, bfloat16, made in a temporary folder; both ways read every tensor of
every candidate once. Prints one JSON object. Files lie in the page cache, as they do in a search.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from weft.checkpoints.base import Checkpoint
from weft.search.candidates import RecipeSource
from weft.search.evaluate import Evaluator, _threads, cores

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")


def make(folder: Path, layers: int, width: int, method: str) -> dict[str, Any]:
    """Three models on disk, and a recipe over them."""
    for seed, name in enumerate(("base", "a", "b")):
        g = torch.Generator().manual_seed(seed)
        state = {
            f"model.layers.{i}.{part}.weight": torch.randn(width, width, generator=g).to(torch.bfloat16)
            for i in range(layers) for part in PARTS
        }  # fmt: skip
        save_file(state, folder / f"{name}.safetensors")
    return {
        "merge_method": method, "base_model": str(folder / "base.safetensors"),
        "models": [str(folder / "a.safetensors"), str(folder / "b.safetensors")],
        "parameters": {"density": 0.5},
    }  # fmt: skip


def read_all(candidate: Checkpoint) -> None:
    """What an evaluation does first: every tensor, in its storage dtype."""
    candidate.survey()
    for name, info in candidate.tensors.items():
        candidate.tensor(name, dtype=info.dtype)


def seconds(run: Any, settings: list[dict[str, Any]]) -> float:
    """The median over candidates, the first left out."""
    times = []
    for s in settings:
        began = time.process_time()
        run(s)
        times.append(time.process_time() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--method", default="ties")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make(Path(folder), args.layers, args.width, args.method)
        source = RecipeSource(recipe)
        shared = [{"parameters.weight": 0.1 * i} for i in range(1, 6)]
        part = [
            {"parameters.weight": [{"filter": "q_proj", "value": 0.1 * i}, {"value": 0.5}]}
            for i in range(1, 6)
        ]
        # processor time of all threads, which other work on the machine hardly changes
        told: dict[str, Any] = {
            "method": args.method,
            "model_mib": 8 * args.layers * args.width**2 >> 20,
            "threads": cores(),
        }
        for label, settings in (("every tensor changes", shared), ("a quarter of the tensors changes", part)):

            def afresh(s: dict[str, Any]) -> None:
                with _threads(cores()):
                    read_all(source.build(s))

            kept = Evaluator(source, (), 8 << 30, cores())

            def searched(s: dict[str, Any], kept: Evaluator = kept) -> None:
                with _threads(cores()):
                    read_all(kept.candidate(s))

            plain, cached = seconds(afresh, settings), seconds(searched, settings)
            told[label] = {"afresh_cpu_s": round(plain, 3), "search_cpu_s": round(cached, 3),
                           "times": round(plain / cached, 2)}  # fmt: skip
        print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
