"""weft against MergeKit on one machine, in one run: CPU seconds, wall seconds, peak anonymous memory.

    python benchmarks/compare.py [--folder .bench] [--methods linear,ties] [--rounds 1] [--json OUT.json]

Both tools run as whole processes on the same recipe and the same files (page cache warm): weft with its
defaults, MergeKit with its fastest CPU flags. MergeKit is installed from PyPI into a virtual environment of
its own under the folder, unless --mergekit names its python. The first line is the floor: the same bytes read
and written by plain file calls. Ratios above 1 mean that weft takes less.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from models import make

BASED = "base_model: {base}\n"
MODELS = "models:\n" + "".join(
    f"  - {{model: {{ft{i}}}, parameters: {{weight: {w}, density: 0.5}}}}\n"
    for i, w in ((1, 0.5), (2, 0.3), (3, 0.2))
)
PLAIN = "models:\n" + "".join(
    f"  - {{model: {{ft{i}}}, parameters: {{weight: {w}}}}}\n" for i, w in ((1, 0.5), (2, 0.3), (3, 0.2))
)
BARE = "models:\n  - {{model: {ft1}}}\n  - {{model: {ft2}}}\n  - {{model: {ft3}}}\n".replace(
    "{{", "{"
).replace("}}", "}")
RECIPES = {
    "linear": PLAIN,
    "task_arithmetic": BASED + PLAIN,
    "slerp": "base_model: {ft1}\nmodels:\n  - {model: {ft1}}\n  - {model: {ft2}}\nparameters: {t: 0.4}\n",
    "ties": BASED + MODELS,
    "della": BASED + MODELS,
    "breadcrumbs": BASED + MODELS,
    "dare_ties": BASED + MODELS,
    # ten steps in both tools: by their own tolerances they stop after different numbers of them
    "karcher": BARE + "parameters: {max_iter: 10, tol: 1.0e-12}\n",
    "model_stock": BASED + BARE,
}
# the recipe as it is (weft reads it by the papers), and with MergeKit's own choices of algorithm
VARIANTS = {"recipe": "", "compat": "compat: mergekit\n"}


@dataclass
class Run:
    cpu: float
    wall: float
    anon_mib: float


def measure(command: list[str], env: dict[str, str]) -> Run:
    """Run a command to its end; CPU of it and its children, wall time, peak anonymous memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = [0.0]

    def watch() -> None:
        while process.poll() is None:
            try:
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                    if line.startswith("RssAnon"):
                        peak[0] = max(peak[0], int(line.split()[1]) / 1024)
            except OSError:
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    errors = process.stderr.read()
    process.wait()
    watcher.join()
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode()[-3000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Run(cpu, wall, peak[0])


FLOOR = """
import sys
for source in sys.argv[2:]:
    with open(source, "rb", buffering=0) as f:
        buffer = bytearray(1 << 20)
        while f.readinto(buffer):
            pass
with open(sys.argv[1], "wb", buffering=0) as f:
    left = __import__("os").path.getsize(sys.argv[2])
    while left > 0:
        left -= f.write(buffer[: min(left, len(buffer))])
"""


def best(runs: list[Run]) -> Run:
    return Run(min(r.cpu for r in runs), min(r.wall for r in runs), max(r.anon_mib for r in runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--variants", default="recipe,compat", help="recipe and/or compat")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--mergekit", type=Path, help="python of an environment that has mergekit")
    parser.add_argument("--only-weft", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = args.folder.absolute()
    paths = dict(zip(("base", "ft1", "ft2", "ft3"), make(folder, args.parameters), strict=True))
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONDONTWRITEBYTECODE", "PYTHONPATH")}
    env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    mergekit = None if args.only_weft else args.mergekit or install_mergekit(folder)
    out = folder / "out"
    files = [str(p / "model.safetensors") for p in paths.values()]
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    start = best([measure([sys.executable, "-c", "import torch"], env) for _ in range(2)])
    floor = best(
        [measure([sys.executable, "-c", FLOOR, str(folder / "floor.bin"), *files], env) for _ in range(3)]
    )
    (folder / "floor.bin").unlink()
    cells = f"{'CPU s':>7} {'wall s':>8} {'anon MiB':>8}"
    print(f"{'':24} {'weft':>25}  {'MergeKit':>25}  MergeKit : weft")
    print(f"{'method':24} {cells}  {cells}  {'CPU':>6} {'wall':>6}")
    print(f"{'import torch':24} {start.cpu:7.1f} {start.wall:8.1f} {start.anon_mib:8.0f}")
    print(f"{'plain read+write':24} {floor.cpu:7.1f} {floor.wall:8.1f}", flush=True)
    results: dict[str, object] = {"import_torch": asdict(start), "plain_read_write": asdict(floor)}
    for name in args.methods.split(","):
        for variant in args.variants.split(","):
            text = RECIPES[name]
            for key, path in paths.items():
                text = text.replace("{" + key + "}", str(path))
            recipe = folder / f"{name}.yml"
            theirs = f"merge_method: {name}\n{text}dtype: bfloat16\n"
            recipe.write_text(VARIANTS[variant] + theirs)
            ours, other = [], []
            for _ in range(args.rounds):
                shutil.rmtree(out, ignore_errors=True)
                command = [sys.executable, "-m", "weft.cli.main", "merge", str(recipe), str(out), "-q"]
                ours.append(measure([*command, "--memory", args.memory], env))
                if mergekit is not None:
                    shutil.rmtree(out, ignore_errors=True)
                    (folder / "theirs.yml").write_text(theirs)
                    code = "from mergekit.scripts.run_yaml import main; main()"
                    flags = [
                        "--lazy-unpickle",
                        "--quiet",
                        "--num-threads",
                        str(os.cpu_count()),
                        "--no-copy-tokenizer",
                    ]
                    other.append(
                        measure(
                            [str(mergekit), "-c", code, str(folder / "theirs.yml"), str(out), *flags], env
                        )
                    )
            shutil.rmtree(out, ignore_errors=True)
            a = best(ours)
            label = name if variant == "recipe" else f"{name} ({variant})"
            line = f"{label:24} {a.cpu:7.1f} {a.wall:8.1f} {a.anon_mib:8.0f}"
            results[label] = {"weft": asdict(a)}
            if other:
                b = best(other)
                line += f"  {b.cpu:7.1f} {b.wall:8.1f} {b.anon_mib:8.0f}"
                line += f"  {b.cpu / a.cpu:6.1f} {b.wall / a.wall:6.1f}"
                results[label] = {"weft": asdict(a), "mergekit": asdict(b)}
            # weft imports no torch where kernels do all, so its own start is told from torch's
            begun = measure([*command, "--dry-run"], env)
            beyond = [(a.wall - s.wall) / floor.wall for s in (start, begun)]
            told = f"wall in plain read+write: {beyond[0]:.1f} beyond torch, {beyond[1]:.1f} beyond a dry run"
            print(f"{line}   {told}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


def install_mergekit(folder: Path) -> Path:
    """python of an environment with MergeKit 0.1.5, made once."""
    python = folder / "mergekit-env" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "torch==2.13.0"], check=True)
        subprocess.run(
            [str(python), "-m", "pip", "install", "-q", "torch==2.13.0", "mergekit==0.1.5"], check=True
        )
    return python


if __name__ == "__main__":
    main()
