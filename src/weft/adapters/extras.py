"""What adapters hold beside low-rank updates: updates of biases, and tensors that they replace whole.

Updates of biases add up like all updates, Σ wᵢbᵢ. Whole tensors (modules_to_save) are weights of a model, not
differences, so they are averaged: Σ wᵢTᵢ / Σ wᵢ over the adapters that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.adapters.output import Extra
from weft.adapters.together import Together
from weft.checkpoints.base import TensorInfo
from weft.checkpoints.limits import shown
from weft.errors import DataProblems, UsageError

Extras = Literal["error", "average", "drop"]


@dataclass(frozen=True)
class MergedExtras:
    """Biases and whole tensors of a merged adapter, and what was left out."""

    biases: dict[str, Extra]
    replaced: dict[str, Extra]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class WeightedSum:
    """Σ wᵢTᵢ in float64, read when it is called. A class, so that it pickles."""

    terms: tuple[tuple[float, Callable[[str], Tensor]], ...]
    name: str

    def __call__(self) -> Tensor:
        parts = [w * read(self.name).to(torch.float64) for w, read in self.terms]
        return torch.stack(parts).sum(0)


def merged_extras(fitting: Together, weights: Sequence[float] | None, policy: Extras) -> MergedExtras:
    """The extras under a policy. `weights` None: they differ from tensor to tensor, so extras have none."""
    names = {n: a.origin for a in reversed(fitting.adapters) for n in (*a.biases, *a.replaced)}
    if policy not in ("error", "average", "drop"):
        raise UsageError(f"extras must be 'error', 'average' or 'drop', not {policy!r}")
    if not names:
        return MergedExtras({}, {})
    if policy == "drop":
        return MergedExtras({}, {}, (f"left out {len(names)} tensors: {', '.join(map(shown, names))}",))
    if policy == "error" or weights is None:
        raise DataProblems(
            "these adapters hold tensors beside their low-rank updates, which no way of merging adapters "
            'speaks of; pass extras="average" (by one list of weights) or extras="drop"',
            [f"{shown(n)} of {origin}" for n, origin in names.items()],
        )
    biases, replaced, problems = {}, {}, []
    for name in names:
        having = [(w, a) for w, a in zip(weights, fitting.adapters) if name in a.biases or name in a.replaced]
        added = [(w, a) for w, a in having if name in a.biases]
        whole = [(w, a) for w, a in having if name in a.replaced]
        infos = [a.biases[name] for _, a in added] + [a.replaced[name] for _, a in whole]
        total = sum(w for w, _ in whole)
        if len({i.shape for i in infos}) > 1:
            problems.append(f"{shown(name)} has different shapes: {[list(i.shape) for i in infos]}")
        elif added and whole:
            problems.append(f"{shown(name)} is updated by some adapters and replaced by others")
        elif not all(i.dtype.is_floating_point for i in infos):
            problems.append(f"{shown(name)} is {infos[0].dtype}, which cannot be averaged")
        elif whole and total == 0:
            problems.append(f"{shown(name)}: its weights add up to 0")
        elif added:
            biases[name] = Extra(_info(infos), WeightedSum(tuple((w, a.bias) for w, a in added), name))
        else:
            terms = tuple((w / total, a.replacement) for w, a in whole)
            replaced[name] = Extra(_info(infos), WeightedSum(terms, name))
    if problems:
        raise DataProblems("these tensors of the adapters cannot be averaged", problems)
    return MergedExtras(biases, replaced)


def _info(infos: Sequence[TensorInfo]) -> TensorInfo:
    dtype = infos[0].dtype
    for other in infos[1:]:
        dtype = torch.promote_types(dtype, other.dtype)
    return TensorInfo(infos[0].shape, dtype)
