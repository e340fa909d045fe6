"""`save`: the one verb that moves bytes. Pulls a checkpoint through its graph into files, range by range."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import DType, floating
from weft.checkpoints.execution import Execution, executing, execution, map_here
from weft.engine.budget import TIGHT, Budget, Frugal, default_memory, give_back, keep_freed, parse_size
from weft.engine.card import README, model_card
from weft.engine.digest import RunningDigest
from weft.engine.plan import Plan, make_plan
from weft.engine.pool import WorkPool
from weft.engine.record import (
    manifest,
    noted,
    output_config,
    write_assets,
    write_config,
    write_index,
)
from weft.engine.staging import Staging, fingerprint, refuse_existing, refuse_inputs
from weft.engine.writer import SINGLE_FILES, PlacedFiles, write_whole
from weft.errors import DataError, UsageError
from weft.late import one_thread, torch

MANIFEST = "weft-manifest.json"
Event = Mapping[str, Any]


@dataclass(frozen=True)
class Saved:
    """What a save did."""

    path: Path
    manifest: Mapping[str, Any]
    seconds: float
    resumed: int = 0
    """Tensors found written by an earlier, interrupted run."""
    notes: tuple[str, ...] = ()


@dataclass
class Settings:
    """How to save; the keywords of `save`."""

    memory: int | str | None = None
    threads: int | None = None
    device: str = "cpu"
    shard_size: int | str = "5GB"
    dtype: torch.dtype | DType | str | None = None
    overwrite: bool = False
    kernels: bool = True
    digests: bool = True
    executor: str = "local"
    on_event: Callable[[Event], None] = field(default=lambda event: None)

    def __post_init__(self) -> None:
        if self.executor not in ("local", "ray"):
            raise UsageError(f"there is no executor {self.executor!r}: use local or ray")
        self.dtype = None if self.dtype is None else floating(self.dtype)

    def plan(self, checkpoint: Checkpoint, out: Path) -> Plan:
        """The plan for writing `checkpoint` to `out`."""
        layout = None
        if out.suffix == ".gguf":
            from weft.export.gguf import as_gguf  # a room below: what writes safetensors does not need it

            made = as_gguf(checkpoint, None if self.dtype is None else floating(self.dtype).torch)
            checkpoint, layout = made, made.layout(out.name)
        elif hasattr(checkpoint, "layout"):
            raise UsageError(f"{out} does not end in .gguf, but {checkpoint.origin} is GGUF: name it so")
        single = out.suffix in SINGLE_FILES
        return make_plan(
            checkpoint,
            threads=_cores() if self.threads is None else self.threads,
            memory=default_memory() if self.memory is None else parse_size(self.memory),
            device=self.device,
            dtype=self.dtype if layout is None else None,
            layout=layout,
            # PEFT reads an adapter from one file only
            shard_bytes=(1 << 62) if single or checkpoint.stem != "model" else parse_size(self.shard_size),
            stem=out.stem if single else checkpoint.stem,
        )


def save(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    recipe_text: str | None = None,
    **settings: Any,
) -> Saved:
    """Write a checkpoint as safetensors: a folder, or one file if `out` ends in .safetensors.

    Keywords (see `Settings`): `memory` bounds what is held at once (bytes or "2GiB"), `threads`, `device`,
    `shard_size`, `dtype` (storage dtype of floating tensors, torch's or by name), `overwrite`, `digests` (sha256 of
    inputs and outputs in the manifest), `executor` ("local" or "ray"), `on_event`.

    The output has its final name only when it is whole. An interrupted call leaves a hidden folder beside
    it, from which the same call goes on. Raises UsageError and DataError; inputs are never written to.
    """
    began = time.monotonic()
    out, how = Path(out), Settings(**settings)
    refuse_existing(out, how.overwrite)
    plan = how.plan(checkpoint, out)
    refuse_inputs(out, plan)
    how.on_event({"event": "plan", **plan.describe()})
    inputs_were = checkpoint.identity()
    staging = Staging(out, fingerprint(plan), overwrite=how.overwrite)
    try:
        staging.forget_damaged(plan)
        resumed = len(staging.done)
        digests = run(plan, staging, how)
        with WorkPool(plan.threads) as pool:
            inputs = _input_records(plan, how.digests, pool)
        if checkpoint.identity() != inputs_were:
            raise DataError(f"the inputs of {out} changed while they were merged: run the command again")
        config, notes = output_config(plan)
        notes += noted(plan.checkpoint)
        record = manifest(plan, recipe=recipe, digests=digests, inputs=inputs, notes=notes)
        _write_companions(staging.folder, out, plan, config, record, recipe_text)
    except BaseException:
        staging.abandon()
        raise
    staging.publish()
    seconds = time.monotonic() - began
    how.on_event({"event": "done", "seconds": round(seconds, 3), "path": str(out)})
    return Saved(out, record, seconds, resumed, tuple(notes))


def run(plan: Plan, staging: Staging, how: Settings) -> dict[str, str | None]:
    """Compute and write every tensor that is not written yet; sha256 of the files."""
    if how.executor == "ray":
        from weft.engine.ray import write_tensors_on_ray

        return write_tensors_on_ray(plan, staging, how)
    return write_tensors(plan, staging, how, [n for n in plan.tensors if n not in staging.done])


def write_tensors(plan: Plan, staging: Staging, how: Settings, names: list[str]) -> dict[str, str | None]:
    """Compute and write `names` on this machine's threads."""
    files = PlacedFiles(staging.folder, plan.layout)
    hashes = {
        file: RunningDigest(staging.folder / file, plan.layout, plan.tensors) for file in plan.layout.sizes
    }
    try:
        with working(plan, how) as pool:
            if names:
                survey(plan)
            todo = set(names)
            for name in plan.tensors:
                if name not in todo and how.digests:
                    hashes[plan.layout.places[name].file].finished(name)
            write = Writing(plan, files, how.on_event)

            def one(name: str) -> None:
                write.tensor(name, pool)
                staging.record(name)
                if how.digests:
                    hashes[plan.layout.places[name].file].finished(name)

            pool.map(one, names)
            found = pool.map(lambda h: h.hexdigest() if how.digests else None, list(hashes.values()))
            files.sync()
    finally:
        files.close()
    return dict(zip(hashes, found, strict=True))


