"""A classifier fitted anew to the merged network's features: by ridge regression in closed form, or logistic."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.calibrate.network import Site, full, held, hooked, own, sites
from weft.calibrate.result import Calibrated, calibrated, written
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Data, Forward, logits_of, outputs_of
from weft.statistics.labels import IGNORED, given
from weft.statistics.placed import placed
from weft.train.select import is_conv1d


def refit_head(
    model: Model,
    data: Data,
    *,
    fit: Literal["ridge", "logistic"] = "ridge",
    ridge: float = 1e-3,
    balanced: bool = False,
    teacher: Model | None = None,
    module: nn.Module | None = None,
    head: str | None = None,
    steps: int = 200,
    samples: int | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Calibrated:
    """The last linear layer, fitted to its inputs h on `data`.

      ridge      W, b = argmin Σ ‖W h + b − t‖² + ρ n tr(H)/d ‖W‖², H the covariance of h: one solve
      logistic   W, b = argmin mean CE(W h + b, t) + ρ/2 ‖W − W0‖², from the head there is, by L-BFGS

    t is the label as one-hot; with `teacher` (the expert) no labels are used: t are its logits (ridge) or
    probabilities (logistic). `balanced` gives every class the same weight. Positions labelled −100 are left out.
    The result is an ordinary checkpoint; logits of ridge are no log-probabilities (see `temperature`).

    Raises UsageError where there is no such layer, it shares its weight, or there are no labels.
    """
    if fit not in ("ridge", "logistic"):
        raise UsageError(f"fit must be ridge or logistic, not {fit!r}")
    if ridge < 0:
        raise UsageError(f"ridge must be 0 or more, not {ridge}")
    net, source = placed(model, module)
    every = held(data, net, device, samples)
    site = head_of(net, sites(net, every[0], forward), head)
    guide = None
    if teacher is not None:
        guide = placed(teacher, net if isinstance(model, nn.Module) else module)[0].to(_device(net))
    h, t = _pairs(net, site, every, guide, fit, forward)
    w = _class_weights(t) if balanced else torch.ones(len(t), dtype=torch.float64, device=h.device)
    before = _loss(net, site, h, t, fit)
    weight, bias = (_ridge if fit == "ridge" else _logistic)(net, site, h, t, w, ridge, steps)
    _put(net, site, weight, bias)
    told = {"fit": fit, "examples": len(h), "loss_before": before, "loss_after": _loss(net, site, h, t, fit)}
    leaves = ["weight"] + (["bias"] if own(net, site.name, "bias") is not None else [])
    return calibrated("head", net, source, [full(site.name, x) for x in leaves], told=told)


def head_of(net: nn.Module, found: list[Site], name: str | None) -> Site:
    """The linear layer that gives the network's output, or the one named. UsageError where it may not change."""
    linear = [s for s in found if s.axis == -1]
    if name is not None:
        linear = [s for s in linear if s.name == name]
    chosen = [s for s in linear if s.final] or (linear if name is not None else [])
    if len(chosen) != 1:
        known = ", ".join(s.name for s in found if s.axis == -1) or "none"
        what = "a linear layer that gives its output" if name is None else f"a linear layer {name!r}"
        raise UsageError(
            f"{type(net).__name__} has not {what} (head=…); linear layers these data reach: {known}"
        )
    if own(net, chosen[0].name, "weight") is None:
        raise UsageError(
            f"{chosen[0].name} shares its weight with another layer, so it cannot be changed alone"
        )
    return chosen[0]


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _pairs(
    net: nn.Module, site: Site, data: list[Batch], guide: nn.Module | None, fit: str, forward: Forward | None
) -> tuple[Tensor, Tensor]:
    """Inputs h [n, d] and targets t [n, classes], float64."""
    inputs, targets = [], []
    for batch in data:
        seen: list[Tensor] = []
        handle = net.get_submodule(site.name).register_forward_pre_hook(lambda m, a, s=seen: s.append(a[0]))
        with hooked([handle]), torch.no_grad():
            logits = logits_of(outputs_of(net, batch, forward))
        h = seen[-1].reshape(-1, seen[-1].shape[-1]).double()
        flat = logits.reshape(-1, logits.shape[-1])
        if len(h) != len(flat):
            raise UsageError(f"{site.name} runs on other positions than the logits: name the head (head=…)")
        if guide is not None:
            with torch.no_grad():
                t = logits_of(outputs_of(guide, batch, forward)).reshape(flat.shape).double()
            t = t.softmax(-1) if fit == "logistic" else t
        else:
            labels = given(logits, batch, net).reshape(-1)
            kept = labels != IGNORED
            h, t = h[kept], nn.functional.one_hot(labels[kept], flat.shape[-1]).double()
        inputs.append(h)
        targets.append(t)
    h, t = torch.cat(inputs), torch.cat(targets)
    if len(h) < 2 or not bool(h.isfinite().all() & t.isfinite().all()):
        raise DataError(f"the inputs of {site.name} are fewer than 2 or not finite for these data")
    return h, t


