"""How sure a network is: temperature scaling (arXiv:1706.04599) and the expected calibration error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.calibrate.adapted import ANY, Scaled
from weft.calibrate.network import full, held, own, sites
from weft.calibrate.result import Calibrated, calibrated, written
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Data, Forward, logits_of, outputs_of
from weft.statistics.labels import IGNORED, given
from weft.statistics.placed import placed


def temperature(
    model: Model,
    data: Data,
    *,
    module: nn.Module | None = None,
    samples: int | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Calibrated:
    """z ↦ z / T with the T that minimises the cross-entropy with the labels of `data`.

    Convex in 1/T, found by Newton's method. Predictions stay as they are. Folded into the last linear layer where
    that gives the logits and shares its weight with none; else kept as a map on the logits. Use data that the
    network was not trained on. DataError where no T is best (all labels are right by any margin, or never better
    than chance).
    """
    net, source = placed(model, module)
    every = held(data, net, device, samples)
    z, y = _logits(net, every, forward)
    t = best_temperature(z, y)
    told = {"temperature": t, "examples": len(z), "nll_before": _nll(z, y), "nll_after": _nll(z / t, y),
            "ece_before": calibration_error(z.softmax(1), y),
            "ece_after": calibration_error((z / t).softmax(1), y)}  # fmt: skip
    ends = [s for s in sites(net, every[0], forward) if s.final and s.kind == "map"]
    name = ends[-1].name if ends else None
    if name is not None and own(net, name, "weight") is not None:
        leaves = [
            leaf for leaf in ("weight", "bias") if getattr(net.get_submodule(name), leaf, None) is not None
        ]
        for leaf in leaves:
            p: Any = getattr(net.get_submodule(name), leaf)
            written(p, p.double() / t)
        return calibrated("temperature", net, source, [full(name, leaf) for leaf in leaves], told=told)
    if name is None and not isinstance(outputs_of(net, every[0].first(1), forward), Tensor):
        raise UsageError(f"no layer of {type(net).__name__} gives its logits, so it has no place for one")
    size = z.shape[1]
    made = Scaled(torch.full((size,), 1 / t), torch.zeros(size), -1)
    notes = ("kept as a map: the layer before the logits shares its weight, or there is none",)
    return calibrated("temperature", net, source, [], maps={ANY: {name or "": made}}, notes=notes, told=told)


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Σ over bins of (share of examples) · |accuracy − mean confidence|, bins of equal width in confidence.

    `probabilities` [n, classes], `labels` [n].
    """
    if bins < 1 or probabilities.dim() != 2 or labels.shape != probabilities.shape[:1] or not len(labels):
        raise UsageError(
            "calibration_error takes probabilities [n, classes], labels [n] and at least one bin"
        )
    sure, chosen = probabilities.double().max(1)
    right = (chosen == labels).double()
    at = (sure * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64, device=at.device).index_add_(0, at, right - sure)
    return float(gap.abs().sum() / len(labels))


def best_temperature(z: Tensor, y: Tensor) -> float:
    """T of least cross-entropy for logits z [n, classes] and labels y [n]."""
    z = z.double() - z.double().max(1, keepdim=True).values
    picked = z.gather(1, y[:, None])[:, 0]
    if bool((picked == 0).all()) or float((z.mean(1) - picked).mean()) >= 0:
        raise DataError(
            "no temperature is best for these data: every label is right by any margin, or the logits say no more "
            "than chance; give data that the network was not trained on"
        )
    beta = 1.0
    for _ in range(200):
        p = (beta * z).softmax(1)
        mean = (p * z).sum(1)
        slope = float((mean - picked).mean())
        bend = float(((p * z.square()).sum(1) - mean.square()).mean())
        # the step is held between half and double, where the curve is far from its parabola
        step = beta - slope / bend if bend > 0 else (2 * beta if slope < 0 else beta / 2)
        new = min(max(step, beta / 2), 2 * beta)
        if abs(new - beta) <= 1e-10 * beta:
            break
        beta = new
    return 1 / beta


def _logits(net: nn.Module, data: list[Batch], forward: Forward | None) -> tuple[Tensor, Tensor]:
    logits, labels = [], []
    for batch in data:
        with torch.no_grad():
            z = logits_of(outputs_of(net, batch, forward))
        y = given(z, batch, net).reshape(-1)
        kept = y != IGNORED
        logits.append(z.reshape(-1, z.shape[-1])[kept].double())
        labels.append(y[kept])
    return torch.cat(logits), torch.cat(labels)


def _nll(z: Tensor, y: Tensor) -> float:
    return float(nn.functional.cross_entropy(z, y))
