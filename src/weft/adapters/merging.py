"""How one weight of several adapters is merged: the part of a merge that computes.

A `Merging` knows the rank of every result from headers, computes factors when it is called with a weight's name,
and notes what it found out on the way: what was lost, how much the adapters overlap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod, sqrt
from typing import Any

from weft.adapters.coordinates import Shared
from weft.adapters.factors import Factors
from weft.adapters.lowrank import concat, cores, norm, overlaps, truncated
from weft.adapters.products import factor_product, product_bytes
from weft.adapters.together import Together
from weft.adapters.ways import Kind, on_weight
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import executing, execution, map_here

Weights = float | Sequence[float] | Mapping[str, Sequence[float]]
"""One number for all adapters, one each, or a list of them for every tensor's name."""


@dataclass
class Merging:
    """How each weight is merged. Called with a weight's name, it computes it; pickles."""

    together: Together
    how: str
    kind: Kind
    weights: Weights | None
    rank: int | None
    energy: float | None
    seed: int
    params: dict[str, Any]
    node: Checkpoint | None = None
    """The lazy merge of products or of coordinates."""
    shared: Shared | None = None
    ranks: dict[str, int] = field(default_factory=dict)
    """Ranks that an energy asked for, found in a first pass."""
    report: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of every weight, once it is computed: its `rank`; the `norm` of what was merged, before it was truncated;
    the relative `error` of the truncation in Frobenius norm; the `overlap` of the A's, the mean cos² of the
    principal angles between the row spaces of every two (1 for one adapter)."""

    def weights_of(self, name: str) -> list[float]:
        """One weight an adapter for this tensor; 1/k each where none were given."""
        k = len(self.together.adapters)
        if self.weights is None:
            return [1 / k] * k
        if isinstance(self.weights, Mapping):
            return [float(w) for w in self.weights[name]]
        return [float(self.weights)] * k if isinstance(self.weights, int | float) else list(self.weights)

    def limit(self, name: str) -> int:
        """The rank of one result, from headers (and the energy, once it was looked at)."""
        if name in self.ranks:
            return self.ranks[name]
        slot = self.together.slots[name]
        out, into = slot.dims[0], prod(slot.dims[1:])
        ranks = [r for r in self.together.ranks(name) if r]
        most = min(sum(ranks), out, into)
        if self.kind == "products":
            most = min(out, into)
        elif self.how == "concat" and self.rank is None:
            most = sum(ranks)
        elif self.how == "lego":
            most = min(self.rank or max(1, round(sum(ranks) / len(ranks))), sum(ranks))
        elif self.kind == "factors":
            most = max(ranks)
        if self.rank is not None:
            return min(self.rank, most)
        lossy = self.how == "svd" or self.kind == "products"
        return min(max(ranks) if lossy and self.energy is None else sum(ranks), most)

    def __call__(self, name: str) -> Factors:
        factors, limit = self.together.factors(name), self.limit(name)
        weights = self.weights_of(name)
        made = cores(factors)
        if self.kind == "sum":
            if self.how == "concat" and self.rank is None and self.energy is None:
                result, error = concat(factors, weights), 0.0
            else:
                best = made.truncated(weights, rank=limit, energy=self.energy)
                result, error = best.factors, best.error
        else:
            result, error = self._other(name, factors, weights, limit)
        pairs = overlaps(made)
        k = len(factors)
        overlap = float(pairs.sum() - k) / (k * (k - 1)) if k > 1 else 1.0
        # a truncation is a projection, so that ‖result‖² + ‖lost‖² = ‖whole‖²
        whole = norm(result) / sqrt(1 - error**2) if error < 1 else 0.0
        self.report[name] = {"rank": result.rank, "norm": whole, "error": error, "overlap": overlap}
        return result

    def _other(
        self, name: str, factors: Sequence[Factors], weights: Sequence[float], limit: int
    ) -> tuple[Factors, float]:
        if self.kind == "factors":
            present = [(f, w, s) for f, w, s in zip(factors, weights, self.together.scales(name)) if f.rank]
            found, w, s = (list(v) for v in zip(*present, strict=True))
            filled = {"scales": s, "name": name, "seed": self.seed, "rank": self.rank}
            whole = on_weight(self.how, found, w, filled, self.params)
        else:
            assert self.node is not None
            if self.kind == "products":
                turned = self.together.slots[name].transposed
                return factor_product(self.node, name, transposed=turned, rank=limit, energy=self.energy)
            assert self.shared is not None
            # a thread that waited for others here would help them, and meet the lock of this very weight
            with executing(replace(execution(), map=map_here)):
                whole = self.shared.at(name).lift(self.node.tensor(name))
        if whole.rank <= limit and self.energy is None:
            return whole, 0.0
        best = truncated([whole], rank=limit, energy=self.energy)
        return best.factors, best.error

    def working(self, name: str) -> int:
        """Bytes that merging one weight holds at its peak; an upper bound."""
        dims = self.together.slots[name].dims
        out, into = dims[0], prod(dims[1:])
        held = 8 * 8 * sum(self.together.ranks(name)) * (out + into)
        if self.kind == "products" and self.node is not None:
            held += product_bytes(self.node, name)
        return held

    def reads(self, name: str) -> int:
        """Bytes of the adapters that merging one weight reads."""
        slot = self.together.slots[name]
        return sum(self.together.ranks(name)) * (slot.dims[0] + prod(slot.dims[1:])) * slot.dtype.itemsize

    def __str__(self) -> str:
        return (
            f"merge_adapters({self.how!r}, weights={self.weights!r}, rank={self.rank}, energy={self.energy}, "
            f"seed={self.seed}, {self.params}, {[self.together.scales(n) for n in self.together.slots]})"
        )
