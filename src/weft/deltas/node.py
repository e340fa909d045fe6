"""`Delta`: a base and the stored difference from it, as one lazy checkpoint.

A range of a tensor costs the base's range and the few stored numbers that belong to it. Whether the parts lie in
a file or are computed (`packed.Packed`) makes no difference here, so a delta can be read before it is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.limits import shown
from weft.checkpoints.ranges import element_range
from weft.deltas.exact import Whole
from weft.deltas.format import Document, Entry
from weft.deltas.pair import read_any
from weft.errors import DataError, DataProblems


class Delta(Checkpoint):
    """The model that `document` and `parts` describe over `base`. DataProblems where the three don't fit."""

    def __init__(
        self,
        base: Checkpoint,
        parts: Checkpoint,
        document: Document,
        *,
        origin: str | None = None,
        assets: tuple[Asset, ...] = (),
    ) -> None:
        self.base, self.parts, self.document = base, parts, document
        self.origin = origin or f"{base.origin} + {parts.origin}"
        self._own_assets = assets
        problems: list[str] = []
        self._tensors = self._described(problems)
        self._aliases = self._tied(problems)
        self._check_parts(problems)
        if problems:
            raise DataProblems(f"the delta {self.origin} cannot be read over {base.origin}", problems)

    # -- what is known at once --------------------------------------------------------------------

    def _described(self, problems: list[str]) -> dict[str, TensorInfo]:
        """The base's tensors in its order, less the removed, then what is new."""
        entries, removed = self.document.tensors, set(self.document.removed)
        problems += [
            f"{shown(n)} is removed, but the base has no such tensor" for n in removed - {*self.base}
        ]
        problems += [f"{shown(n)} is removed and stored" for n in removed & entries.keys()]
        order = [n for n in self.base if n not in removed]
        order += [n for n in entries if n not in self.base]
        found: dict[str, TensorInfo] = {}
        for name in order:
            info = self._info(name, entries.get(name), problems)
            if info is not None:
                found[name] = info
        return found

    def _info(self, name: str, entry: Entry | None, problems: list[str]) -> TensorInfo | None:
        theirs = self._theirs(name)
        if entry is None:
            return self.base.info(name)
        if isinstance(entry.scheme, Whole):
            return self.parts.tensors.get(f"{name}.whole")  # its absence is a problem of the parts
        if theirs is None:
            problems.append(f"{shown(name)}: the base has no such tensor")
            return None
        other = self.base.info(theirs)
        info = TensorInfo(other.shape, entry.dtype or other.dtype)
        problem = entry.scheme.problem(info)
        exact = entry.scheme.kind == "exact"
        if problem is None and info.dtype != other.dtype and not _floating(info, other):
            problem = f"dtype {info.dtype} from {other.dtype}"
        if problem is None and not exact and not _floating(info, other):
            problem = f"an inexact difference of {other.dtype}"
        if problem is not None:
            problems.append(f"{shown(name)} {list(other.shape)}: {entry.scheme.kind} cannot hold {problem}")
            return None
        return info

    def _theirs(self, name: str) -> str | None:
        theirs = self.base.aliases.get(name, name)
        return theirs if theirs in self.base else None

    def _tied(self, problems: list[str]) -> dict[str, str]:
        if self.document.aliases is None:
            found = self.base.aliases
            return {a: t for a, t in found.items() if a not in self._tensors and t in self._tensors}
        wrong = [
            f"{shown(a)} is tied to {shown(t)}, which is not there, or is a tensor itself"
            for a, t in self.document.aliases.items()
            if t not in self._tensors or a in self._tensors
        ]
        problems += wrong
        return dict(self.document.aliases)

    def _check_parts(self, problems: list[str]) -> None:
        """Every stored part has the name, shape and dtype that follow from the entries, and there is no other."""
        wanted = {
            f"{name}.{part}": info
            for name, entry in self.document.tensors.items()
            if name in self._tensors
            for part, info in entry.scheme.parts(self._tensors[name]).items()
        }
        stored = self.parts.tensors
        if not problems:
            problems += [f"{shown(n)} is missing" for n in wanted if n not in stored]
            problems += [f"{shown(n)} belongs to no tensor" for n in stored if n not in wanted]
            problems += [
                f"{shown(n)} is {stored[n].dtype} {list(stored[n].shape)}, not {i.dtype} {list(i.shape)}"
                for n, i in wanted.items()
                if n in stored and stored[n] != i
            ]
            problems += [
                f"{shown(n)} has no stored part"
                for n, e in self.document.tensors.items()
                if isinstance(e.scheme, Whole) and n not in self._tensors
            ]
        self._names = {
            name: [f"{name}.{p}" for p in entry.scheme.parts(self._tensors[name])]
            for name, entry in self.document.tensors.items()
            if name in self._tensors
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.base.config if self.document.config is None else self.document.config

    @property
    def assets(self) -> tuple[Asset, ...]:
        own = {a.name for a in self._own_assets} | set(self.document.dropped_files)
        return (*(a for a in self.base.assets if a.name not in own), *self._own_assets)

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.base, self.parts)

    def identity(self) -> str | None:
        # the schemes stand in weft_delta.json, which is no weight file
        inner = super().identity()
        return inner and f"{self.document.tensors}{self.document.removed}{inner}"

    # -- values -------------------------------------------------------------------------------------

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        entry = self.document.tensors.get(name)
        if entry is None:
            return self.base.read(name, start, stop, dtype=dtype)
        if start == stop:
            return torch.empty(0, dtype=dtype or info.dtype)
        theirs = self._theirs(name) or ""

        def base(first: int, last: int, wanted: torch.dtype | None) -> Tensor:
            return read_any(self.base, theirs, first, last, wanted)

        def part(which: str, first: int, last: int) -> Tensor:
            return self.parts.read(f"{name}.{which}", first, last)

        try:
            values = entry.scheme.decode(part, base, info, start, stop)
        except DataError as error:
            raise DataError(f"{self.origin}: tensor {name!r}: {error}") from None
        return values if dtype is None else round_to(values, dtype)

    def grain(self, name: str) -> int:
        entry = self.document.tensors.get(name)
        if entry is not None and isinstance(entry.scheme, Whole):
            return self.parts.grain(f"{name}.whole")
        return self.base.grain(self._theirs(name) or name)

    def _parts_of(self, name: str) -> list[str]:
        return self._names.get(name, [])

    def _over_base(self, name: str) -> str | None:
        """The base's tensor that reading `name` reads; None for one that is stored whole."""
        entry = self.document.tensors.get(name)
        return None if entry is not None and isinstance(entry.scheme, Whole) else self._theirs(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        theirs = self._over_base(name)
        if theirs is not None:
            self.base.prefetch(theirs, start, stop)
        numel = max(1, self.info(name).numel)
        stop = numel if stop is None else stop
        for part in self._parts_of(name):
            size = self.parts.info(part).numel  # parts run along the tensor, if not all evenly
            self.parts.prefetch(part, start * size // numel, -(-stop * size // numel))

    def ready(self, name: str) -> None:
        theirs = self._over_base(name)
        if theirs is not None:
            self.base.ready(theirs)
        for part in self._parts_of(name):
            self.parts.ready(part)

    def hold(self, name: str) -> None:
        theirs = self._over_base(name)
        if theirs is not None:
            self.base.hold(theirs)

    def held_bytes(self, name: str) -> int:
        theirs = self._over_base(name)
        return 0 if theirs is None else self.base.held_bytes(theirs)

    def release(self, name: str) -> None:
        theirs = self._over_base(name)
        if theirs is not None:
            self.base.release(theirs)
        for part in self._parts_of(name):
            self.parts.release(part)

    def bytes_read(self, name: str) -> int:
        theirs = self._over_base(name)
        own = 0 if theirs is None else self.base.bytes_read(theirs)
        return own + sum(self.parts.bytes_read(p) for p in self._parts_of(name))

    def working_bytes(self, name: str, count: int) -> int:
        info, entry, theirs = self.info(name), self.document.tensors.get(name), self._over_base(name)
        inner = 0
        if theirs is not None:
            most = min(count + 2 * (self.base.grain(theirs) - 1), info.numel)
            inner = self.base.working_bytes(theirs, most)
        if entry is None:
            return inner
        computed = max((self.parts.working_bytes(p, count) for p in self._parts_of(name)), default=0)
        return inner + entry.scheme.working_bytes(info, count) + computed


def _floating(*infos: TensorInfo) -> bool:
    return all(is_mergeable(i.dtype) for i in infos)
