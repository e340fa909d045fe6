"""A merge of four 7 B-shaped models under a budget of 2 GiB, and its time for a GiB beside that of 0.5 B ones.

    python benchmarks/large.py [--folder .bench] [--methods linear,ties] [--memory 2GiB] [--json OUT.json]

The inputs are sparse files: right headers, and zeros that take no room on the disk. None is in the page cache at
the start; 63 GiB are read and written for 7 B. A GiB is of inputs or output, its time that beyond a merge
of 0.1 B-shaped models, which pays for the start. The best of several rounds is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from math import prod
from pathlib import Path

from compare import Run, best, measure
from models import config, shapes

LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
WEIGHTS = (0.5, 0.3, 0.2)


def large(layers: int) -> dict[str, tuple[int, ...]]:
    """The shapes of models.py with the widths of a 7 B Llama."""
    wider = {1024: LARGE["hidden_size"], 3072: LARGE["intermediate_size"], 32000: 32000}
    return {n: tuple(wider[d] for d in s) for n, s in shapes(layers).items()}


def sparse(path: Path, found: dict[str, tuple[int, ...]], about: dict[str, object]) -> None:
    """A safetensors file of zeros in bf16, all of it a hole but the header."""
    header, at = {}, 0
    for name, shape in found.items():
        size = 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)
    (path / "config.json").write_text(json.dumps(about))


def chill(folder: Path) -> None:
    """Take the inputs out of the page cache, where only the small ones would fit."""
    os.sync()
    for path in folder.glob("*/model.safetensors"):
        with path.open("rb") as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


SIZES = (
    ("0.1 B", shapes(2), config(2), 3),
    ("0.5 B", shapes(32), config(32), 3),
    ("7 B", large(32), config(32) | LARGE | {"num_key_value_heads": 32}, 1),
)


def recipe(folder: Path, method: str) -> Path:
    models = "".join(
        f"  - {{model: {folder / f'ft{i + 1}'}, parameters: {{weight: {w}}}}}\n"
        for i, w in enumerate(WEIGHTS)
    )
    path = folder / f"{method}.yml"
    base = f"  - {{model: {folder / 'base'}, parameters: {{weight: 0.1}}}}\n" if method == "linear" else ""
    anchor = "" if method == "linear" else f"base_model: {folder / 'base'}\n"
    path.write_text(f"merge_method: {method}\n{anchor}models:\n{models}{base}dtype: bfloat16\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--methods", default="linear,task_arithmetic")
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    results: dict[str, dict[str, object]] = {}
    print(
        f"{'':24} {'GiB':>6} {'CPU s':>8} {'wall s':>8} {'anon MiB':>9} {'CPU s / GiB':>12} {'wall s / GiB':>13}"
    )
    small: dict[str, tuple[float, Run]] = {}
    for size, found, about, rounds in SIZES:
        folder = args.folder.absolute() / size.replace(" ", "")
        for name in ("base", "ft1", "ft2", "ft3"):
            sparse(folder / name, found, about)
        gib = 5 * 2 * sum(prod(s) for s in found.values()) / 2**30
        for method in args.methods.split(","):
            path, out = recipe(folder, method), folder / "out"
            command = [sys.executable, "-m", "weft.cli.main", "merge", str(path), str(out), "-q"]
            runs = []
            for _ in range(rounds):
                chill(folder)
                runs.append(measure([*command, "--memory", args.memory, "--no-digests"], env))
                shutil.rmtree(out)
            run = best(runs)
            line = f"{method + ', ' + size:24} {gib:6.1f} {run.cpu:8.1f} {run.wall:8.1f} {run.anon_mib:9.0f}"
            results[f"{method}, {size}"] = asdict(run) | {"gib": gib}
            less, start = small.setdefault(method, (gib, run))
            if gib > less:
                cpu, wall = (run.cpu - start.cpu) / (gib - less), (run.wall - start.wall) / (gib - less)
                results[f"{method}, {size}"] |= {"cpu_gib": cpu, "wall_gib": wall}
                line += f" {cpu:12.2f} {wall:13.2f}"
            print(line, flush=True)
        shutil.rmtree(folder)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