def _class_weights(t: Tensor) -> Tensor:
    """1 / (size of an example's class), of mean 1."""
    which = t.argmax(1)
    w = 1 / torch.bincount(which, minlength=t.shape[1]).double()[which]
    return w / w.mean()


def _ridge(
    net: nn.Module, site: Site, h: Tensor, t: Tensor, w: Tensor, ridge: float, steps: int
) -> tuple[Tensor, Tensor]:
    n = w.sum()
    biased = getattr(net.get_submodule(site.name), "bias", None) is not None
    middle = (w[:, None] * h).sum(0) / n if biased else torch.zeros_like(h[0])
    goal = (w[:, None] * t).sum(0) / n if biased else torch.zeros_like(t[0])
    x, y = h - middle, t - goal
    cov = (w[:, None] * x).T @ x / n
    d = len(cov)
    cov += torch.eye(d, dtype=cov.dtype, device=cov.device) * (ridge * cov.diagonal().mean()).clamp(min=1e-12)
    weight = torch.linalg.solve(cov, (w[:, None] * x).T @ y / n).T
    return weight, goal - weight @ middle


def _logistic(
    net: nn.Module, site: Site, h: Tensor, t: Tensor, w: Tensor, ridge: float, steps: int
) -> tuple[Tensor, Tensor]:
    w0, b0 = _values(net, site)
    weight, bias = w0.clone().requires_grad_(), b0.clone().requires_grad_()
    biased = getattr(net.get_submodule(site.name), "bias", None) is not None
    learned = [weight, bias] if biased else [weight]
    optimizer = torch.optim.LBFGS(learned, max_iter=steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        ce = -(t * (h @ weight.T + bias).log_softmax(1)).sum(1)
        loss = (w * ce).mean() + ridge / 2 * (weight - w0).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    if not bool(weight.isfinite().all()):
        raise DataError("the logistic fit did not stay finite: raise ridge")
    return weight.detach(), bias.detach()


def _values(net: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """W [classes, d] and b [classes] (zeros where there is none), float64."""
    m: Any = net.get_submodule(site.name)
    weight = (m.weight.T if is_conv1d(m) else m.weight).detach().double()
    bias = weight.new_zeros(len(weight)) if getattr(m, "bias", None) is None else m.bias.detach().double()
    return weight, bias


def _put(net: nn.Module, site: Site, weight: Tensor, bias: Tensor) -> None:
    m: Any = net.get_submodule(site.name)
    written(m.weight, weight.T if is_conv1d(m) else weight)
    if getattr(m, "bias", None) is not None:
        written(m.bias, bias)


def _loss(net: nn.Module, site: Site, h: Tensor, t: Tensor, fit: str) -> float:
    """mean ‖W h + b − t‖², or the mean cross-entropy."""
    weight, bias = _values(net, site)
    z = h @ weight.T + bias
    if fit == "logistic":
        return -float((t * z.log_softmax(1)).sum(1).mean())
    return float((z - t).square().sum(1).mean())
