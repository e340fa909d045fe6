"""REPAIR: units of a merged network get the mean and spread that they have in its parents (arXiv:2211.08403)."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import Model
from weft.calibrate.adapted import ANY, Scaled
from weft.calibrate.batchnorm import Schedule, check_schedule, settle
from weft.calibrate.moments import Moments, measured, mixed
from weft.calibrate.network import Site, full, held, hooked, own, rows, sites
from weft.calibrate.result import Calibrated, calibrated, written
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.statistics.batches import Batch, Data, Forward, outputs_of
from weft.statistics.placed import placed
from weft.train.select import is_conv1d

DEAD = 1e-6
"""A unit whose spread is below this share of its parents' is dead: it gets their mean alone."""


def repair(
    model: Model,
    data: Data,
    parents: Sequence[Model],
    *,
    weights: Sequence[float] | None = None,
    module: nn.Module | None = None,
    only: str | Sequence[str] = "*",
    output: bool = False,
    schedule: Schedule = "sequential",
    samples: int | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Calibrated:
    """y ↦ (y − μ̂)/σ̂ · σ + μ at every unit of linear layers, convolutions and BatchNorms.

    μ̂, σ̂ are the merged network's on `data`, without labels; μ = Σ wᵢ μᵢ and σ = Σ wᵢ σᵢ (of standard deviations)
    those of its `parents`, `weights` their shares in the merge (equal by default). The parents must be what was
    merged: aligned first, if the merge aligned them. Layers that go straight into a BatchNorm are left to it, whose
    running statistics are measured anew on the way; the layers that give the network's output stay unless `output`.
    `only` picks layers by pattern.

    `schedule="sequential"` settles layer after layer, each measured behind those already settled. "joint" takes one
    pass that normalises every layer by its batch. The map goes into weights and biases, or into a BatchNorm's;
    where a layer has no bias or shares its weight, a `Scaled` map is kept beside the weights instead.

    Raises UsageError for what cannot be meant, DataError naming the layer where values are not finite.
    """
    check_schedule(schedule)
    shares = _shares(parents, weights)
    net, source = placed(model, module)
    every = held(data, net, device, samples)
    found = sites(net, every[0], forward)
    chosen = _chosen(found, only, output)
    watched = [s for s in found if s in chosen or s.kind == "batchnorm"]
    like = net if isinstance(model, nn.Module) else module
    each = [_of_parent(parent, like, net, every, chosen, forward) for parent in parents]
    run = _Repair(net, every, forward)
    goals = {s.name: mixed(each, shares, s.name) for s in chosen}
    if schedule == "joint":
        moments = _by_batch(net, every, watched, goals, forward)
        for s in watched:
            run.fix(s, moments[s.name], goals.get(s.name))
    else:
        for s in watched:
            run.fix(s, measured(net, every, [s], forward)[s.name], goals.get(s.name))
    for hook in run.hooks:
        hook.remove()
    told = {"examples": sum(b.size for b in every), "layers": len(chosen), "weights": shares}
    return calibrated(
        "repair", net, source, list(run.changed), maps={ANY: run.maps}, notes=tuple(run.notes()), told=told
    )


def _shares(parents: Sequence[Model], weights: Sequence[float] | None) -> list[float]:
    if isinstance(parents, str | nn.Module) or not len(parents):
        raise UsageError("parents must be a list of the models that were merged")
    shares = [1 / len(parents)] * len(parents) if weights is None else [float(w) for w in weights]
    if len(shares) != len(parents) or abs(sum(shares) - 1) > 1e-6 or min(shares) < 0:
        raise UsageError(
            f"weights must be {len(parents)} shares that are not negative and sum to 1, not {shares}"
        )
    return shares


def _chosen(found: Sequence[Site], only: str | Sequence[str], output: bool) -> list[Site]:
    patterns = [only] if isinstance(only, str) else list(only)
    names = [s.name for s in found]
    lost = [p for p in patterns if not any(fnmatchcase(n, p) for n in names)]
    if lost:
        told = [f"{p!r}{did_you_mean(p, names)}" for p in lost]
        raise Problems("no linear layer, convolution or BatchNorm that these data reach is called so", told)
    chosen = [
        s for s in found
        if not s.normed and (output or not s.final) and any(fnmatchcase(s.name, p) for p in patterns)
    ]  # fmt: skip
    if not chosen:
        raise UsageError("there is no hidden layer to repair: choose others (only=…), or output=True")
    return chosen


def _of_parent(
    parent: Model, like: nn.Module | None, net: nn.Module, data: Sequence[Batch], where: Sequence[Site],
    forward: Forward | None,
) -> dict[str, Moments]:  # fmt: skip
    """Moments of the sites' outputs in a parent: of a BatchNorm's those that follow from its input's."""
    other, source = placed(parent, like)
    mine, theirs = dict(net.named_parameters()), dict(other.named_parameters())
    if {n: p.shape for n, p in mine.items()} != {n: p.shape for n, p in theirs.items()}:
        raise DataError(
            f"{source.origin} is another network than the merged one, so it cannot be a parent of it"
        )
    found = measured(other.to(next(net.parameters()).device), data, where, forward)
    for site in where:
        if site.kind == "batchnorm":
            found[site.name] = _behind(other.get_submodule(site.name), found[site.name])
    return found


def _behind(m: Any, x: Moments) -> Moments:
    """Moments behind a BatchNorm in evaluation mode, y = γ (x − rm)/√(rv + ε) + β, from those before it."""
    scale = (m.running_var.double() + m.eps).rsqrt()
    mean = (x.mean - m.running_mean.double()) * scale
    if m.affine:
        scale, mean = m.weight.double() * scale, m.weight.double() * mean + m.bias.double()
    made = Moments()
    made.n, made.mean, made.squares = x.n, mean, x.squares * scale.square()
    return made


class _Repair:
    """A repair under way: what changed, and the maps that could not be folded."""

    def __init__(self, net: nn.Module, data: Sequence[Batch], forward: Forward | None) -> None:
        self.net, self.data = net, data
        self.changed: dict[str, None] = {}
        self.maps: dict[str, nn.Module] = {}
        self.dead: dict[str, int] = {}
        self.hooks: list[Any] = []

    def fix(self, site: Site, now: Moments, goal: tuple[Tensor, Tensor] | None) -> None:
        """Give a layer, with these moments (of a BatchNorm's input, of another's output), its goal."""
        m = self.net.get_submodule(site.name)
        if site.kind == "batchnorm":
            settle(self.net, site, now, len(self.data))
            leaves = ("running_mean", "running_var", "num_batches_tracked")
            self.changed |= dict.fromkeys(full(site.name, leaf) for leaf in leaves)
            now = _behind(m, now)
        if goal is None:
            return
        mean, std = goal
        dead = now.std <= DEAD * std.clamp(min=1e-30)
        if bool(dead.any()):
            self.dead[site.name] = int(dead.sum())
        scale = torch.where(dead, torch.ones_like(std), std / now.std.clamp(min=1e-300))
        self._apply(site, scale, mean - scale * now.mean)

    def _apply(self, site: Site, scale: Tensor, shift: Tensor) -> None:
        """y ↦ scale · y + shift, in the layer's own weights where that is exact."""
        m: Any = self.net.get_submodule(site.name)
        weight, bias = own(self.net, site.name, "weight"), own(self.net, site.name, "bias")
        if weight is None or bias is None:
            self.maps[site.name] = made = Scaled(scale.float(), shift.float(), site.axis)
            made.requires_grad_(False)
            self.hooks.append(m.register_forward_hook(lambda m, args, y: made(y)))  # for the layers behind
            return
        along = weight.dim() - 1 if is_conv1d(m) else int(isinstance(m, nn.modules.conv._ConvTransposeNd))
        if isinstance(m, nn.modules.conv._ConvTransposeNd) and m.groups > 1:
            # [in, out / groups, …]: the outputs of a group of inputs stand together
            wide = scale.reshape(m.groups, 1, -1).expand(-1, weight.shape[0] // m.groups, -1).flatten(0, 1)
        else:
            wide = scale.reshape([-1 if k == along else 1 for k in range(weight.dim())])
        wide = wide.reshape(*wide.shape, *[1] * (weight.dim() - wide.dim()))
        written(weight, weight.double() * wide)
        written(bias, bias.double() * scale + shift)
        self.changed |= dict.fromkeys((full(site.name, "weight"), full(site.name, "bias")))

    def notes(self) -> list[str]:
        """What was done in another way."""
        told = []
        if self.maps:
            told.append(
                f"kept as maps, since there is no bias or the weight is shared: {', '.join(self.maps)}"
            )
        if self.dead:
            units = ", ".join(f"{n} ({k})" for n, k in self.dead.items())
            told.append(f"units that never moved, given their parents' mean alone: {units}")
        return told


def _by_batch(
    net: nn.Module, data: Sequence[Batch], where: Sequence[Site], goals: dict[str, tuple[Tensor, Tensor]],
    forward: Forward | None,
) -> dict[str, Moments]:  # fmt: skip
    """One pass in which every site has its goal's moments in every batch; what they were is pooled."""
    found = {s.name: Moments() for s in where}

    def fixed(site: Site, m: Any, x: Tensor, y: Tensor) -> Tensor:
        value = x if site.kind == "batchnorm" else y
        if not bool(value.isfinite().all()):
            raise DataError(
                f"values at {site.name} are NaN or infinite: look at the data and the weights before it"
            )
        found[site.name].add(rows(value, site.axis))
        flat = value.movedim(site.axis, -1).double()
        over = tuple(range(flat.dim() - 1))
        flat = (flat - flat.mean(over)) / flat.var(over, correction=0).add(getattr(m, "eps", 1e-12)).sqrt()
        gain, bias = (m.weight, m.bias) if site.kind == "batchnorm" and m.affine else (None, None)
        if site.name in goals:
            mean, std = goals[site.name]
            flat = flat * (std if gain is None else std * gain.sign()) + mean
        elif gain is not None:
            flat = flat * gain + bias
        return flat.to(y.dtype).movedim(-1, site.axis)

    with (
        hooked(
            net.get_submodule(s.name).register_forward_hook(lambda m, args, y, s=s: fixed(s, m, args[0], y))
            for s in where
        ),
        torch.no_grad(),
    ):
        for batch in data:
            outputs_of(net, batch, forward)
    return found
