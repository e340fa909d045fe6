"""By which values a checkpoint of statistics knows the model it was measured on.

Experts of one base differ in nothing but their values, so names and shapes cannot tell whose statistics these are.
A fingerprint keeps a few values of a few tensors, as the measured module held them. A model fits if it has the same
values to the precision of the coarser dtype; and of several models none other may fit distinctly better.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import dtype_name, is_mergeable, parse_dtype
from weft.errors import WeftError
from weft.late import torch

TENSORS, VALUES = 8, 16


@dataclass(frozen=True)
class Fingerprint:
    """`samples[name]`: (dtype, positions, values)."""

    digest: str
    """Of the names and shapes of all parameters."""
    samples: Mapping[str, tuple[torch.dtype, list[int], list[float]]]

    @classmethod
    def of(cls, model: Checkpoint, names: Iterable[str] | None = None) -> Fingerprint:
        """The fingerprint of a model, over the floating tensors in `names` (all by default)."""
        known = sorted(n for n in (model if names is None else names) if is_mergeable(model.info(n).dtype))
        text = "\n".join(f"{n} {list(model.info(n).shape)}" for n in known)
        # matrices rather than norms' ones, spread over the depth of the model
        chosen = [n for n in known if len(model.info(n).shape) > 1] or known
        spread = dict.fromkeys(chosen[i * len(chosen) // TENSORS] for i in range(TENSORS)) if chosen else {}
        samples = {}
        for name in spread:
            info = model.info(name)
            where = sorted({i * info.numel // VALUES for i in range(VALUES)}) if info.numel else []
            samples[name] = (info.dtype, where, _values(model, name, where))
        return cls(hashlib.sha256(text.encode()).hexdigest()[:16], samples)

    def data(self) -> dict[str, Any]:
        """As JSON data."""
        told = {n: [dtype_name(d), where, values] for n, (d, where, values) in self.samples.items()}
        return {"digest": self.digest, "samples": told}

    @classmethod
    def read(cls, data: Any) -> Fingerprint | None:
        """From JSON data; None where there is none, or it is none."""
        try:
            samples = {str(n): (parse_dtype(d), [int(i) for i in where], [float(v) for v in values])
                       for n, (d, where, values) in data["samples"].items()}  # fmt: skip
            return cls(str(data["digest"]), samples)
        except (KeyError, TypeError, ValueError, AttributeError, WeftError):
            return None

    def distance(self, model: Checkpoint) -> tuple[float, float] | None:
        """(greatest difference relative to the tensor's scale, what the dtypes explain); None if not comparable."""
        worst, slack, compared = 0.0, 0.0, False
        for name, (dtype, where, values) in self.samples.items():
            stored = name if name in model else model.aliases.get(name, name)
            if stored not in model or not where or max(where) >= model.info(stored).numel:
                continue
            found, compared = _values(model, stored, where), True
            scale = math.sqrt(sum(v * v for v in values) / len(values)) or 1.0
            worst = max(worst, *(abs(a - b) / (scale + abs(a)) for a, b in zip(found, values, strict=True)))
            coarse = max(torch.finfo(d).eps for d in (dtype, model.info(stored).dtype))
            slack = max(slack, 2 * coarse)
        return (worst, slack) if compared else None


def mismatches(
    origin: str, fingerprint: Fingerprint | None, model: Checkpoint, others: Sequence[Checkpoint]
) -> list[str]:
    """What a fingerprint says against statistics being those of `model`. Only models as stored are compared.

    A computed model (a merge, a merged adapter) would have to be read in earnest, and rounds differently.
    """
    if fingerprint is None or model.inputs:
        return []
    own = fingerprint.distance(model)
    if own is None:
        return (
            []
            if not fingerprint.samples
            else [f"{origin}: measured on a model with none of the tensors of {model.origin}"]
        )
    near = [(d[0], m.origin) for m in others if not m.inputs and (d := fingerprint.distance(m)) is not None]
    nearest = min(near, default=(math.inf, ""))
    better = own[0] > 0 and nearest[0] < own[0] / 4
    if own[0] <= own[1] and not better:
        return []
    hint = f"; they fit {nearest[1]}: are they in the order of the models?" if better else ""
    return [f"{origin}: measured on other values than those of {model.origin}{hint}"]


def _values(model: Checkpoint, name: str, where: Sequence[int]) -> list[float]:
    model.ready(name)
    if model.grain(name) > 1:
        whole = model.read(name).double()
        return [float(whole[i]) for i in where]
    return [float(model.read(name, i, i + 1)[0]) for i in where]
