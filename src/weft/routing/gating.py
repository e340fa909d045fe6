"""How a gate is built and how its scores become weights: `Gating`, all settings of it in one flat record.

scores [.., T]  →  softmax(scores / temperature), or as they are
                →  the `top` largest, or those above `threshold` (the largest where none is)
                →  made to sum to one again, times `scale`
                →  the resting weights where the largest share is below `unsure`
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import Problems, UsageError, did_you_mean

Scope = Literal["model", "layer"]
Per = Literal["sample", "token", "batch"]

KINDS: Mapping[str, Mapping[str, Any]] = {
    "oracle": {"scope": "model", "softmax": False},
    "router": {"scope": "model", "softmax": True},
    "prototype": {"scope": "model", "softmax": True, "temperature": 0.05},
    "energy": {"scope": "layer", "softmax": True, "top": 1, "per": "token"},
    "residue": {"scope": "model", "softmax": True},
    "entropy": {"scope": "model", "softmax": True},
    "preference": {"scope": "layer", "softmax": False, "start": 0.3, "hidden": 1},
}
"""Kind → defaults that differ from the record's.

oracle       the task is told                                   EMR, TALL masks, TSV-C
router       a linear map or small network, trained             SMEAR, Twin-Merging, WEMoE, Ye et al.
prototype    cosine to the mean features of each task           ESM++, DAM
energy       ‖Vₜᵀx‖ over leading right directions of Rₜ         SMILE
residue      −‖z − VₜVₜᵀz‖ at one layer                         MASS
entropy      −H of each expert's own output                     DaWin
preference   a small network that reads a preference            PWE-MoE
"""
LEARNED = ("router", "preference")
"""Gates that are trained; the others follow from weights or from means of inputs."""
DIRECTIONAL = ("energy", "residue")


@dataclass(frozen=True, slots=True)
class Gating:
    """A gate's settings. UsageError, all at once, for what cannot be meant."""

    kind: str
    scope: Scope = "model"
    """One set of weights for the whole model, or every block its own."""
    at: str | None = None
    """scope model: the submodule whose input is looked at, in a first pass that stops there; the last linear
    layer by default."""
    per: Per = "sample"
    """Weights for each example, for each position (linear blocks only), or one mean for the batch."""
    softmax: bool = True
    temperature: float = 1.0
    scale: float = 1.0
    top: int | None = None
    threshold: float | None = None
    unsure: float | None = None
    hidden: int = 0
    """router, preference: hidden layers, each `width` wide (twice the inputs by default)."""
    width: int | None = None
    start: float = 0.0
    """router, preference: what every weight is at first (the last bias)."""
    spread: float = 0.01
    """router, preference: standard deviation of the first weights."""
    bias: bool = True
    """router, preference: without biases features are only scaled, not shifted."""
    normed: bool = False
    """router: layer-normalise inputs and weight rows (SMEAR)."""
    drop: float = 0.0
    """Share of experts left out at random while training (SMEAR)."""
    tied: bool = False
    """scope layer: one gate for all blocks, whose inputs must be of one width (E-WEMoE)."""
    rank: int | None = None
    """energy, residue: directions that are looked at, all that a residual has by default."""
    seed: int = 0

    @classmethod
    def of(cls, given: str | Gating, **changes: Any) -> Gating:
        """By kind with its defaults, or as given; `changes` replace settings."""
        if isinstance(given, Gating):
            return replace(given, **changes)
        if given not in KINDS:
            raise UsageError(
                f"there is no gate {given!r}{did_you_mean(given, KINDS)}; known: {', '.join(KINDS)}"
            )
        unknown = [k for k in changes if k not in {f.name for f in fields(cls)}]
        if unknown:
            raise UsageError(f"a gate has no setting {unknown[0]!r}")
        return cls(kind=given, **{**KINDS[given], **changes})

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise Problems(f"the gate {self.kind!r} cannot be meant so", problems)

    def problems(self) -> list[str]:
        """What is wrong with the values."""
        found = []
        if self.kind not in KINDS:
            found.append(f"kind must be one of {', '.join(KINDS)}")
        if self.scope not in ("model", "layer") or self.per not in ("sample", "token", "batch"):
            found.append("scope must be model or layer; per must be sample, token or batch")
        if self.scope == "model" and self.per == "token":
            found.append("weights per token are of a layer's own gate: scope='layer'")
        if self.kind in ("oracle", "residue", "entropy") and self.scope == "layer":
            found.append("such a gate weighs for the whole model: scope='model'")
        if self.kind in ("oracle", "preference", "entropy") and self.per == "token":
            found.append("such a gate has no weights per token")
        for name, low in (("temperature", 0.0), ("scale", None), ("start", None), ("spread", 0.0)):
            value = getattr(self, name)
            if not math.isfinite(value) or (low is not None and value < low):
                found.append(f"{name} = {value}")
        if self.temperature == 0:
            found.append("temperature = 0: choose top=1")
        for name in ("threshold", "unsure"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                found.append(f"{name} must be a share in [0, 1), not {value}")
        if not self.softmax and (self.threshold is not None or self.unsure is not None):
            found.append("threshold and unsure are shares: they need softmax")
        if not 0 <= self.drop < 1:
            found.append(f"drop must be a share in [0, 1), not {self.drop}")
        for name, least in (("top", 1), ("width", 1), ("rank", 1)):
            value = getattr(self, name)
            if value is not None and not least <= value <= 1 << 20:
                found.append(f"{name} = {value}")
        if not 0 <= self.hidden <= 8:
            found.append(f"hidden = {self.hidden}: 0 to 8 layers")
        if self.tied and (self.scope == "model" or self.kind not in LEARNED):
            found.append("tied is for trained gates of layers")
        return found

    def weights(self, scores: Tensor, rest: Tensor, training: bool = False) -> Tensor:
        """w [.., T] from scores [.., T]; rest [T]."""
        count = scores.shape[-1]
        if not self.softmax:
            w = scores
            if self.top is not None and self.top < count:
                w = w * chosen(w, self.top)
            return w * self.scale
        p = (scores / self.temperature).softmax(-1)
        sure = p.max(-1, keepdim=True).values
        kept = torch.ones_like(p, dtype=torch.bool)
        if training and self.drop:
            kept = torch.rand(p.shape, device=p.device) >= self.drop
            kept |= ~kept.any(-1, keepdim=True)  # of all left out, none is
        if self.top is not None and self.top < count:
            kept &= chosen(p, self.top)
        if self.threshold is not None:
            kept &= (p > self.threshold) | (p == sure)
        p = p * kept
        w = p / p.sum(-1, keepdim=True) * self.scale
        return w if self.unsure is None else torch.where(sure < self.unsure, rest.to(w), w)


def chosen(x: Tensor, top: int) -> Tensor:
    """Which of the last axis are the `top` largest; the first of equals."""
    order = x.detach().sort(dim=-1, descending=True, stable=True).indices[..., :top]
    return torch.zeros_like(x, dtype=torch.bool).scatter(-1, order, True)
