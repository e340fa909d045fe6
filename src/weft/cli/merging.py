"""`weft merge`: plan, explain, run, with progress and a log."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import dtype_name, parse_dtype
from weft.cli.output import console, print_json, safe
from weft.engine.budget import show_size
from weft.engine.plan import Plan
from weft.engine.save import Settings, save
from weft.errors import UsageError

Event = Mapping[str, Any]


def run(
    recipe: str,
    out: Path,
    *,
    sets: list[str],
    seed: int | None,
    dry_run: bool,
    explain: str | None,
    log_json: Path | None,
    quiet: bool,
    as_json: bool,
    dtype: str | None,
    **settings: Any,
) -> None:
    """Carry out `weft merge`."""
    from weft.recipes import build, read
    from weft.recipes.recipe import target

    if settings["executor"] not in ("local", "ray"):
        raise UsageError(f"there is no executor {settings['executor']!r}; choose local or ray")
    recipes = read(recipe, sets)
    checkpoint = build(recipes, seed=seed)
    chosen = target(recipes)
    settings["dtype"] = parse_dtype(dtype) if dtype else None
    if explain is not None:
        _show_explanation(checkpoint, explain, as_json)
        return
    if dry_run:
        _show_plan(Settings(**settings).plan(checkpoint, out), as_json)
        return
    text = Path(recipe).read_text(encoding="utf-8") if Path(recipe).is_file() else recipe
    if not quiet:
        for note in chosen.notes:
            print(f"note: {safe(note)}", file=sys.stderr)
    with ExitStack() as stack:
        sinks: list[Callable[[Event], None]] = []
        if log_json is not None:
            sinks.append(stack.enter_context(_json_log(log_json)))
        if not quiet and sys.stderr.isatty():
            sinks.append(stack.enter_context(_progress()))

        def on_event(event: Event) -> None:
            for sink in sinks:
                sink(event)

        saved = save(
            checkpoint, out, recipe=chosen.describe(), recipe_text=text, on_event=on_event, **settings
        )
    if as_json:
        print_json({"path": str(saved.path), "seconds": round(saved.seconds, 3), **saved.manifest})
    elif not quiet:
        for note in saved.notes:
            print(f"note: {safe(note)}", file=sys.stderr)
        resumed = f", {saved.resumed} tensors of them by an earlier run" if saved.resumed else ""
        print(f"{saved.path}: {saved.manifest['tensors']} tensors{resumed}, {saved.seconds:.1f} s")
        carried = saved.manifest["carried"]
        for name, reason in list(carried.items())[:10]:
            print(f"  carried, not merged: {safe(name)} ({safe(reason)})")
        if len(carried) > 10:
            print(f"  … and {len(carried) - 10} more; see weft-manifest.json")


@contextmanager
def _json_log(path: Path) -> Iterator[Callable[[Event], None]]:
    if str(path) == "-":
        yield lambda event: print(json.dumps(event), flush=True)
        return
    with open(path, "a", encoding="utf-8") as f:

        def write(event: Event) -> None:
            f.write(json.dumps(event) + "\n")
            f.flush()

        yield write


@contextmanager
def _progress() -> Iterator[Callable[[Event], None]]:
    """A bar in bytes with rate and time left."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(),
        TimeRemainingColumn(), console=console(stderr=True), transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task("merging", total=None)
        surveyed = 0

        def show(event: Event) -> None:
            nonlocal surveyed
            if event["event"] == "plan":
                bar.update(task, total=event["bytes_read"] + event["bytes_written"])
            elif event["event"] == "read":
                surveyed += event["bytes"]
                bar.advance(task, event["bytes"])
            elif event["event"] == "tensor":
                # the first passes of this tensor were counted while they ran
                rest = max(0, event["read"] - surveyed)
                surveyed = max(0, surveyed - event["read"])
                bar.advance(task, rest + event["written"])

        yield show


def _show_plan(plan: Plan, as_json: bool) -> None:
    from rich.table import Table

    described = plan.describe()
    rows = [
        {
            "name": n,
            "shape": list(i.shape),
            "dtype": dtype_name(i.dtype),
            "bytes": i.nbytes,
            "steps": how(plan.checkpoint, n),
        }
        for n, i in plan.tensors.items()
    ]
    if as_json:
        print_json({**described, "plan": rows})
        return
    out = console()
    table = Table("tensor", "shape", "dtype", "bytes", "steps")
    for row in rows:
        shape = "×".join(map(str, plan.tensors[str(row["name"])].shape)) or "scalar"
        table.add_row(safe(row["name"]), shape, str(row["dtype"]), f"{row['bytes']:,}", safe(row["steps"]))
    out.print(table)
    files = ", ".join(f"{f} ({show_size(size)})" for f, size in plan.layout.sizes.items())
    out.print(f"{described['tensors']} tensors, {described['parameters']:,} parameters")
    out.print(f"read {show_size(plan.bytes_read)}, write {show_size(plan.bytes_written)}: {files}")
    out.print(
        f"memory: at most {show_size(plan.peak_memory)} of {show_size(plan.memory)}; "
        f"{plan.threads} threads, {plan.device}, {plan.chunk:,} elements at a time"
    )


def how(checkpoint: Checkpoint, name: str) -> str:
    """In one line, how a node makes a tensor."""
    pipeline = getattr(checkpoint, "pipeline", None)
    if pipeline is None:
        return how(checkpoint.inputs[0], name) if len(checkpoint.inputs) == 1 else checkpoint.origin
    reason = getattr(checkpoint, "carried", {}).get(name)
    return f"carried: {reason}" if reason else str(pipeline(name))


def explanation(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """How one tensor is computed, down to the files."""
    info = checkpoint.info(name)
    told: dict[str, Any] = {
        "node": type(checkpoint).__name__,
        "origin": checkpoint.origin,
        "tensor": name,
        "shape": list(info.shape),
        "dtype": dtype_name(info.dtype),
    }
    if checkpoint.inputs:
        told["steps"] = how(checkpoint, name)
        method = getattr(checkpoint, "method", None)
        if method is not None:
            told["method"] = method.name
            base = getattr(checkpoint, "base", None)
            told["space"] = "task vectors (model − base)" if base is not None else "weights"
        told["inputs"] = [explanation(s, name) for s in checkpoint.inputs if name in s]
    else:
        told["stored_bytes"] = info.nbytes
    return told


def _show_explanation(checkpoint: Checkpoint, name: str, as_json: bool) -> None:
    told = explanation(checkpoint, name)
    if as_json:
        print_json(told)
        return
    from rich.tree import Tree

    def label(node: dict[str, Any]) -> str:
        shape = "×".join(map(str, node["shape"])) or "scalar"
        head = f"{node['origin']}: {shape} {node['dtype']}"
        return safe(f"{head}\n{node['space']} | {node['steps']}" if "space" in node else head)

    def grow(tree: Tree, node: dict[str, Any]) -> Tree:
        for child in node.get("inputs", []):
            grow(tree.add(label(child)), child)
        return tree

    out = console()
    out.print(safe(name))
    out.print(grow(Tree(label(told)), told))
