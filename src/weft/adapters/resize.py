"""`resize_lora`: an adapter at other ranks, by QR of its factors; no dense update is formed.

ΔW = BA has the singular values of the small core R_B R_Aᵀ (B = Q_B R_B, Aᵀ = Q_A R_A), so the truncation is the
best one and its error, the tail of the spectrum, is known exactly.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from weft.adapters.factors import Adapter, Factors, as_adapter
from weft.adapters.lowrank import Truncated, cores, finite, truncated
from weft.adapters.output import AdapterCheckpoint, Extra, adapter_checkpoint
from weft.adapters.ranks import Keep
from weft.checkpoints.adapters import Lora
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import execution
from weft.checkpoints.limits import shown
from weft.checkpoints.refs import Ref
from weft.errors import UsageError


def resize_lora(
    adapter: Adapter | Lora | Checkpoint | Ref | Path | str,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    base: Checkpoint | None = None,
    dtype: torch.dtype | None = None,
    layout: Literal["peft", "kohya"] = "peft",
    serve: Literal["vllm"] | None = None,
) -> AdapterCheckpoint:
    """A lazy adapter with the best approximation of each update; errors of each weight in `.report`.

    What to keep: at most `rank`, the share `energy` of ‖ΔW‖², the singular values above `ratio` times the largest
    or above `threshold`. LoHa and LoKr become LoRA this way. With `base` (needed to write kohya's files for PEFT)
    names are the base's. DoRA is refused: its update depends on the base; extract it from the adapted model.
    """
    keep = Keep(rank, energy, ratio, threshold)
    source = as_adapter(adapter, base)
    dora = [n for n in source.names if source.is_dora(n)]
    scaled = [*dora, *source.scalings]
    if scaled:
        raise UsageError(
            f"{source.origin}: {shown(scaled[0])} is scaled, not only added to; load it over its base "
            "and extract a LoRA of the result"
        )
    compute = _Compute(source, keep)
    slots = {n: source.slot(n, keep.most(min(source.rank(n), *_sides(source, n)))) for n in source.names}
    if not keep.fixed:
        ranks = execution().map(compute.rank, list(slots))
        slots = {n: replace(s, rank=r) for (n, s), r in zip(slots.items(), ranks, strict=True)}
    if dtype is not None:
        slots = {n: replace(s, dtype=dtype) for n, s in slots.items()}
    made = adapter_checkpoint(
        slots, compute, origin=f"{source.origin} resized", inputs=(source.lora.weights,),
        what=f"resize {keep} {source.config!r}", base_name=source.base_name, layout=layout, serve=serve,
        replaced={n: Extra(i, _Read(source, n, "replacement")) for n, i in source.replaced.items()},
        biases={n: Extra(i, _Read(source, n, "bias")) for n, i in source.biases.items()},
        working=compute.working,
    )  # fmt: skip
    made.report = compute.report
    return made


def _sides(adapter: Adapter, name: str) -> tuple[int, int]:
    out, *rest = adapter.shapes(name)
    return out, int(torch.Size(rest).numel())


class _Compute:
    """One weight's truncated factors. A class, so that it pickles."""

    def __init__(self, adapter: Adapter, keep: Keep) -> None:
        self.adapter, self.keep = adapter, keep
        self.ranks: dict[str, int] = {}
        self.report: dict[str, Any] = {}

    def factors(self, name: str) -> Factors:
        return finite(self.adapter.factors(name), name, self.adapter.origin)

    def rank(self, name: str) -> int:
        core = cores([self.factors(name)]).total([1.0])
        self.ranks[name] = self.keep.of(torch.linalg.svdvals(core))
        return self.ranks[name]

    def working(self, name: str) -> int:
        rank = self.adapter.rank(name)
        return 32 * rank * (sum(_sides(self.adapter, name)) + rank)

    def __call__(self, name: str) -> Factors:
        made: Truncated = truncated([self.factors(name)], rank=self.ranks.get(name, self.keep.rank))
        norm = float(made.spectrum.norm())
        self.report[name] = {"rank": made.factors.rank, "norm": norm, "error": made.error}
        return made.factors


class _Read:
    """One whole tensor of the adapter."""

    def __init__(self, adapter: Adapter, name: str, kind: Literal["replacement", "bias"]) -> None:
        self.adapter, self.name, self.kind = adapter, name, kind

    def __call__(self) -> torch.Tensor:
        return self.adapter.bias(self.name) if self.kind == "bias" else self.adapter.replacement(self.name)
