"""`Calibrated`: what calibration gives. An ordinary checkpoint, and maps beside it where weights cannot say it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weft.calibrate.adapted import ANY, FILE, Adapted, Maps
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.changed import Changed
from weft.checkpoints.company import InCompany, asset
from weft.checkpoints.memory import StateDict
from weft.methods.parts import stored_name


@dataclass
class Calibrated:
    """A calibrated network and how it came about."""

    how: str
    module: nn.Module
    """The network, ready to be called; `module(x, task=…)` where tasks have something of their own."""
    checkpoint: Checkpoint
    """Its weights, for `weft.save`; maps that could not be folded into them travel along as one more file."""
    moved: Mapping[str, float]
    """Tensor → ‖after − before‖ / the larger of ‖after‖ and ‖before‖, of those that changed."""
    notes: tuple[str, ...] = ()
    """What could not be done, or was done in another way."""
    told: Mapping[str, Any] = field(default_factory=dict)
    """Figures of the method: a temperature, losses, coefficients."""

    @property
    def added(self) -> int:
        """How many parameters there are beside the weights; 0 for an ordinary checkpoint."""
        return self.module.added if isinstance(self.module, Adapted) else 0

    def to_json(self) -> dict[str, Any]:
        """What happened, without the weights."""
        return {
            "how": self.how, "added": self.added, "moved": dict(self.moved), "notes": list(self.notes),
            **self.told,
        }  # fmt: skip


def calibrated(
    how: str, net: nn.Module, source: Checkpoint, changed: list[str], *, maps: Maps | None = None,
    private: Mapping[str, Mapping[str, Tensor]] | None = None, notes: tuple[str, ...] = (),
    told: Mapping[str, Any] | None = None,
) -> Calibrated:  # fmt: skip
    """The result: `changed` names the tensors of `net` that are no longer those of `source`."""
    state = net.state_dict()
    names = {n: stored_name(source, n) for n in changed}
    known = all(names[n] in source and source.info(names[n]).shape == tuple(state[n].shape) for n in changed)
    moved = {}
    if known:
        made: Checkpoint = Changed(source, {names[n]: state[n] for n in changed}) if changed else source
        for n in changed:
            before, after = source.tensor(names[n]).double(), state[n].cpu().double()
            if after.is_floating_point():
                moved[n] = float(
                    (after - before).norm() / torch.maximum(after.norm(), before.norm()).clamp(1e-30)
                )
    else:  # transformers' names differ from the file's
        made = InCompany(StateDict(state), source.config, source.assets)
    kept = {t: dict(by) for t, by in (maps or {}).items() if by}
    if not kept and not private:
        return Calibrated(how, net, made, moved, notes, dict(told or {}))
    module = Adapted(net, kept, private).eval().requires_grad_(False)
    beside = tuple(a for a in made.assets if a.name != FILE)
    made = InCompany(made, made.config, (*beside, asset(FILE, module.to_bytes())))
    return Calibrated(how, module, made, moved, notes, dict(told or {}))


@torch.no_grad()
def written(p: Tensor, value: Tensor) -> None:
    """Put a value, computed in float64, into a parameter or buffer."""
    p.copy_(value.to(p.dtype))


__all__ = ["ANY", "Calibrated", "calibrated", "written"]
