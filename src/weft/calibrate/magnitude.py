"""Magnitude calibration: merging keeps directions of updates better than their size; each layer's is restored.

After MAGIC (arXiv:2512.19320), whose coefficients scale a layer's update: here the update is scaled in the weights,
so that the result is an ordinary checkpoint. MAGIC's own feature variant rescales features while the network runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.calibrate.network import Site, full, held, kind_of, own, sites
from weft.calibrate.result import Calibrated, calibrated, written
from weft.calibrate.watch import seen_at
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Data, Forward
from weft.statistics.placed import placed

Space = Literal["weights", "features", "both"]


def magnitude(
    model: Model,
    data: Mapping[str, Data] | None,
    experts: Mapping[str, Model] | Sequence[Model],
    base: Model,
    *,
    space: Space = "weights",
    sensitive: Sequence[str] = (),
    limits: tuple[float, float] = (0.5, 3.0),
    module: nn.Module | None = None,
    samples: int | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Calibrated:
    """θ_l = θ0_l + ξ_l τ_l for every linear layer and convolution, τ = θ − θ0 of the merged model.

      weights    ξ_l = mean_t ‖τ_t,l‖ / ‖τ_l‖, without data
      features   ξ_l = Σ_t E‖Δh_t,l(x_t)‖ / Σ_t E‖Δh_l(x_t)‖ with Δh(x) = h(x; θ) − h(x; θ0) at the layer's output,
                 layer after layer, each measured behind those already scaled; unlabelled inputs by task
      both       weights first, features on the result

    ξ stays within `limits`, and at most 1 for layers that match a pattern of `sensitive`. UsageError for what
    cannot be meant, DataError where values are not finite. A layer that no merge moved stays.
    """
    tasks = _tasks(data, experts, space)
    low, high = limits
    if not 0 < low <= 1 <= high:
        raise UsageError(f"limits must enclose 1 and be positive, not {limits}")
    net, source = placed(model, module)
    like = net if isinstance(model, nn.Module) else module
    start = placed(base, like)[0]
    tuned = {t: placed(e, like)[0] for t, e in tasks.items()}
    layers = _layers(net)
    patterns = [sensitive] if isinstance(sensitive, str) else list(sensitive)
    told: dict[str, dict[str, float]] = {}

    def bounded(name: str, xi: float) -> float:
        top = 1.0 if any(fnmatchcase(name, p) for p in patterns) else high
        return min(max(xi, low), top)

    if space in ("weights", "both"):
        told["weights"] = {}
        for name in layers:
            size = _norm(net, start, name)
            if size > 0:
                goal = sum(_norm(t, start, name) for t in tuned.values()) / len(tuned)
                told["weights"][name] = bounded(name, goal / size)
                _scale(net, start, name, told["weights"][name])
    if space in ("features", "both"):
        assert isinstance(data, Mapping)
        every = {t: held(data[t], net, device, samples) for t in tasks}
        for other in (start, *tuned.values()):
            other.to(next(net.parameters()).device)
        found = sites(net, next(iter(every.values()))[0], forward)
        told["features"] = {}
        for site in (s for s in found if s.name in layers):
            goal, size = _sizes(net, start, tuned, every, site, forward)
            if size > 0 and _norm(net, start, site.name) > 0:
                told["features"][site.name] = bounded(site.name, goal / size)
                _scale(net, start, site.name, told["features"][site.name])
    changed = [full(n, leaf) for n in layers for leaf in ("weight", "bias") if _has(net, n, leaf)]
    return calibrated("magnitude", net, source, changed, told={"coefficients": told, "space": space})


def _tasks(
    data: Mapping[str, Data] | None, experts: Mapping[str, Model] | Sequence[Model], space: str
) -> dict[str, Model]:
    if space not in ("weights", "features", "both"):
        raise UsageError(f"space must be weights, features or both, not {space!r}")
    if isinstance(experts, str | nn.Module) or not len(experts):
        raise UsageError("experts must be the models that were merged, a list or by task")
    tasks = dict(experts) if isinstance(experts, Mapping) else {str(i): e for i, e in enumerate(experts)}
    if space != "weights" and (not isinstance(data, Mapping) or set(data) != set(tasks)):
        raise UsageError(
            "features need inputs of every task: data and experts as mappings with the same tasks"
        )
    return tasks


def _layers(net: nn.Module) -> list[str]:
    """Linear layers and convolutions whose weight is theirs alone."""
    found = []
    for name, m in net.named_modules():
        weight = own(net, name, "weight") if kind_of(m) is not None else None
        if weight is not None and weight.dim() > 1:
            found.append(name)
    if not found:
        raise UsageError(f"{type(net).__name__} has no linear layer or convolution with a weight of its own")
    return found


def _has(net: nn.Module, name: str, leaf: str) -> bool:
    return getattr(net.get_submodule(name), leaf, None) is not None


def _update(net: nn.Module, start: nn.Module, name: str, leaf: str) -> tuple[Any, Tensor, Tensor]:
    p, p0 = getattr(net.get_submodule(name), leaf), getattr(start.get_submodule(name), leaf)
    return p, p.detach().double(), p0.detach().double().to(p.device)


def _norm(net: nn.Module, start: nn.Module, name: str) -> float:
    """‖τ‖ of a layer's weight."""
    _, theta, theta0 = _update(net, start, name, "weight")
    return float((theta - theta0).norm())


def _scale(net: nn.Module, start: nn.Module, name: str, xi: float) -> None:
    for leaf in ("weight", "bias"):
        if _has(net, name, leaf):
            p, theta, theta0 = _update(net, start, name, leaf)
            written(p, theta0 + xi * (theta - theta0))


def _sizes(
    net: nn.Module, start: nn.Module, tuned: Mapping[str, nn.Module], data: Mapping[str, list[Batch]], site: Site,
    forward: Forward | None,
) -> tuple[float, float]:  # fmt: skip
    """Σ_t E‖Δh_t(x_t)‖ and Σ_t E‖Δh(x_t)‖ at one layer."""
    goal = size = 0.0
    for task, expert in tuned.items():
        n = sum(b.size for b in data[task])
        for batch in data[task]:
            h0, h, ht = (
                seen_at(m, [site.name], batch, forward)[site.name].double() for m in (start, net, expert)
            )
            if not bool((h0 + h + ht).isfinite().all()):
                raise DataError(f"the output of {site.name} is NaN or infinite for the data of {task!r}")
            share = batch.size / n
            size += share * float((h - h0).movedim(site.axis, -1).norm(dim=-1).mean())
            goal += share * float((ht - h0).movedim(site.axis, -1).norm(dim=-1).mean())
    return goal, size
