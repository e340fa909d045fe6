"""`Assembled`: a checkpoint whose tensors are put together from ranges of other checkpoints' tensors.

One node for everything that moves tensors without computing: layers picked, repeated and reordered
(frankenmerges), one model's trunk in another's frame, experts stacked into one tensor or taken out of one. An
output tensor is a shape and a list of spans; its values, flattened, are the spans end to end.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm
from typing import Any

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.bits import Bits, join
from weft.checkpoints.dtypes import DType
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems, UsageError
from weft.late import Tensor, torch


@dataclass(frozen=True, slots=True)
class Span:
    """Elements `[start, stop)` of one tensor, flattened; the whole of it by default."""

    source: Checkpoint
    name: str
    start: int = 0
    stop: int | None = None

    @property
    def end(self) -> int:
        return self.source.info(self.name).numel if self.stop is None else self.stop

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Whole:
    """One output tensor: spans end to end, in a shape. Without one, the shape of the only span's tensor."""

    spans: tuple[Span, ...]
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    """Storage dtype; the first span's by default."""


class Assembled(Checkpoint):
    """Tensors put together from `pieces`: output name → a span, or a `Whole` of several.

    `config`, `assets` and `aliases` (tied name → name in `pieces`) are the result's own; `carried` says of
    tensors that they are copied rather than merged, and why, for the manifest. Raises DataProblems
    naming every tensor whose spans do not fill its shape or reach outside their tensors.
    """

    def __init__(
        self,
        pieces: Mapping[str, Span | Whole],
        *,
        config: Mapping[str, Any] | None = None,
        assets: tuple[Asset, ...] = (),
        aliases: Mapping[str, str] | None = None,
        origin: str = "assembled",
        carried: Mapping[str, str] | None = None,
    ) -> None:
        if not pieces:
            raise UsageError(f"{origin}: there is no tensor to assemble")
        self.origin, self._config, self._assets, self._aliases = origin, config, assets, dict(aliases or {})
        self.carried = dict(carried or {})
        self._wholes = {n: p if isinstance(p, Whole) else Whole((p,)) for n, p in pieces.items()}
        self._tensors = {n: _info(w) for n, w in self._wholes.items()}
        self._check()
        sources = {id(s.source): s.source for w in self._wholes.values() for s in w.spans}
        self._inputs = tuple(sources.values())
        self._users = self._uses()
        self._waiting = {key: set(names) for key, names in self._users.items()}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # ids are another process's there
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_users", "_waiting")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._users = self._uses()
        self._waiting = {key: set(names) for key, names in self._users.items()}
        self._lock = threading.Lock()

    def _uses(self) -> dict[tuple[int, str], set[str]]:
        """Which output tensors each source tensor is part of."""
        uses: dict[tuple[int, str], set[str]] = {}
        for name, whole in self._wholes.items():
            for span in whole.spans:
                uses.setdefault((id(span.source), span.name), set()).add(name)
        return uses

    def _check(self) -> None:
        problems = []
        for name, whole in self._wholes.items():
            for span in whole.spans:
                numel = span.source.info(span.name).numel
                if not 0 <= span.start <= span.end <= numel:
                    problems.append(
                        f"{name}: {span.name} of {span.source.origin} has {numel} elements, not "
                        f"[{span.start}, {span.end})"
                    )
            filled = sum(len(s) for s in whole.spans)
            if filled != self._tensors[name].numel:
                problems.append(
                    f"{name}: shape {list(self._tensors[name].shape)} has {self._tensors[name].numel} "
                    f"elements, its parts {filled}"
                )
        problems += [f"{a}: tied to {t}, which is not there" for a, t in self._aliases.items()
                     if t not in self._wholes]  # fmt: skip
        if problems:
            raise DataProblems(f"{self.origin} cannot be assembled", problems)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self._inputs

    @property
    def config(self) -> Mapping[str, Any] | None:
        return self._config

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self._assets

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    def spans(self, name: str) -> tuple[Span, ...]:
        """What a tensor is made of, for `--explain`."""
        self.info(name)
        return self._wholes[name].spans

    def grain(self, name: str) -> int:
        """A common multiple of the sources' grains. Reads that fall between are widened and cut."""
        grains = [s.source.grain(s.name) for s in self.spans(name)]
        return min(lcm(*grains), max(1, self.info(name).numel)) if grains else 1

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        start, stop = element_range(name, info, start, stop, 1)
        parts = [_read(span, a, b, dtype) for span, a, b in self._overlapping(name, start, stop)]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return torch.empty(0, dtype=dtype or info.dtype)
        wide = parts[0].dtype
        for part in parts:
            wide = torch.promote_types(wide, part.dtype)
        return torch.cat([p.to(wide) for p in parts])

    def bits(self, name: str, start: int = 0, stop: int | None = None, *, dtype: DType | None = None) -> Bits:
        start, stop = element_range(name, self.info(name), start, stop, 1)
        spans = list(self._overlapping(name, start, stop))
        if len({dtype or s.source.info(s.name).kind for s, _, _ in spans}) != 1:
            return super().bits(name, start, stop, dtype=dtype)
        parts = []
        for span, a, b in spans:
            first, last = _widened(span, a, b)
            parts.append(span.source.bits(span.name, first, last, dtype=dtype)[a - first : b - first])
        return (
            join(parts)
            if len({p.dtype for p in parts}) == 1
            else super().bits(name, start, stop, dtype=dtype)
        )

    def _overlapping(self, name: str, start: int, stop: int) -> Iterator[tuple[Span, int, int]]:
        """The spans within `[start, stop)` of the output, each with the range of its own source tensor."""
        offset = 0
        for span in self._wholes[name].spans:
            first, last = max(start, offset), min(stop, offset + len(span))
            if first < last:
                yield span, span.start + first - offset, span.start + last - offset
            offset += len(span)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        stop = self.info(name).numel if stop is None else stop
        for span, a, b in self._overlapping(name, start, stop):
            span.source.prefetch(span.name, *_widened(span, a, b))

    def ready(self, name: str) -> None:
        for span in self.spans(name):
            span.source.ready(span.name)

    def hold(self, name: str) -> None:
        for source, key in self._keys(name):
            source.hold(key)

    def at_hand(self, name: str) -> bool:
        return all(s.source.at_hand(s.name) for s in self.spans(name))

    def held_bytes(self, name: str) -> int:
        return sum(source.held_bytes(key) for source, key in self._keys(name))

    def release(self, name: str) -> None:
        # a source tensor that several outputs share is released by the last of them
        for source, key in self._keys(name):
            with self._lock:
                waiting = self._waiting[id(source), key]
                waiting.discard(name)
                last = not waiting
                if last:  # for the next save
                    waiting.update(self._users[id(source), key])
            if last:
                source.release(key)

    def _keys(self, name: str) -> list[tuple[Checkpoint, str]]:
        found = {(id(s.source), s.name): (s.source, s.name) for s in self.spans(name)}
        return list(found.values())

    def bytes_read(self, name: str) -> int:
        total = 0.0
        for span in self.spans(name):
            numel = span.source.info(span.name).numel
            total += span.source.bytes_read(span.name) * (len(span) / numel if numel else 0)
        return round(total)

    def working_bytes(self, name: str, count: int) -> int:
        # spans are read one after the other, then joined; a widened read is at most two grains longer
        peak = 0
        for span in self.spans(name):
            most = min(count + 2 * (span.source.grain(span.name) - 1), span.source.info(span.name).numel)
            peak = max(peak, span.source.working_bytes(span.name, most))
        return peak + (16 * count if len(self.spans(name)) > 1 else 0)

    def identity(self) -> str | None:
        numbers = {id(s): i for i, s in enumerate(self._inputs)}
        inner = [s.identity() for s in self._inputs]
        if None in inner:
            return None
        made = {
            name: [(numbers[id(s.source)], s.name, s.start, s.end) for s in whole.spans]
            for name, whole in self._wholes.items()
        }
        return f"Assembled({made}, {inner})"


def _info(whole: Whole) -> TensorInfo:
    first = whole.spans[0].source.info(whole.spans[0].name)
    shape = first.shape if whole.shape is None else whole.shape
    return TensorInfo(tuple(shape), whole.dtype or first.kind)


def _widened(span: Span, start: int, stop: int) -> tuple[int, int]:
    """The smallest range around `[start, stop)` that the source can be read in."""
    grain, numel = span.source.grain(span.name), span.source.info(span.name).numel
    return start // grain * grain, min(-(-stop // grain) * grain, numel)


def _read(span: Span, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
    first, last = _widened(span, start, stop)
    values = span.source.read(span.name, first, last, dtype=dtype)
    return values if (first, last) == (start, stop) else values[start - first : stop - first]


def joined(spans: list[Span], shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Whole:
    """Spans end to end in a shape: experts stacked along a new first axis, rows of several tensors."""
    return Whole(tuple(spans), shape, dtype)
