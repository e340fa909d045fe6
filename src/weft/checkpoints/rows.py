"""`Rows`: a checkpoint some of whose tensors have other rows: each a sparse combination of rows of sources.

    out[i] = Σ_j coefficient_j · source_j[row_j]

One node for everything that is done to a vocabulary: reordered, extended, cut, padded, filled from another model,
averaged over those that know a token, approximated by a few known tokens. What differs is only how the `RowMap`
is filled.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.ranges import element_range
from weft.checkpoints.rowmap import Ints, RowMap
from weft.errors import DataProblems
from weft.late import Tensor, torch

Held = dict[int, Tensor]
"""Whole tables in memory, by number of the source."""

NEAR = 1 << 14
"""Bytes that are read for nothing rather than in a read of their own: rows this near are read in one go."""
BATCH = 1 << 20
"""Elements of the terms that are added up at a time; a single row may be longer."""


@dataclass(frozen=True, eq=False)
class Mapped:
    """One tensor made of rows: the map, and the tensors that its `source` counts."""

    rows: RowMap
    sources: tuple[tuple[Checkpoint, str], ...]
    width: tuple[int, ...] = field(default=())
    """Shape of one row; `()` for a bias."""
    lead: tuple[int, ...] = field(default=())
    """Axes of length 1 before the rows (a bias stored as `[1, vocabulary]`)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.lead, len(self.rows), *self.width)


