"""What a routed model costs and what it has seen: `Cost`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from torch import nn

from weft.learn.loop import TEST_TIME
from weft.routing.gating import LEARNED
from weft.routing.residuals import Residual

if TYPE_CHECKING:
    from weft.routing.routed import Routed


@dataclass(frozen=True)
class Cost:
    """Counts are of stored numbers; bytes are what they take, packed as they are."""

    experts: int
    dense: int
    """Parameters of one expert."""
    residuals: int
    gates: int
    dense_bytes: int
    bytes: int
    """Of everything: the shared model, residuals, gates."""
    passes: float
    """Forward passes before the one that answers, at most (a pass that looks at a layer stops there)."""
    products: float
    """Multiply-adds at routed matrices for an example with weights of its own, against one expert's."""
    learned: tuple[str, ...]
    test_time: bool
    """Whether inputs of the test were learned from: not to be ranked with models that never saw them."""
    notes: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Bytes against one expert's."""
        return self.bytes / self.dense_bytes

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        lines = [
            f"{self.experts} experts in {self.bytes:,} bytes: {self.ratio:.2f} × one expert "
            f"({self.dense:,} parameters, {self.residuals:,} in residuals, {self.gates:,} in gates)",
            f"{self.passes:g} passes before the answer, {self.products:.2f} × the products at routed matrices",
        ]
        seen = "; ".join(self.learned) or "nothing"
        lines.append(f"learned from: {seen}" + (" (test time)" if self.test_time else ""))
        return "\n".join([*lines, *self.notes])


def cost(routed: Routed) -> Cost:
    """Counted from what the model holds."""
    own = [routed.value(n) for n in routed.names]
    stored = [v for r in _residuals(routed) for _, _, v in r.stored()]
    gates = [*routed.gates.parameters(), *routed.gates.buffers()]
    dense_bytes = sum(t.nbytes for t in own)
    every = dense_bytes + sum(t.nbytes for t in (*stored, *gates))
    return Cost(
        len(routed.tasks), sum(t.numel() for t in own), sum(t.numel() for t in stored),
        sum(t.numel() for t in gates), dense_bytes, every, _passes(routed), _products(routed),
        tuple(f"{f.what}: {f.data} ({f.split})" for f in routed.fitted),
        any(f.split == TEST_TIME for f in routed.fitted) or routed.gating.per == "batch", tuple(_notes(routed)),
    )  # fmt: skip


def _residuals(routed: Routed) -> list[Residual]:
    return [r for r in routed.residuals if isinstance(r, Residual)]


def _passes(routed: Routed) -> float:
    gating = routed.gating
    if gating.kind == "entropy":
        return float(len(routed.tasks))
    return 1.0 if gating.scope == "model" and gating.kind not in ("oracle", "preference") else 0.0


def _products(routed: Routed) -> float:
    """1 where weights are made before the pass (the same for many examples); else with every expert's product."""
    gating = routed.gating
    once = gating.kind in ("oracle", "preference") or routed.combining.method is not None
    used = len(routed.tasks) if gating.top is None else min(gating.top, len(routed.tasks))
    base = sum(prod(r.shape) for r in _residuals(routed) if len(r.shape) > 1)
    if once or any(p.maps is None or p.how in ("weights", "vmap") for p in routed.parts) or not base:
        return 1.0
    each = [sum(r.working(t) for r in _residuals(routed)) for t in range(len(routed.tasks))]
    return 1.0 + sum(sorted(each)[-used:]) / base


def _notes(routed: Routed) -> list[str]:
    gating, notes = routed.gating, []
    if gating.per == "batch":
        notes.append(
            "weights are the mean over a batch: in batches of one task they leak which task it is, so results "
            "are not those of single examples"
        )
    if gating.kind == "entropy":
        notes.append("the gate asks every expert for its output on the input: as dear as an ensemble")
    if gating.kind == "oracle":
        notes.append("the task has to be told: not to be ranked with models that find it out")
    if gating.kind in LEARNED and not any(f.what in ("router", "gate", "all") for f in routed.fitted):
        notes.append("the gate has not been trained: weights are those it starts with")
    thin = _too_thin(routed)
    if thin:
        notes.append(
            f"{thin} matrices have a shorter side than there are experts: they keep one direction each"
        )
    if any(not isinstance(p.inner, nn.Module) or p.maps is None for p in routed.parts):
        notes.append(
            "some parts are no maps linear in their weights: each different row of weights is a pass of its own"
        )
    return notes


def _too_thin(routed: Routed) -> int:
    count = len(routed.tasks)
    return sum(len(r.shape) > 1 and min(r.shape[0], prod(r.shape[1:])) < count for r in _residuals(routed))