def survey(plan: Plan) -> None:
    """The first pass over all tensors, on as many threads as may hold a range each."""
    if not plan.crowded:
        plan.checkpoint.survey()
        return
    with (
        WorkPool(max(1, plan.memory // plan.largest)) as fewer,
        executing(replace(execution(), map=_frugal(plan, fewer.map))),
    ):
        plan.checkpoint.survey()


def _frugal(plan: Plan, plain: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    return Frugal(plan.chunk).map(plain) if plan.memory < TIGHT else plain


@contextmanager
def working(plan: Plan, how: Settings) -> Iterator[WorkPool]:
    """Threads, and an execution in force that uses them."""
    if plan.memory >= TIGHT:
        keep_freed()
    kernels = None
    if how.kernels and plan.device == "cpu" and plan.bytes_read >= _worth_compiling():
        from weft.engine.kernels import Kernels

        kernels = Kernels()
    try:
        # weft's own threads share the ranges; nested ones of torch's would only contend
        with one_thread(), WorkPool(plan.threads) as pool:
            here = Execution(
                chunk=plan.chunk,
                where=plan.device,
                map=_frugal(plan, pool.map),
                kernels=kernels,
                surveyed=lambda n: how.on_event({"event": "read", "bytes": n}),
            )
            with executing(here):
                yield pool
    finally:
        give_back(plan.bytes_read)


def _cores() -> int:
    """Cores that this process may run on, which a container or a scheduler may have made fewer."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _worth_compiling() -> int:
    """Bytes from which compiled kernels repay loading the compiler (about a second)."""
    return int(os.environ.get("WEFT_KERNELS_FROM", 256 << 20))


class Writing:
    """Computes tensors range by range within the memory budget and writes each range in its place."""

    def __init__(self, plan: Plan, files: PlacedFiles, on_event: Callable[[Event], None]) -> None:
        self.plan, self.files, self.on_event = plan, files, on_event
        self.budget = Budget(plan.memory)
        # what ranges cannot use keeps tensors that are read several times from being read from disk again
        self.spare = Budget(plan.memory - plan.peak_memory)
        names = list(plan.tensors)
        self._later = dict(zip(names, names[plan.threads :], strict=False))

    def tensor(self, name: str, pool: WorkPool) -> None:
        """One tensor; its ranges are shared with threads that have nothing else to do."""
        if name in self._later:
            self.plan.checkpoint.prefetch(self._later[name])
        keep = self.plan.checkpoint.held_bytes(name)
        kept = keep > 0 and self.spare.try_hold(keep)
        try:
            if kept:
                self.plan.checkpoint.hold(name)
            self._write(name, pool)
        finally:
            self.plan.checkpoint.release(name)
            if kept:
                self.spare.free(keep)

    def _alone_if_crowded(self) -> AbstractContextManager[object]:
        """Statistics stream one range at a time where several at once could break the budget."""
        if not self.plan.crowded:
            return nullcontext()
        return executing(replace(execution(), map=_frugal(self.plan, map_here)))

    def _write(self, name: str, pool: WorkPool) -> None:
        plan, info = self.plan, self.plan.tensors[name]
        began = time.monotonic()
        cut = plan.ranges(name)
        longest = max((b - a for a, b in cut), default=0)
        with self.budget.holding(plan.cost(name, longest)), self._alone_if_crowded():
            plan.checkpoint.ready(name)

        def one(piece: tuple[int, int]) -> None:
            start, stop = piece
            with self.budget.holding(plan.cost(name, stop - start)):
                self.files.write(name, start, plan.checkpoint.bits(name, start, stop, dtype=info.kind))

        pool.map(one, cut)
        self.files.settle(name, info.nbytes)
        self.on_event(
            {
                "event": "tensor",
                "name": name,
                "read": plan.checkpoint.bytes_read(name),
                "written": info.nbytes,
                "seconds": round(time.monotonic() - began, 4),
            }
        )


def _input_records(plan: Plan, digests: bool, pool: WorkPool) -> list[dict[str, Any]]:
    files = plan.checkpoint.files
    found = pool.map(lambda f: f.digest() if digests and f.digest else None, list(files))
    return [{"path": f.path, "size": f.size, "sha256": sha} for f, sha in zip(files, found, strict=True)]


def _write_companions(
    folder: Path,
    out: Path,
    plan: Plan,
    config: Mapping[str, Any] | None,
    record: Mapping[str, Any],
    recipe_text: str | None,
) -> None:
    text = (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode()
    if out.suffix in SINGLE_FILES:
        called = out.stem if out.suffix == ".safetensors" else out.name
        write_whole(folder / f"{called}.weft.json", text)
        return
    write_config(folder, config)
    write_assets(folder, plan.checkpoint)
    write_index(folder, plan)
    write_whole(folder / MANIFEST, text)
    if recipe_text:
        write_whole(folder / "weft-recipe.yml", recipe_text.encode())
    write_whole(folder / README, model_card(plan.checkpoint, recipe_text).encode())
