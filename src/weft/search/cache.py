"""What makes a candidate cheap: inputs read once, and tensors that no setting has changed not computed again.

`Resident` keeps a checkpoint's tensors in memory as they are stored; `Remembered` keeps those a candidate
was asked for, rounded to their storage dtype, under a key that is equal exactly when the tensor is made by
the same steps from the same tensors. Both take their memory from one `Store` of so many bytes: inputs stay,
results go, least recently used first. What does not fit is read or computed again.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from weft.checkpoints.assembled import Assembled
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import execution, ranges
from weft.checkpoints.lazy import Affine, Cast, Derived
from weft.checkpoints.model import Model
from weft.checkpoints.ranges import element_range
from weft.methods.merge import Merge
from weft.methods.parts import stored_name
from weft.methods.step import Pipeline

SMALL = 1 << 16
"""Bytes of a statistic that is worth keeping."""


class Store:
    """Tensors by key within a number of bytes. Safe to share among threads."""

    def __init__(self, budget: int) -> None:
        self.budget, self.inputs, self.results = budget, 0, 0
        self.read = self.computed = self.reused = 0
        """Bytes read from files; bytes of tensors computed, and of those found here."""
        self._lock = threading.RLock()
        self._inputs: dict[str, Tensor] = {}
        self._results: OrderedDict[str, Tensor] = OrderedDict()
        self.statistics: dict[str, Any] = {}
        """What first passes have found, by what it depends on: thresholds and norms, small beside a tensor."""
        self._numbers: WeakKeyDictionary[Checkpoint, int] = WeakKeyDictionary()
        self._next = count()

    def input(self, key: str, read: Callable[[], Tensor]) -> Tensor | None:
        """A tensor of an input, read at most once; None where it does not fit."""
        with self._lock:
            if key in self._inputs:
                return self._inputs[key]
        values = read()
        size = values.nbytes
        with self._lock:
            self.read += size
            while self.inputs + self.results + size > self.budget and self._results:
                self.results -= self._results.popitem(last=False)[1].nbytes
            if key not in self._inputs and self.inputs + size <= self.budget:
                self._inputs[key] = values
                self.inputs += size
        return values

    def fits(self, key: str, size: int) -> bool:
        """Whether a tensor of an input is here or has room."""
        with self._lock:
            return key in self._inputs or self.inputs + size <= self.budget

    def result(self, key: str) -> Tensor | None:
        """A computed tensor, if it is here."""
        with self._lock:
            if key in self._results:
                self._results.move_to_end(key)
                self.reused += self._results[key].nbytes
                return self._results[key]
        return None

    def keep(self, key: str, values: Tensor) -> None:
        """Keep a computed tensor, in place of those not used for longest."""
        with self._lock:
            self.computed += values.nbytes
            if values.nbytes + self.inputs > self.budget or key in self._results:
                return
            self._results[key] = values
            self.results += values.nbytes
            while self.inputs + self.results > self.budget:
                self.results -= self._results.popitem(last=False)[1].nbytes

    def number(self, node: Checkpoint) -> int:
        """A number that no other checkpoint in memory gets, now or later."""
        with self._lock:
            if node not in self._numbers:
                self._numbers[node] = next(self._next)
            return self._numbers[node]

    def describe(self) -> dict[str, int]:
        """Bytes held, read, computed and reused."""
        return {"inputs": self.inputs, "results": self.results, "read": self.read,
                "computed": self.computed, "reused": self.reused}  # fmt: skip


class Resident(Derived):
    """A checkpoint whose tensors are read once, whole, while the store has room for them."""

    def __init__(self, source: Checkpoint, store: Store) -> None:
        super().__init__(source)
        self.origin, self._store = source.origin, store
        self._key = source.identity() or f"#{store.number(source)}"

    def identity(self) -> str | None:
        return self.first.identity()

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info, key = self.info(name), f"{self._key} {name}"
        start, stop = element_range(name, info, start, stop, self.grain(name))
        values = None
        if self._store.fits(key, info.nbytes):
            values = self._store.input(key, lambda: self.first.read(name, dtype=info.dtype).clone())
        if values is None:
            return self.first.read(name, start, stop, dtype=dtype)
        part = values[start:stop]
        return part if dtype is None else round_to(part, dtype)


class Remembered(Derived):
    """A candidate as it would be saved: each tensor rounded to its storage dtype, computed at most once."""

    def __init__(self, source: Checkpoint, store: Store) -> None:
        super().__init__(source)
        self.origin, self._store = source.origin, store
        self._keys = Keys(store)
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def grain(self, name: str) -> int:
        return 1  # a tensor is made whole, so any range of it may be read

    def survey(self) -> None:
        """Nothing yet: a node that needs statistics of the model gathers them when it is first read."""

    def ready(self, name: str) -> None:
        """Nothing yet: see `survey`."""

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop)
        key = self._keys.of(self.first, name)
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            values = self._store.result(key)
            if values is None:
                values = self._computed(name, info.dtype)
                self._store.keep(key, values)
        part = values[start:stop]
        return part if dtype is None else round_to(part, dtype)

    def _computed(self, name: str, dtype: torch.dtype) -> Tensor:
        how, source, numel = execution(), self.first, self.info(name).numel
        made = torch.empty(numel, dtype=dtype)
        self._recall(source, name)
        source.ready(name)
        self._recall(source, name)

        def one(cut: tuple[int, int]) -> None:
            made[cut[0] : cut[1]] = source.read(name, *cut, dtype=dtype)

        how.map(one, ranges(numel, source.grain(name), how.chunk))
        source.release(name)
        return made

    def _recall(self, node: Checkpoint, name: str) -> None:
        """Give merges the statistics that earlier candidates found, and keep those they have found."""
        for source, stored in children(node, name):
            self._recall(source, stored)
        if not isinstance(node, Merge) or node.part(name).carried_from is not None:
            return
        known = self._store.statistics
        for j, bound in enumerate(node.pipeline(name).steps):
            if bound.step.stat is None:
                continue
            slot = ("*" if bound.scope == "model" else name, j)
            key = self._keys.of_statistic(node, name, j)
            if slot in node._found:
                if _small(node._found[slot]):
                    known.setdefault(key, node._found[slot])
            elif key in known:
                node._found[slot] = known[key]


def children(node: Checkpoint, name: str) -> list[tuple[Checkpoint, str]]:
    """The tensors that a tensor is made of, for the nodes whose making is known here; else nothing."""
    if isinstance(node, Model):
        return [(node.weights, name)]
    if isinstance(node, InCompany | Cast | Affine):
        return [(source, name) for source in node.inputs]
    if isinstance(node, Assembled):
        return [(span.source, span.name) for span in node.spans(name)]
    if isinstance(node, Merge):
        carried = node.part(name).carried_from
        sources = node.readers(name) if carried is None else [carried]
        return [(s, stored_name(s, name)) for s in sources if s is not None]
    return []


def _small(found: Any) -> bool:
    tensors = [v for v in found.values() if isinstance(v, Tensor)] if isinstance(found, dict) else []
    return sum(t.nbytes for t in tensors) <= SMALL


class Keys:
    """What the values of one candidate's tensors depend on, as digests."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[tuple[int, str], str] = {}
        self._whole: dict[int, str] = {}
        self._models: dict[tuple[int, int], str] = {}

    def of(self, node: Checkpoint, name: str) -> str:
        """Equal for two tensors only if they hold the same values."""
        known = (id(node), name)
        if known not in self._known:
            self._known[known] = _digest(f"{node.info(name)} {self._of(node, name)}")
        return self._known[known]

    def _of(self, node: Checkpoint, name: str) -> Any:
        inner = [self.of(source, stored) for source, stored in children(node, name)]
        if isinstance(node, Model | InCompany):
            return inner[0]
        if isinstance(node, Cast):
            return "cast", node.kind, inner
        if isinstance(node, Affine):
            return "affine", node.coefficients, inner
        if isinstance(node, Assembled):
            return "spans", [(s.start, s.end) for s in node.spans(name)], inner
        if isinstance(node, Merge):
            if node.part(name).carried_from is not None:
                return inner[0]
            steps = node.pipeline(name).steps
            whole = [self.of_statistic(node, name, j) for j, b in enumerate(steps)
                     if b.step.stat and b.scope == "model"]  # fmt: skip
            return self._steps(node, name, len(steps)), whole
        return self._identity(node), name

    def of_statistic(self, node: Merge, name: str, j: int) -> str:
        """What the statistic of step j depends on: the steps up to it, of this tensor or of every one."""
        steps = node.pipeline(name).steps
        if steps[j].scope != "model":
            before = [self.of_statistic(node, name, i) for i in range(j)
                      if steps[i].step.stat and steps[i].scope == "model"]  # fmt: skip
            return _digest(repr(("statistic", j, self._steps(node, name, j + 1), before)))
        if (id(node), j) not in self._models:
            merged = [n for n in node if node.part(n).carried_from is None]
            self._models[id(node), j] = _digest(repr([self._steps(node, n, j + 1) for n in merged]))
        return self._models[id(node), j]

    def _steps(self, node: Merge, name: str, upto: int) -> Any:
        """The first steps of one tensor, on what, and where."""
        sources = [self.of(source, stored) for source, stored in children(node, name)]
        steps = Pipeline(node.pipeline(name).steps[:upto])
        return str(node.at(name)), str(steps), node.nonfinite, node.base is None, sources

    def _identity(self, node: Checkpoint) -> str:
        if id(node) not in self._whole:
            self._whole[id(node)] = node.identity() or f"#{self._store.number(node)}"
        return self._whole[id(node)]


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
