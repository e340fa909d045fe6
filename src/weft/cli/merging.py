"""`weft merge`: plan, explain, run, with progress and a log."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import spelled
from weft.cli.output import console, note, one_line, print_json, safe, shape_text, table
from weft.engine.budget import show_size
from weft.engine.plan import Plan
from weft.engine.save import Saved, Settings, save
from weft.engine.staging import refuse_existing, refuse_inputs
from weft.errors import UsageError, WeftError

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
    verify: bool = False,
    verify_text: Path | None = None,
    **settings: Any,
) -> int:
    """Carry out `weft merge`; the exit status."""
    from weft.recipes import build, read
    from weft.recipes.recipe import target

    if settings["executor"] not in ("local", "ray"):
        raise UsageError(f"there is no executor {settings['executor']!r}; choose local or ray")
    log_on_stdout = log_json is not None and str(log_json) == "-"
    if as_json and log_on_stdout:
        raise UsageError("--json and --log-json - would mix on stdout; give the log a file")
    recipes = read(recipe, sets)
    checkpoint = build(recipes, seed=seed)
    chosen = target(recipes)
    settings["dtype"] = spelled(dtype) if dtype else None
    if explain is not None:
        _show_explanation(checkpoint, explain, as_json)
        return 0
    if dry_run:
        plan = Settings(**settings).plan(checkpoint, out)
        _show_plan(plan, as_json)
        try:
            refuse_existing(out, settings["overwrite"])
            refuse_inputs(out, plan)
        except WeftError as error:
            note(f"this plan could not be carried out: {error}")
        return 0
    if verify:
        _refuse_unverifiable(checkpoint, out, verify_text)
    inline = "\n" in recipe or recipe.lstrip().startswith("{")
    text = recipe if inline else Path(recipe).read_text(encoding="utf-8")
    if not quiet:
        for told in chosen.notes:
            note(told)
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
    to = sys.stderr if log_on_stdout else sys.stdout
    if not as_json and not quiet:
        _show_saved(saved, to)
    result: dict[str, Any] = {"path": str(saved.path), "seconds": round(saved.seconds, 3), **saved.manifest}
    status = 0
    if verify:
        from weft.cli.verifying import close, show, verify_output

        report, result["verification"] = verify_output(
            saved.path, checkpoint, verify_text, settings["device"]
        )
        if not as_json and not quiet:
            show(report, to)
        status = close(report)
    if as_json:
        print_json(result)
    return status


def _refuse_unverifiable(checkpoint: Checkpoint, out: Path, text: Path | None) -> None:
    """Raise before the merge what would keep its output from being verified."""
    from weft.llm.perplexity import read_texts
    from weft.llm.verify import refuse_unverifiable

    refuse_unverifiable(checkpoint, out)
    if text is not None:
        read_texts(text)


def _show_saved(saved: Saved, to: TextIO) -> None:
    for told in saved.notes:
        note(told)
    count, carried = saved.manifest["tensors"], saved.manifest["carried"]
    resumed = f", {saved.resumed} of them by an earlier run" if saved.resumed else ""
    print(f"{one_line(saved.path)}: {count} tensors{resumed}, {saved.seconds:.1f} s", file=to)
    for name, reason in list(carried.items())[:10]:
        print(f"  carried, not merged: {one_line(name)} ({safe(reason)})", file=to)
    if len(carried) > 10:
        print(f"  … and {len(carried) - 10} more; see the manifest", file=to)


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
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
        TransferSpeedColumn(), TimeRemainingColumn(), console=console(stderr=True), transient=True,
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
    described = plan.describe()
    rows = [
        {
            "name": n,
            "shape": list(i.shape),
            "dtype": i.kind.name,
            "bytes": i.nbytes,
            "steps": how(plan.checkpoint, n),
        }
        for n, i in plan.tensors.items()
    ]
    if as_json:
        print_json({**described, "plan": rows})
        return
    out = console()
    listed = table("tensor", ">shape", "dtype", ">bytes", "steps")
    for row in rows:
        shape, size = shape_text(plan.tensors[str(row["name"])].shape), f"{row['bytes']:,}"
        listed.add_row(one_line(row["name"]), shape, str(row["dtype"]), size, one_line(row["steps"]))
    out.print(listed)
    out.print()
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
        inner = sources_of(checkpoint, name)
        return how(*inner[0]) if len(inner) == 1 else checkpoint.origin
    reason = getattr(checkpoint, "carried", {}).get(name)
    return f"carried: {reason}" if reason else str(pipeline(name))


def sources_of(checkpoint: Checkpoint, name: str) -> list[tuple[Checkpoint, str]]:
    """What a tensor is made of: inputs, each with the name that it has there."""
    spans = getattr(checkpoint, "spans", None)
    if spans is not None:
        return list(dict.fromkeys((span.source, span.name) for span in spans(name)))
    stored = [(s, s.aliases.get(name, name)) for s in checkpoint.inputs]
    return [(s, n) for s, n in stored if n in s]


def explanation(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """How one tensor is computed, down to the files."""
    info = checkpoint.info(name)
    told: dict[str, Any] = {
        "node": type(checkpoint).__name__,
        "origin": checkpoint.origin,
        "tensor": name,
        "shape": list(info.shape),
        "dtype": info.kind.name,
    }
    if checkpoint.inputs:
        told["steps"] = how(checkpoint, name)
        method = getattr(checkpoint, "method", None)
        if method is not None:
            told["method"] = method.name
            base = getattr(checkpoint, "base", None)
            told["space"] = "task vectors (model − base)" if base is not None else "weights"
        told["inputs"] = [explanation(s, n) for s, n in sources_of(checkpoint, name)]
    else:
        told["stored_bytes"] = info.nbytes
    return told


def _show_explanation(checkpoint: Checkpoint, name: str, as_json: bool) -> None:
    stored = checkpoint.aliases.get(name, name)
    told = explanation(checkpoint, stored)
    if as_json:
        print_json(told | {"tied_name": name} if stored != name else told)
        return
    from rich.tree import Tree

    def label(node: dict[str, Any]) -> str:
        named = "" if node["tensor"] == stored else f" {one_line(node['tensor'])}"
        text = f"{one_line(node['origin'])}:{named} {shape_text(node['shape'])} {node['dtype']}"
        if "space" in node:
            steps = one_line(node["steps"]).replace(" | ", "\n  | ")
            return f"{text}\nof {node['space']}:\n    {steps}"
        return f"{text}, rounded once to that" if node["node"] == "Cast" else text

    def grow(tree: Tree, node: dict[str, Any]) -> Tree:
        for child in node.get("inputs", []):
            grow(tree.add(label(child)), child)
        return tree

    out = console()
    out.print(one_line(stored) + (f", to which {one_line(name)} is tied" if stored != name else ""))
    out.print(grow(Tree(label(told)), told))
