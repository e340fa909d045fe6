"""What is in an adapter, weight by weight, and how much two adapters share: all from their factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch

from weft.adapters.factors import Adapter
from weft.adapters.lowrank import cores, finite, overlaps


@dataclass(frozen=True, slots=True)
class WeightReport:
    """One weight's update."""

    name: str
    shape: tuple[int, ...]
    rank: int
    scale: float
    kind: str
    """"lora", "dora", or how else it is stored."""
    norm: float
    """‖ΔW‖ in Frobenius norm (of B A, for DoRA)."""
    largest: float
    """The largest singular value."""
    energy90: int
    """The least rank that holds 90 % of ‖ΔW‖²."""


def inspect_adapter(adapter: Adapter) -> list[WeightReport]:
    """One report a weight, in the adapter's order. Costs O((out + in) r²) a weight; DataError where not finite."""
    found = []
    for name in adapter.names:
        factors = finite(adapter.factors(name), name, adapter.origin)
        s = torch.linalg.svdvals(cores([factors]).total([1.0]))
        mass = s.square()
        tail = mass.flip(0).cumsum(0).flip(0)
        found.append(WeightReport(
            name, adapter.shapes(name), adapter.rank(name), adapter.scale(name),
            "dora" if adapter.is_dora(name) else _kind(adapter, name), float(s.norm()),
            float(s[:1].sum()), int((tail > 0.1 * mass.sum()).sum()),
        ))  # fmt: skip
    return found


def _kind(adapter: Adapter, name: str) -> str:
    return {"LoraModule": "lora", "Hadamard": "loha", "Kronecker": "lokr", "Experts": "experts"}[
        type(adapter.update(name)).__name__
    ]


@dataclass(frozen=True, slots=True)
class Shared:
    """How much two adapters have in common over the weights that both update."""

    weights: int
    cosine: float
    """⟨ΔW₁, ΔW₂⟩ / (‖ΔW₁‖ ‖ΔW₂‖) over all of them."""
    a_overlap: float
    """Mean cos² of the principal angles between the row spaces of A; near 1 for runs from one seed."""


def shared(first: Adapter, second: Adapter) -> Shared:
    """Compare two adapters of one base. Where the A's share little, merging factors makes cross-terms."""
    names = [n for n in first.names if n in set(second.names) and first.shapes(n) == second.shapes(n)]
    inner = one = two = over = 0.0
    for name in names:
        made = cores([finite(a.factors(name), name, a.origin) for a in (first, second)])
        m, n = made.core(0), made.core(1)
        inner, one, two = (
            inner + float((m * n).sum()),
            one + float(m.square().sum()),
            two + float(n.square().sum()),
        )
        over += float(overlaps(made)[0, 1])
    cosine = inner / sqrt(one * two) if one and two else 0.0
    return Shared(len(names), cosine, over / len(names) if names else 0.0)


def totals(reports: Sequence[WeightReport]) -> tuple[float, int]:
    """‖ΔW‖ over all weights, and the parameters of the factors."""
    norm = sqrt(sum(r.norm**2 for r in reports))
    return norm, sum(r.rank * (r.shape[0] + int(torch.Size(r.shape[1:]).numel())) for r in reports)