class Rows(Checkpoint):
    """`model` with the tensors of `maps` made of rows; the rest, and the tied names, as they are.

    `config` and `assets` replace the model's where given. A row that is one row of one source, times 1, is that
    row exactly; a combination is summed in float64, term by term in the map's order, so that how a tensor is cut
    never shows. Raises DataProblems for rows that no source has.
    """

    def __init__(
        self,
        model: Checkpoint,
        maps: Mapping[str, Mapped],
        *,
        config: Mapping[str, Any] | None = None,
        assets: tuple[Asset, ...] | None = None,
        origin: str = "",
    ) -> None:
        self.model, self.maps, self.origin = model, dict(maps), origin or model.origin
        self._config, self._assets = config, assets
        self._check()
        self._tensors = {
            n: TensorInfo(self.maps[n].shape, i.dtype) if n in self.maps else i
            for n, i in model.tensors.items()
        }
        sources = {id(s): s for s in (model, *(s for m in maps.values() for s, _ in m.sources))}
        self._inputs = tuple(sources.values())
        self._released: dict[tuple[int, str], set[str]] = {}
        self._held: dict[str, Held] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_released", "_held")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._released, self._held, self._lock = {}, {}, threading.Lock()

    def _check(self) -> None:
        problems = [f"{n}: not in {self.model.origin}" for n in self.maps if n not in self.model]
        for name, mapped in self.maps.items():
            width = prod(mapped.width)
            for k, (source, key) in enumerate(mapped.sources):
                info = source.info(key)
                if info.shape[len(info.shape) - len(mapped.width) :] != mapped.width:
                    problems.append(
                        f"{name}: a row has shape {list(mapped.width)}, {key} of {source.origin} is "
                        f"{list(info.shape)}"
                    )
                    continue
                there, used = info.numel // max(width, 1), mapped.rows.row[mapped.rows.source == k]
                if len(used) and not 0 <= used.min() <= used.max() < there:
                    problems.append(
                        f"{name}: {key} of {source.origin} has {there} rows, not row {used.max()}"
                    )
        if problems:
            raise DataProblems(f"{self.origin}: the rows do not fit", problems)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def aliases(self) -> Mapping[str, str]:
        return self.model.aliases

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self._inputs

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self.model.config if self._config is None else self._config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self.model.assets if self._assets is None else self._assets

    def identity(self) -> str | None:
        inner = [s.identity() for s in self._inputs]
        if None in inner:
            return None
        number = {id(s): i for i, s in enumerate(self._inputs)}
        made = {
            n: (m.rows.digest(), m.shape, [(number[id(s)], k) for s, k in m.sources])
            for n, m in self.maps.items()
        }
        return f"Rows({made}, {inner})"

    # -- reading ------------------------------------------------------------------------------------

    def grain(self, name: str) -> int:
        """Any range, unless a source must be read whole (then so must this)."""
        if name not in self.maps:
            return self.model.grain(name)
        mapped, numel = self.maps[name], max(1, self.info(name).numel)
        coarse = any(s.grain(k) > max(prod(mapped.width), 1) for s, k in mapped.sources)
        return numel if coarse else 1

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        if name not in self.maps:
            return self.model.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        mapped, width = self.maps[name], prod(self.maps[name].width)
        if stop == start:
            return torch.empty(0, dtype=dtype or info.dtype)
        first, last = start // width, -(-stop // width)
        a, b = mapped.rows.indptr[first], mapped.rows.indptr[last]
        terms = slice(int(a), int(b))
        counts = np.diff(mapped.rows.indptr[first : last + 1])
        if (counts == 1).all() and (mapped.rows.coefficient[terms] == 1).all():
            values = _gathered(mapped, terms, dtype, self._held.get(name, {}))
        else:
            values = _summed(mapped, terms, counts, self._held.get(name, {}))
        values = values.reshape(-1)[start - first * width : stop - first * width]
        return values if dtype is None else round_to(values, dtype)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        if name not in self.maps:
            self.model.prefetch(name, start, stop)
            return
        for source, key in self.maps[name].sources:
            source.prefetch(key)

    # -- what reading takes -------------------------------------------------------------------------

    def _keys(self, name: str) -> list[tuple[Checkpoint, str]]:
        found = {(id(s), k): (s, k) for s, k in self.maps[name].sources} if name in self.maps else {}
        return list(found.values()) if name in self.maps else [(self.model, name)]

    def ready(self, name: str) -> None:
        for source, key in self._keys(name):
            source.ready(key)

    def _scattered(self, name: str) -> list[int]:
        """Sources that would be read in so many places that reading them whole once is cheaper."""
        found: list[int] = []
        if name in self.maps:
            terms = self.maps[name].rows
            for k, (source, key) in enumerate(self.maps[name].sources):
                places = np.count_nonzero(np.diff(terms.row[terms.source == k]) != 1)
                found += [k] if places * NEAR > source.info(key).nbytes else []
        return found

    def hold(self, name: str) -> None:
        for source, key in self._keys(name):
            source.hold(key)
        if name in self.maps:
            mapped = self.maps[name]
            self._held[name] = {
                k: _whole(*mapped.sources[k], prod(mapped.width)) for k in self._scattered(name)
            }

    def held_bytes(self, name: str) -> int:
        inner = sum(source.held_bytes(key) for source, key in self._keys(name))
        for k in self._scattered(name):
            source, key = self.maps[name].sources[k]
            inner += source.info(key).numel * (8 if source.inputs else source.info(key).dtype.itemsize)
        return inner

    def release(self, name: str) -> None:
        self._held.pop(name, None)
        # a source's tensor that several tensors here are made of (a tied head) is released by the last of them
        for source, key in self._keys(name):
            users = {n for n in self.maps if any(s is source and k == key for s, k in self.maps[n].sources)}
            with self._lock:
                done = self._released.setdefault((id(source), key), set())
                done.add(name)
                last = done >= users
                if last:
                    done.clear()  # for the next save
            if last:
                source.release(key)

    def bytes_read(self, name: str) -> int:
        if name not in self.maps:
            return self.model.bytes_read(name)
        mapped, total = self.maps[name], 0.0
        uses = np.bincount(mapped.rows.source, minlength=len(mapped.sources))
        for (source, key), used in zip(mapped.sources, uses, strict=True):
            rows = source.info(key).numel // max(prod(mapped.width), 1)
            total += source.bytes_read(key) * min(1.0, float(used) / max(rows, 1))
        return round(total)

    def working_bytes(self, name: str, count: int) -> int:
        if name not in self.maps:
            return self.model.working_bytes(name, count)
        width = max(1, prod(self.maps[name].width))
        rows = count + 2 * width
        batch = max(BATCH, width)
        longest = max(
            (s.working_bytes(k, min(max(batch, s.grain(k)), s.info(k).numel)) for s, k in self._keys(name)),
            default=0,
        )
        # the rows themselves twice, and a batch of terms as read, as float64 and times its coefficients
        return longest + 16 * rows + 24 * min(batch, max(rows, len(self.maps[name].rows.row) * width))


