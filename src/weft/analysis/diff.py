"""`compare`: in what two checkpoints differ, tensor by tensor, in bounded memory.

With a = A's values, b = B's (with a base: a = A − base, b = B − base, the task vectors) of one tensor:

    norm_a = ‖a‖    norm_b = ‖b‖    norm_difference = ‖b − a‖    relative = ‖b − a‖ / ‖a‖
    cosine = ⟨a, b⟩ / (‖a‖ ‖b‖)                  none where either is zero
    sign_conflict = |{i: aᵢ bᵢ < 0}| / n         changed = |{i: Aᵢ ≠ Bᵢ}| / n
    max_abs = max |Bᵢ − Aᵢ|

All come from a few sums, so those of a layer, a stack, a kind of module or the whole model are the same
formulas over all their elements. Sums are in float64, taken by tile and added exactly: the digits depend
neither on the cut into ranges nor on the number of threads. Elements that are NaN or infinite anywhere are
counted and left out of the sums. Integers and bools are compared as numbers, complex numbers part by part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from weft.analysis.groups import group_of, in_order, kind_of, stack_of
from weft.analysis.sums import Difference, as_numbers, exact_sum
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import dtype_name
from weft.checkpoints.execution import execution, ranges
from weft.methods.stats import tile_sums


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    a: str
    b: str
    base: str | None
    tensors: Mapping[str, Difference]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: Mapping[str, tuple[list[int], list[int]]] = field(default_factory=dict)
    """Tensors that cannot be compared, since their shapes differ."""
    dtypes: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    not_in_base: Mapping[str, str] = field(default_factory=dict)
    """Tensors that have no task vector, and why; they are not compared."""
    integers: list[str] = field(default_factory=list)
    """Compared tensors that are no weights (counters, positions): left out of every group and total."""
    config: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    """Keys of config.json that differ; a key that one has not is None there."""

    @property
    def total(self) -> Difference:
        return Difference.total(self.weights.values())

    @property
    def weights(self) -> dict[str, Difference]:
        """The tensors but those of integers and bools."""
        left_out = set(self.integers)
        return {n: d for n, d in self.tensors.items() if n not in left_out}

    def grouped(self, key: Callable[[str], str | None]) -> dict[str, Difference]:
        """The differences of the tensors with one key; those with None are left out."""
        groups: dict[str, list[Difference]] = {}
        weights = self.weights
        for name in in_order(weights):
            if (label := key(name)) is not None:
                groups.setdefault(label, []).append(weights[name])
        return {label: Difference.total(parts) for label, parts in groups.items()}

    @property
    def layers(self) -> dict[str, Difference]:
        """By block, and by module outside the blocks, in the order of the data's flow."""
        return self.grouped(group_of)

    @property
    def stacks(self) -> dict[str, Difference]:
        return self.grouped(stack_of)

    @property
    def kinds(self) -> dict[str, Difference]:
        return self.grouped(kind_of)

    @property
    def same_values(self) -> bool:
        """True when both have the same tensors with the same values, in whatever dtypes."""
        unlike = self.only_a or self.only_b or self.shapes or self.not_in_base
        return not unlike and not any(d.changes for d in self.tensors.values())

    @property
    def identical(self) -> bool:
        """True when values, dtypes and config agree."""
        return self.same_values and not self.dtypes and not self.config

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data, for `weft diff --json`."""

        def each(found: Mapping[str, Difference]) -> dict[str, Any]:
            return {name: d.to_json() for name, d in found.items()}

        told = {k: v for k, v in asdict(self).items() if k != "tensors"}
        told["shapes"] = {n: {"a": a, "b": b} for n, (a, b) in self.shapes.items()}
        told["dtypes"] = {n: {"a": a, "b": b} for n, (a, b) in self.dtypes.items()}
        told["config"] = {n: {"a": a, "b": b} for n, (a, b) in self.config.items()}
        return {
            **told, "identical": self.identical, "same_values": self.same_values,
            "total": self.total.to_json(), "layers": each(self.layers), "stacks": each(self.stacks),
            "kinds": each(self.kinds), "tensors": each(self.tensors),
        }  # fmt: skip


def compare(a: Checkpoint, b: Checkpoint, base: Checkpoint | None = None) -> Comparison:
    """Compare two checkpoints, or with `base` their task vectors. See the module's docstring.

    A name that one of them ties to another tensor is compared by that tensor's values. Work is shared as
    the execution in force says. Raises DataError where a file cannot be read.
    """
    only_a: list[str] = []
    only_b: list[str] = []
    shapes, dtypes, not_in_base, integers, jobs = {}, {}, {}, [], []
    for name in dict.fromkeys([*a, *b]):
        stored_a, stored_b = _stored(a, name), _stored(b, name)
        if stored_a is None or stored_b is None:
            (only_b if stored_a is None else only_a).append(name)
            continue
        info_a, info_b = a.info(stored_a), b.info(stored_b)
        if info_a.dtype != info_b.dtype:
            dtypes[name] = dtype_name(info_a.dtype), dtype_name(info_b.dtype)
        if info_a.shape != info_b.shape:
            shapes[name] = list(info_a.shape), list(info_b.shape)
            continue
        sources = [(a, stored_a), (b, stored_b)]
        if base is not None:
            stored = _stored(base, name)
            if stored is None or base.info(stored).shape != info_a.shape:
                shape = "" if stored is None else f" in this shape: it has {list(base.info(stored).shape)}"
                not_in_base[name] = f"not in the base{shape}"
                continue
            sources.append((base, stored))
        jobs.append((name, sources))
        if not any(i.dtype.is_floating_point or i.dtype.is_complex for i in (info_a, info_b)):
            integers.append(name)
    found = execution().map(_difference, [sources for _, sources in jobs])
    tensors = {name: difference for (name, _), difference in zip(jobs, found, strict=True)}
    return Comparison(
        a.origin, b.origin, None if base is None else base.origin, tensors, only_a, only_b, shapes, dtypes,
        not_in_base, integers, config_differences(a.config, b.config),
    )  # fmt: skip


def _stored(source: Checkpoint, name: str) -> str | None:
    """The tensor that holds the values of `name`, or None."""
    name = source.aliases.get(name, name)
    return name if name in source else None


Sources = list[tuple[Checkpoint, str]]


def _difference(sources: Sources) -> Difference:
    """One tensor, range by range."""
    how = execution()
    for source, name in sources:
        source.ready(name)
    grain = math.lcm(*(source.grain(name) for source, name in sources))
    first, name = sources[0]
    info = first.info(name)

    def one(cut: tuple[int, int]) -> tuple[Tensor, list[int], float]:
        return _sums(*(s.read(n, *cut) for s, n in sources))

    parts = how.map(one, ranges(info.numel, grain, how.chunk))
    if not parts:
        return Difference()
    tiles = torch.cat([sums for sums, _, _ in parts]).T.tolist()
    aa, bb, ab, dd = (exact_sum(t) for t in tiles)
    conflicts, changes, nonfinite = (sum(column) for column in zip(*(c for _, c, _ in parts), strict=True))
    largest = max(m for _, _, m in parts)
    return Difference(info.numel, aa, bb, ab, dd, conflicts, changes, nonfinite, largest)


def _sums(raw_a: Tensor, raw_b: Tensor, raw_base: Tensor | None = None) -> tuple[Tensor, list[int], float]:
    """Tile sums of a², b², ab and (b − a)², the three counts, the largest |b − a|."""
    a, b = as_numbers(raw_a), as_numbers(raw_b)
    base = None if raw_base is None else as_numbers(raw_base)
    whole = not raw_a.dtype.is_floating_point and raw_a.dtype == raw_b.dtype and not raw_a.is_complex()
    # float64 cannot tell large integers apart
    unequal = (_bits(raw_a) != _bits(raw_b)) if whole else a != b
    finite = a.isfinite() & b.isfinite()
    if base is not None:
        finite &= base.isfinite()
    nonfinite = finite.numel() - int(finite.sum())
    if nonfinite:
        unequal &= ~(a.isnan() & b.isnan())
        a, b = (torch.where(finite, x, 0.0) for x in (a, b))
        base = None if base is None else torch.where(finite, base, 0.0)
    changes = int(unequal.sum())
    difference = b - a
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    if base is not None:
        a, b = a - base, b - base
    conflicts = int((a.sign() * b.sign() < 0).sum())
    sums = tile_sums(torch.stack([a * a, b * b, a * b, difference.square()]))
    if raw_a.is_complex():  # counts are of elements, and each came as two numbers: halve, rounding up
        conflicts, changes, nonfinite = (-(-n // 2) for n in (conflicts, changes, nonfinite))
    return sums, [conflicts, changes, nonfinite], largest


_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def _bits(x: Tensor) -> Tensor:
    """The same bits in a dtype torch can compare."""
    return x.view(_SIGNED[x.dtype]) if x.dtype in _SIGNED else x


def config_differences(
    a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, prefix: str = ""
) -> dict[str, tuple[Any, Any]]:
    """Keys, nested ones with dots, whose values differ."""
    found: dict[str, tuple[Any, Any]] = {}
    a, b = a or {}, b or {}
    for key in dict.fromkeys([*a, *b]):
        left, right = a.get(key), b.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found |= config_differences(left, right, f"{prefix}{key}.")
        elif left != right or type(left) is not type(right):
            found[f"{prefix}{key}"] = left, right
    return found
