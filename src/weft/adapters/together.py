"""Several adapters of one base, held against each other: what they update, and whether they can be merged.

Everything is known from headers and configs; all problems of a kind are told at once, before a value is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Literal

import torch

from weft.adapters.factors import Adapter, Factors, Slot
from weft.adapters.lowrank import finite
from weft.checkpoints.limits import shown
from weft.errors import DataProblems, Problems, UsageError

Missing = Literal["error", "zero"]


@dataclass(frozen=True)
class Together:
    """Adapters that fit one another. A weight that one lacks has an update of rank 0 there."""

    adapters: tuple[Adapter, ...]
    slots: dict[str, Slot]
    """Every weight that any adapter updates; the rank is the sum of all ranks."""

    def ranks(self, name: str) -> list[int]:
        """One rank an adapter, 0 where it has no update."""
        return [a.rank(name) if name in a.names else 0 for a in self.adapters]

    def shape(self, name: str) -> tuple[int, ...]:
        """The weight's shape as the base stores it."""
        slot = self.slots[name]
        return slot.dims[::-1] if slot.transposed else slot.dims

    def factors(self, name: str) -> list[Factors]:
        """The updates of one weight, read; DataError where one is not finite."""
        (out, *rest), shape = self.slots[name].dims, self.shape(name)
        nothing = Factors(
            torch.zeros(out, 0, dtype=torch.float64), torch.zeros(0, prod(rest), dtype=torch.float64), shape,
            self.slots[name].transposed,
        )  # fmt: skip
        return [
            finite(a.factors(name), name, a.origin) if name in a.names else nothing for a in self.adapters
        ]

    def scales(self, name: str) -> list[float]:
        """alpha/r of each adapter, which `factors` has folded into B; 1 where it has no update."""
        return [a.scale(name) if name in a.names else 1.0 for a in self.adapters]


def together(
    adapters: Sequence[Adapter], *, missing: Missing = "error", bases: Literal["same", "any"] = "same"
) -> Together:
    """Adapters as one object, or the errors that keep them apart.

    `missing="zero"` takes the update of a weight that an adapter does not have as zero. `bases="any"` allows
    adapters whose configs name different bases (one base under several names).
    """
    if not adapters:
        raise UsageError("there are no adapters to merge")
    for adapter in adapters:
        _check_kind(adapter)
    if bases == "same":
        check_bases(adapters)
    names = list(dict.fromkeys(n for a in adapters for n in a.names))
    if missing == "error":
        _check_complete(adapters, names)
    slots, problems = {}, []
    for name in names:
        having = [a for a in adapters if name in a.names]
        kinds = {a.origin: (a.shapes(name), a.transposed(name)) for a in having}
        if len(set(kinds.values())) > 1:
            shapes = ", ".join(f"{list(dims)}{' transposed' * turned} in {origin}"
                               for origin, (dims, turned) in kinds.items())  # fmt: skip
            problems.append(f"{shown(name)}: {shapes}")
            continue
        own = [a.slot(name) for a in having]
        dtype = reduce(torch.promote_types, (slot.dtype for slot in own))
        slots[name] = replace(own[0], rank=sum(slot.rank for slot in own), dtype=dtype)
    if problems:
        raise DataProblems(
            "these adapters are for different models: shapes of their updates differ", problems
        )
    return Together(tuple(adapters), slots)


def check_bases(adapters: Sequence[Adapter]) -> None:
    """Problems unless all adapters that name a base name the same one."""
    named = {a.origin: a.base_name for a in adapters if a.base_name}
    if len(set(named.values())) > 1:
        raise Problems(
            'these adapters name different bases; pass bases="any" if they are one model under several names',
            [f"{origin}: {shown(base)}" for origin, base in named.items()],
        )


def _check_kind(adapter: Adapter) -> None:
    if adapter.scalings:
        raise UsageError(
            f"{adapter.origin} is (IA)³: it multiplies weights and has no low-rank update; such adapters add up "
            f"with + - * (weft.adapters.arithmetic)"
        )
    dora = [n for n in adapter.names if adapter.is_dora(n)]
    if dora:
        raise UsageError(
            f"{adapter.origin} is DoRA: its update depends on the base and has no low rank; load it over its "
            f"base and extract a LoRA of the result ({len(dora)} weights, e.g. {shown(dora[0])})"
        )


def _check_complete(adapters: Sequence[Adapter], names: Iterable[str]) -> None:
    problems = [
        f"{shown(n)}: not in {', '.join(a.origin for a in adapters if n not in a.names)}"
        for n in names
        if any(n not in a.names for a in adapters)
    ]
    if problems:
        raise DataProblems(
            'not every adapter updates every weight; pass missing="zero" to take what is missing as zero',
            problems,
        )


def scales(adapter: Adapter) -> dict[str, float]:
    """The scales of all updates: they stand in a config and not in a weight file."""
    return {name: adapter.scale(name) for name in adapter.names}
