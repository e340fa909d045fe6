"""`apply_adapters`: a base with one or several adapters over it, each at its strength, as one lazy checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weft.checkpoints.adapted import Adapted
from weft.checkpoints.adapters import Lora, describe, load_adapter
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.checkpoints.refs import Ref
from weft.errors import UsageError


def apply_adapters(
    base: object,
    adapters: Sequence[Lora | Checkpoint | Ref | Path | str],
    weights: Sequence[float] | None = None,
) -> Checkpoint:
    """base + Σ wᵢ (base with adapter i − base), exactly, of any kinds of adapters; 1 each by default.

    At strength 1 a single adapter gives what PEFT's `merge_and_unload` gives. Raises DataProblems where an adapter
    does not fit the base.
    """
    if not adapters:
        raise UsageError("there is no adapter to apply")
    strengths = [1.0] * len(adapters) if weights is None else list(weights)
    if len(strengths) != len(adapters):
        raise UsageError(f"{len(adapters)} adapters need as many weights, not {len(strengths)}")
    model = load(base)
    over = [Adapted(model, _lora(a)) for a in adapters]
    if len(over) == 1 and strengths[0] == 1:
        return over[0]
    apart = {name for o in over for name in o.tensors if name not in model.tensors}
    if apart:
        raise UsageError(
            f"{', '.join(sorted(apart))} is tied in the base and changed by an adapter: apply one "
            "adapter at strength 1, or merge the adapters first"
        )
    total: Checkpoint = model
    for adapted, strength in zip(over, strengths, strict=True):
        total = total + strength * (adapted - model)
    return total


def _lora(source: Lora | Checkpoint | Ref | Path | str) -> Lora:
    if isinstance(source, Lora):
        return source
    if isinstance(source, Checkpoint):
        config = getattr(source, "adapter_config", None)
        if config is None:
            raise UsageError(f"{source.origin} is a model, not an adapter")
        return describe(config, source, source.origin)
    return load_adapter(source)
