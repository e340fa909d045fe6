"""What a run has measured, kept in the file of its results after every contender: stopped, it goes on from there.

The results are the journal. A run that finds its file takes over what was measured from the same: experts and data
by their hash, a contender by its parameters and the values tried; the rest is measured and added. A file that it
cannot go on from (another suite, number of samples or version) is refused before anything is computed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from weft.bench.cache import key
from weft.bench.contenders import Contender
from weft.bench.results import Measured, Results, Row, read, write
from weft.bench.suite import Suite
from weft.checkpoints.load import load
from weft.errors import DataError
from weft.methods.registry import METHODS

Place = tuple[int, str, str, int]
"""Number of tasks, name, how, seed."""


class Journal:
    """The measurements so far, under what the results say of themselves, and the file where there is one."""

    def __init__(self, head: Results, path: str | Path | None = None) -> None:
        """DataError for a file that holds what this run cannot go on from."""
        self.head, self.path = head, None if path is None else Path(path)
        self._found: dict[Place, tuple[Row, Measured]] = {}
        self._earlier: dict[str, str] = {}
        self._skipped: dict[str, str] = {}
        self._began = perf_counter()
        before = None if self.path is None else _opened(self.path, head)
        if before is not None:
            self._began -= before.seconds
            self._earlier = dict(before.skipped)
            commands = dict.fromkeys([*before.command.split("; "), head.command])
            self.head = replace(head, command="; ".join(filter(None, commands)))
            for row in before.rows:
                for run in row.runs:
                    self.add(row, run)

    def about(self, suite: Suite) -> None:
        """What the results say of the suite: as the first seed's has it."""
        if not self.head.metric:
            self.head = replace(
                self.head, about=suite.about, metric=suite.tasks[0].metric, notes=list(suite.notes)
            )

    def of(self, size: int, seed: int, name: str | None = None) -> list[tuple[Row, Measured]]:
        """What there is of one seed, of all contenders or of one."""
        return [
            v for (n, of, _, s), v in self._found.items() if (n, s) == (size, seed) and name in (None, of)
        ]

    def holds(self, row: Row, seed: int, asked: str) -> bool:
        """Whether a row of this seed was measured with the same."""
        _, run = self._found.get((row.size, row.name, row.how, seed), (None, None))
        return run is not None and bool(run.experts) and run.asked == asked

    def add(self, row: Row, run: Measured) -> None:
        """With a file, numbers are kept as it has them: a run that was stopped ends as one that was not."""
        kept = run if self.path is None else run.rounded()
        self._found[row.size, row.name, row.how, run.seed] = replace(row, runs=()), kept

    def forget(self, found: Iterable[tuple[Row, Measured]]) -> None:
        """These are measured anew."""
        for row, run in found:
            del self._found[row.size, row.name, row.how, run.seed]

    def left_out(self, tried: Iterable[Contender], why: Mapping[str, str]) -> None:
        """Contenders that are not in the table, and the reasons; what kept them out in an earlier run is past."""
        for c in tried:
            self._earlier.pop(c.name, None)
        self._skipped.update(why)

    def results(self) -> Results:
        """All rows, each with its seeds in order."""
        rows: dict[tuple[int, str, str], list[tuple[Row, Measured]]] = {}
        for (size, name, how, _), found in self._found.items():
            rows.setdefault((size, name, how), []).append(found)
        made = [
            replace(found[0][0], runs=tuple(sorted((m for _, m in found), key=lambda m: m.seed)))
            for found in rows.values()
        ]
        return replace(
            self.head, rows=tuple(sorted(made, key=lambda r: -r.size)),
            seeds=tuple(sorted({seed for *_, seed in self._found})),
            skipped={**self._earlier, **self._skipped}, seconds=perf_counter() - self._began,
        )  # fmt: skip

    def keep(self) -> None:
        """Write the file, whole."""
        if self.path is not None:
            write(self.results(), self.path)


def asked(c: Contender, how: str) -> str:
    """12 hex digits of what a row is measured with: a contender's parameters, and the values tried for it."""
    defaults = {n: p.default for n, p in METHODS[c.name].params.items()} if c.name in METHODS else None
    tried = c.tuned if how == "tuned" else None
    return key({"name": c.name, "params": c.params, "tuned": tried, "defaults": defaults})[:12]


def fingerprint(suite: Suite) -> str:
    """12 hex digits of a suite's models and data, tensors by their values, loaders by no more than their type."""
    digest = hashlib.sha256()
    for model in (suite.base, suite.joint, *(suite.experts[t.name] for t in suite.tasks)):
        _feed(digest, None if model is None else load(model).state_dict())
    for t in (*suite.tasks, *suite.unseen):
        _feed(digest, [t.name, t.classes, t.metric, t.private, t.splits, t.corrupted])
    return digest.hexdigest()[:12]


def _feed(digest: Any, x: Any) -> None:
    if isinstance(x, Tensor):
        digest.update(f"{x.dtype}{tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(x, Mapping):
        for k, v in x.items():
            _feed(digest, k)
            _feed(digest, v)
    elif isinstance(x, list | tuple):
        digest.update(f"{len(x)} of".encode())
        for v in x:
            _feed(digest, v)
    else:
        digest.update((repr(x) if isinstance(x, str | int | float | None) else type(x).__qualname__).encode())


def _opened(path: Path, head: Results) -> Results | None:
    """What the file holds; None where there is none. DataError where this run cannot go on from it."""
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder; make it first")
    if not path.exists():
        return None
    found = read(path)
    problems = [
        f"{what} {theirs}, not {ours}"
        for what, theirs, ours in (
            ("suite", found.suite, head.suite),
            ("samples", found.samples, head.samples),
            *((p, found.versions.get(p), v) for p, v in head.versions.items()),
        )
        if theirs != ours
    ]
    if problems:
        raise DataError(
            f"{path} holds results that this run cannot go on from ({'; '.join(problems)}): name another file, "
            "or remove it"
        )
    return found
