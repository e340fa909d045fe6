"""BatchNorm's running statistics, measured anew: those of a merge are nobody's.

A mean of running variances is not the variance of the merged network's activations, and task arithmetic can even
make one negative, whose square root is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from weft.api import Model
from weft.calibrate.moments import Moments, measured
from weft.calibrate.network import Site, full, held, hooked, rows, sites
from weft.calibrate.result import Calibrated, calibrated, written
from weft.errors import DataError, UsageError
from weft.statistics.batches import Batch, Data, Forward, outputs_of
from weft.statistics.placed import placed

Schedule = Literal["sequential", "joint"]


def reestimate(
    model: Model,
    data: Data,
    *,
    module: nn.Module | None = None,
    schedule: Schedule = "sequential",
    samples: int | None = None,
    forward: Forward | None = None,
    device: str | torch.device | None = None,
) -> Calibrated:
    """Running mean and (unbiased) variance of every BatchNorm, of the activations that it really gets.

    `schedule="sequential"` goes through the data once a layer, with the layers before it already settled: exact,
    the same however the data are cut into batches, and what evaluation mode will see. "joint" takes one pass in
    which every BatchNorm normalises by its batch, as training does (batches should then be large); moments are
    pooled over the batches, not averaged with momentum.

    The result is an ordinary checkpoint. UsageError for a network without running statistics, DataError where
    a channel is seen once only or values are not finite.
    """
    net, source = placed(model, module)
    every = held(data, net, device, samples)
    check_schedule(schedule)
    where = [s for s in sites(net, every[0], forward) if s.kind == "batchnorm"]
    if not where:
        raise UsageError(
            f"{type(net).__name__} has no BatchNorm with running statistics that these data reach"
        )
    bad = negative(net, where)
    notes = [f"running variances that were negative: {', '.join(bad)}"] if bad else []
    notes += never_called(net, where)
    if schedule == "joint":
        for site, moments in zip(where, _by_batch(net, every, where, forward), strict=True):
            settle(net, site, moments, len(every))
    else:
        for site in where:
            settle(net, site, measured(net, every, [site], forward)[site.name], len(every))
    leaves = ("running_mean", "running_var", "num_batches_tracked")
    changed = [full(s.name, leaf) for s in where for leaf in leaves]
    told = {"examples": sum(b.size for b in every), "layers": len(where)}
    return calibrated("batchnorm", net, source, changed, notes=tuple(notes), told=told)


def check_schedule(schedule: str) -> None:
    if schedule not in ("sequential", "joint"):
        raise UsageError(f"schedule must be sequential or joint, not {schedule!r}")


def negative(net: nn.Module, where: Sequence[Site]) -> list[str]:
    """Layers with a running variance that no activations can have."""
    variances: dict[str, Any] = {s.name: net.get_submodule(s.name).running_var for s in where}
    return [n for n, v in variances.items() if bool((v < 0).any())]


def never_called(net: nn.Module, where: Sequence[Site]) -> list[str]:
    called = {s.name for s in where}
    left = [n for n, m in net.named_modules() if isinstance(m, _BatchNorm) and n not in called]
    return [f"BatchNorms that these data do not reach, left as they are: {', '.join(left)}"] if left else []


def settle(net: nn.Module, site: Site, moments: Moments, seen: int) -> None:
    """Make these the running statistics of a BatchNorm."""
    if moments.n < 2:
        raise DataError(f"{site.name}: one value a channel has no variance; give more examples")
    m: Any = net.get_submodule(site.name)
    written(m.running_mean, moments.mean)
    written(m.running_var, moments.unbiased)
    if m.num_batches_tracked is not None:
        m.num_batches_tracked.fill_(seen)


def _by_batch(
    net: nn.Module, data: Sequence[Batch], where: Sequence[Site], forward: Forward | None
) -> list[Moments]:
    """One pass with batch statistics in force; every layer's input pooled over the batches."""
    found = [Moments() for _ in where]
    layers: list[nn.Module] = [net.get_submodule(s.name) for s in where]
    with (
        hooked(
            m.register_forward_hook(lambda m, args, y, f=f, s=s: _normalised(f, args[0], m, s))
            for m, f, s in zip(layers, found, where, strict=True)
        ),
        torch.no_grad(),
    ):
        for batch in data:
            outputs_of(net, batch, forward)
    return found


def _normalised(found: Moments, x: Tensor, m: Any, site: Site) -> Tensor:
    """What the layer gives with this batch's statistics, which are added to `found`."""
    if not bool(x.isfinite().all()):
        raise DataError(
            f"the input of {site.name} is NaN or infinite for these data: look at the weights before it"
        )
    found.add(rows(x, site.axis))
    out: Tensor = torch.nn.functional.batch_norm(x, None, None, m.weight, m.bias, True, 0.0, m.eps)
    return out
