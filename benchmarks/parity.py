"""MergeKit and weft on the same recipes and the same tiny models, tensor by tensor.

    python benchmarks/parity.py --mergekit PYTHON [--folder .bench] [--only ties] [--save tests/parity/goldens.npz]
                                [--page docs/differences-from-mergekit.md]

The recipes are those of tests/parity/cases.py: every method, filters and gradients, slices, tokenizers, adapters,
documents that build on each other. weft runs them with `compat: mergekit`. Prints the largest difference of any
value, relative to the largest value of its tensor; `--save` keeps projections of MergeKit's outputs as goldens,
`--page` writes the table into the page of differences.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "parity"))
from cases import CASES, Case, filled, models, ours, projections

import weft


def theirs(case: Case, text: str, folder: Path, python: Path) -> dict[str, Tensor] | str:
    """MergeKit's tensors, or the last line of what it said."""
    out, recipe = folder / "theirs", folder / "theirs.yml"
    shutil.rmtree(out, ignore_errors=True)
    recipe.write_text(text)
    script = {"yaml": "run_yaml", "multi": "multimerge", "moe": "moe"}[case.command]
    flags = {
        "yaml": [str(out), "--random-seed", "0", "--lora-merge-cache", str(folder / "lora-cache"), "--quiet"],
        "multi": ["--out-path", str(out), "--intermediate-dir", str(folder / "between"), "--quiet"],
        "moe": [str(out), "--quiet"],
    }[case.command]
    command = [
        str(python),
        "-c",
        f"from mergekit.scripts.{script} import main; main()",
        str(recipe),
        *flags,
    ]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1].replace(f"{folder}/", "")
    return {n: t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}


def written(case: Case, text: str, folder: Path) -> dict[str, Tensor]:
    """What weft wrote."""
    out = folder / "ours"
    weft.save(ours(case, text), out, overwrite=True)
    return {n: t for f in sorted(out.glob("*.safetensors")) for n, t in load_file(f).items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--mergekit", type=Path, required=True, help="python of an environment that has mergekit"
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--page", type=Path)
    args = parser.parse_args()
    folder = args.folder.absolute() / "parity"
    paths = models(folder)
    found: dict[str, dict[str, Tensor] | str] = {}
    rows = []
    for case in CASES:
        if args.only and args.only not in case.name:
            continue
        text = filled(case, paths)
        other = found[case.name] = theirs(case, text, folder, args.mergekit)
        try:
            mine = written(case, text, folder)
            told = f"MergeKit fails: {other[:120]}" if isinstance(other, str) else compared(mine, other)
        except weft.WeftError as error:
            told = "refused"
            print(str(error).splitlines()[-1].strip())
        rows.append((case, told))
        print(f"{case.name:32} {told}{'   ' + case.differs if case.differs else ''}", flush=True)
    if args.save:
        keep(found, args.save)
    if args.page:
        write_table(rows, args.page)


def keep(found: Mapping[str, dict[str, Tensor] | str], path: Path) -> None:
    """Goldens: case → projections; `names`, as JSON: case → the tensors' names, or what MergeKit died of."""
    made = {n: projections(s).astype(np.float32) for n, s in found.items() if not isinstance(s, str)}
    names = {n: s if isinstance(s, str) else sorted(s) for n, s in found.items()}
    np.savez_compressed(path, names=np.array(json.dumps(names)), **made)


def write_table(rows: Sequence[tuple[Case, str]], page: Path) -> None:
    """Replace what stands between the page's marks."""
    lines = ["| recipe | largest difference | why |", "|---|---|---|"]
    lines += [f"| {case.name} | {told.partition(' of ')[0]} | {case.differs} |" for case, told in rows]
    before, start, rest = page.read_text().partition("<!-- parity -->\n")
    _, end, after = rest.partition("<!-- /parity -->")
    page.write_text(before + start + "\n".join(lines) + "\n" + end + after)


def compared(mine: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> str:
    if other.keys() - mine.keys():
        return f"other names: {sorted(other.keys() - mine.keys())[:3]} not in weft's"
    more = (
        f", without {len(mine.keys() - other.keys())} that MergeKit lacks"
        if mine.keys() - other.keys()
        else ""
    )
    shapes = [n for n in other if mine[n].shape != other[n].shape]
    if shapes:
        return f"other shapes: {[(n, tuple(mine[n].shape), tuple(other[n].shape)) for n in shapes[:2]]}"
    off = {
        n: float((mine[n].double() - t.double()).abs().max() / t.double().abs().max().clamp(min=1e-9))
        for n, t in other.items()
    }
    worst = max(off, key=lambda n: off[n])
    return (
        f"{off[worst]:.1e} of {worst}, {sum(v > 2e-6 for v in off.values())} of {len(off)} beyond 2e-6{more}"
    )


if __name__ == "__main__":
    main()