def _whole(source: Checkpoint, name: str, width: int) -> Tensor:
    """`[rows, width]`: a whole tensor, read in ranges."""
    numel, step = source.info(name).numel, max(BATCH, source.grain(name))
    step -= step % source.grain(name)
    made: Tensor | None = None
    for start in range(0, numel, step):
        piece = source.read(name, start, min(start + step, numel))
        made = torch.empty(numel, dtype=piece.dtype) if made is None else made
        made[start : start + len(piece)] = piece
    assert made is not None
    return made.reshape(-1, width)


def _gathered(mapped: Mapped, terms: slice, dtype: torch.dtype | None, held: Held) -> Tensor:
    """`[terms, width]`: the rows as they are, in the order of the terms."""
    which, rows, width = mapped.rows.source[terms], mapped.rows.row[terms], prod(mapped.width)
    used = np.unique(which)

    def of(k: int, wanted: Ints) -> Tensor:
        if k in held:
            return held[k][torch.from_numpy(wanted)]
        return _rows_of(mapped.sources[k], wanted, width, dtype)

    if len(used) == 1:
        return of(int(used[0]), rows)
    parts = [(which == k, of(int(k), rows[which == k])) for k in used]
    wide = parts[0][1].dtype
    for _, part in parts:
        wide = torch.promote_types(wide, part.dtype)
    out = torch.empty((len(rows), width), dtype=wide)
    for mask, part in parts:
        out[torch.from_numpy(mask)] = part.to(wide)
    return out


def _rows_of(source: tuple[Checkpoint, str], rows: Ints, width: int, dtype: torch.dtype | None) -> Tensor:
    """`[len(rows), width]`: rows of one tensor; those near each other are read in one go."""
    checkpoint, name = source
    if len(rows) and (np.diff(rows) == 1).all():
        return _run(checkpoint, name, int(rows[0]), int(rows[-1]) + 1, width, dtype)
    need, back = np.unique(rows, return_inverse=True)
    near = max(
        1, NEAR // max(1, width * checkpoint.info(name).dtype.itemsize), checkpoint.grain(name) // width
    )
    longest = max(BATCH, checkpoint.grain(name)) // width + 1
    cuts = np.flatnonzero(np.diff(need) > near) + 1
    got: Tensor | None = None
    for begin, end in zip([0, *cuts], [*cuts, len(need)], strict=True):
        while begin < end:  # a run longer than a batch is read in several pieces
            upto = begin + int(np.searchsorted(need[begin:end], need[begin] + longest))
            low = int(need[begin])
            piece = _run(checkpoint, name, low, int(need[upto - 1]) + 1, width, dtype)
            if got is None:
                got = torch.empty((len(need), width), dtype=piece.dtype)
            got[begin:upto] = piece[torch.from_numpy(need[begin:upto] - low)]
            begin = upto
    assert got is not None
    return got[torch.from_numpy(back)]


def _run(
    checkpoint: Checkpoint, name: str, first: int, last: int, width: int, dtype: torch.dtype | None
) -> Tensor:
    """Rows `[first, last)` of one tensor; where its grain is coarser, what was read beside them is cut off."""
    grain, numel = checkpoint.grain(name), checkpoint.info(name).numel
    start, stop = first * width // grain * grain, min(-(-last * width // grain) * grain, numel)
    values = checkpoint.read(name, start, stop, dtype=dtype)
    return values[first * width - start : last * width - start].reshape(last - first, width)


def _summed(mapped: Mapped, terms: slice, counts: Ints, held: Held) -> Tensor:
    """`[rows, width]` in float64: the combinations, batch after batch of terms."""
    width = prod(mapped.width)
    out = torch.zeros((len(counts), width), dtype=torch.float64)
    into = torch.from_numpy(np.repeat(np.arange(len(counts)), counts))
    step = max(1, BATCH // width)
    for begin in range(terms.start, terms.stop, step):
        end = min(begin + step, terms.stop)
        values = _gathered(mapped, slice(begin, end), None, held).double()
        values = values * torch.from_numpy(mapped.rows.coefficient[begin:end])[:, None]
        # adds one term after the other, so that a sum does not depend on where the terms were cut
        out.index_add_(0, into[begin - terms.start : end - terms.start], values)
    return out
