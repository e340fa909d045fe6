"""Stacked layers, a mixture of experts, an extracted adapter: weft against MergeKit, whole processes, in one run.

    python benchmarks/features.py [--folder .bench] [--only slices,moe,lora] [--mergekit PYTHON] [--json OUT.json]

The models are those of compare.py. `slices` stacks two thirds of one model on two thirds of another; `moe` makes a
Mixtral of three fine-tunes with random gates; `lora` takes a fine-tune's difference as an adapter of rank 16, by
weft also with `--fast` (a sketch). Each is run twice by weft and the second counts: inputs are hashed by then.
Without --mergekit only weft is run. Ratios above 1 mean that weft takes less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import Run, measure
from models import make

WEFT = [sys.executable, "-m", "weft.cli.main"]


@dataclass
class Case:
    """One job: weft's arguments by label, and MergeKit's script with its own."""

    weft: dict[str, list[str]]
    script: str
    theirs: list[str]


def slices(folder: Path, paths: dict[str, Path], out: Path) -> Case:
    n = json.loads((paths["base"] / "config.json").read_text())["num_hidden_layers"]
    recipe = folder / "slices.yml"
    recipe.write_text(
        "merge_method: passthrough\ndtype: bfloat16\nslices:\n"
        f"  - sources: [{{model: {paths['ft1']}, layer_range: [0, {2 * n // 3}]}}]\n"
        f"  - sources: [{{model: {paths['ft2']}, layer_range: [{n // 3}, {n}]}}]\n"
    )
    flags = ["--quiet", "--lazy-unpickle", "--no-copy-tokenizer"]
    return Case(
        {"slices": ["merge", str(recipe), str(out), "-q"]}, "run_yaml", [str(recipe), str(out), *flags]
    )


def moe(folder: Path, paths: dict[str, Path], out: Path) -> Case:
    recipe = folder / "moe.yml"
    experts = "".join(
        f"  - {{source_model: {paths[f'ft{i}']}, positive_prompts: [text {i}]}}\n" for i in (1, 2, 3)
    )
    text = f"base_model: {paths['base']}\ngate_mode: random\ndtype: bfloat16\nexperts:\n{experts}"
    recipe.write_text(text)
    words = {
        w: i for i, w in enumerate(["<s>", "</s>", "<unk>", "text", "1", "2", "3"])
    }  # MergeKit asks for one
    (paths["base"] / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None,
        "truncation": None, "padding": None, "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
    }))  # fmt: skip
    (paths["base"] / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    flags = ["--quiet", "--lazy-unpickle", "--no-copy-tokenizer", "--device", "cpu"]
    return Case({"moe": ["moe", str(recipe), str(out)]}, "moe", [str(recipe), str(out), *flags])


def lora(folder: Path, paths: dict[str, Path], out: Path) -> Case:
    ours = ["lora", "extract", str(paths["ft1"]), str(paths["base"]), str(out), "--rank", "16"]
    theirs = ["--model", str(paths["ft1"]), "--base-model", str(paths["base"]), "--out-path", str(out)]
    flags = ["--max-rank", "16", "--embed-lora", "--skip-undecomposable", "--quiet", "--lazy-unpickle"]
    return Case({"lora": ours, "lora --fast": [*ours, "--fast"]}, "extract_lora", [*theirs, *flags])


CASES = {"slices": slices, "moe": moe, "lora": lora}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--mergekit", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder.absolute()
    paths = dict(zip(("base", "ft1", "ft2", "ft3"), make(folder, args.parameters), strict=True))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    out = folder / "out"
    results: dict[str, Run] = {}

    def timed(label: str, command: list[str]) -> Run:
        shutil.rmtree(out, ignore_errors=True)
        results[label] = measure(command, env)
        shutil.rmtree(out, ignore_errors=True)
        return results[label]

    start = timed("import torch", [sys.executable, "-c", "import torch"])
    cells = f"{'CPU s':>7} {'wall s':>8} {'anon MiB':>8}"
    print(f"{'':16} {'weft':>25}  {'MergeKit':>25}  MergeKit : weft")
    print(f"{'case':16} {cells}  {cells}  {'CPU':>6} {'wall':>6}")
    print(f"{'import torch':16} {start.cpu:7.1f} {start.wall:8.1f} {start.anon_mib:8.0f}")
    for name in args.only.split(","):
        case = CASES[name](folder, paths, out)
        b = None
        if args.mergekit:
            code = f"from mergekit.scripts.{case.script} import main; main()"
            b = timed(f"{name}, MergeKit", [str(args.mergekit), "-c", code, *case.theirs])
        for label, command in case.weft.items():
            timed(label, [*WEFT, *command])  # hashes the inputs and compiles kernels, once a machine
            a = timed(label, [*WEFT, *command])
            line = f"{label:16} {a.cpu:7.1f} {a.wall:8.1f} {a.anon_mib:8.0f}"
            if b is not None:
                line += f"  {b.cpu:7.1f} {b.wall:8.1f} {b.anon_mib:8.0f}"
                line += f"  {b.cpu / a.cpu:6.1f} {b.wall / a.wall:6.1f}"
            print(line, flush=True)
    if args.json:
        args.json.write_text(json.dumps({k: asdict(v) for k, v in results.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
