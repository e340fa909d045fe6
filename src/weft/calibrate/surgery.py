"""Representation surgery: small adapters, one a task, take the merged network's features back to the expert's.

v1 (arXiv:2402.02705) has one adapter a task on the features before the classifier; v2 (arXiv:2410.14389) one
behind every layer, each held against the same layer of the expert. Labels are never used; the task must be known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.func import functional_call

from weft.api import Model
from weft.calibrate.adapted import INPUT, Adapted, Surgery
from weft.calibrate.network import Site, held, hooked, sites
from weft.calibrate.result import Calibrated, calibrated
from weft.calibrate.watch import seen_at, watching
from weft.errors import DataError, Problems, UsageError, did_you_mean
from weft.learn.loop import TEST_TIME, seeded
from weft.statistics.batches import Batch, Data, Forward, outputs_of
from weft.statistics.placed import placed

Distance = Callable[[Tensor, Tensor], Tensor]


def l1(z: Tensor, of: Tensor) -> Tensor:
    """mean |z − z'|"""
    return (z - of).abs().mean()


def surgery(
    model: Model,
    data: Mapping[str, Data],
    experts: Mapping[str, Model],
    *,
    module: nn.Module | None = None,
    at: str | Sequence[str] | None = None,
    rank: int = 16,
    steps: int = 500,
    lr: float = 1e-3,
    distance: Distance = l1,
    private: Sequence[str] = (),
    split: str = TEST_TIME,
    samples: int | None = None,
    forward: Forward | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Calibrated:
    """min over (D, U) of Σ_places mean |z − U ReLU(D z) − z_expert|, for every task by itself (Adam).

    `data` and `experts` by task; data without labels, walked batch by batch. `at`: where the adapters are. By
    default (v1) on the features that go into the network's last linear layer; patterns of modules (v2) put one
    behind each of those, trained together so that later ones see what earlier ones mended. D [rank, d] is drawn
    as by Kaiming, U [d, rank] starts at zero: nothing changes before the first step. `private` are patterns of
    parameters that each task takes from its expert (classifiers), and keeps.

    As published, the data are inputs of the test, and `split` says so; with others say which. The result needs to
    know the task: `result.module(x, task="a")`. Raises UsageError for what cannot be meant, DataError naming the
    task where the loss is no longer finite.
    """
    _check(data, experts, rank, steps)
    net, source = placed(model, module)
    like = net if isinstance(model, nn.Module) else module
    own = {t: _private(placed(e, like)[0], private) for t, e in experts.items()}
    maps: dict[str, dict[str, nn.Module]] = {}
    losses: dict[str, list[float]] = {}
    with seeded(seed, torch.device("cpu")):
        for task, expert in experts.items():
            every = held(data[task], net, device, samples)
            other = placed(expert, like)[0].to(next(net.parameters()).device)
            places = _places(net, sites(net, every[0], forward), at)
            goals = [seen_at(other, list(places), b, forward) for b in every]
            made: dict[str, nn.Module] = {
                p: _drawn(z.shape[axis], rank, axis).to(z.device)
                for (p, axis), z in zip(places.items(), goals[0].values(), strict=True)
            }
            losses[task] = _fitted(
                Adapted(net, {task: made}, {task: own[task]}),
                task,
                every,
                goals,
                steps,
                lr,
                distance,
                forward,
            )
            maps[task] = made
    told = {"losses": {t: [x[0], x[-1]] for t, x in losses.items() if x}, "split": split, "rank": rank,
            "test_time": split == TEST_TIME, "places": sorted({p for m in maps.values() for p in m})}  # fmt: skip
    return calibrated("surgery", net, source, [], maps=maps, private=own if private else None, told=told)


def _check(data: Mapping[str, Data], experts: Mapping[str, Model], rank: int, steps: int) -> None:
    if not isinstance(data, Mapping) or not isinstance(experts, Mapping) or not experts:
        raise UsageError("data and experts must be mappings by task: {'digits': batches}, {'digits': expert}")
    if set(data) != set(experts):
        raise UsageError(f"data are of {', '.join(sorted(data))}, experts of {', '.join(sorted(experts))}: "
                         "give both for every task")  # fmt: skip
    if any(not t or set(t) & {"/", "*", "."} for t in experts):
        raise UsageError("names of tasks must be without /, * and dots")
    if rank < 1 or steps < 0:
        raise UsageError(f"rank must be at least 1 and steps 0 or more, not {rank} and {steps}")


def _private(expert: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    known = dict(expert.named_parameters())
    lost = [p for p in patterns if not any(fnmatchcase(n, p) for n in known)]
    if lost:
        raise Problems("no parameter is called so", [f"{p!r}{did_you_mean(p, known)}" for p in lost])
    return {n: p.detach() for n, p in known.items() if any(fnmatchcase(n, q) for q in patterns)}


def _places(net: nn.Module, found: Sequence[Site], at: str | Sequence[str] | None) -> dict[str, int]:
    """Where the adapters are → the axis of channels there."""
    if at is None:
        linear = [s for s in found if s.axis == -1]
        ends = [s for s in linear if s.final] or linear[-1:]
        if not ends:
            raise UsageError(
                f"{type(net).__name__} has no linear layer at its end: say where features are (at=…)"
            )
        return {INPUT + ends[-1].name: -1}
    patterns = [at] if isinstance(at, str) else list(at)
    known = [n for n, _ in net.named_modules() if n]
    lost = [p for p in patterns if not any(fnmatchcase(n, p.removeprefix(INPUT)) for n in known)]
    if lost:
        raise Problems("there are no such layers", [f"{p!r}{did_you_mean(p, known)}" for p in lost])
    made: dict[str, int] = {}
    for p in patterns:
        side = INPUT if p.startswith(INPUT) else ""
        made |= {side + n: 0 for n in known if fnmatchcase(n, p.removeprefix(INPUT))}
    return {p: _axis(net.get_submodule(p.removeprefix(INPUT))) for p in made}


def _axis(m: nn.Module) -> int:
    """1 for what holds convolutions, whose channels come second; −1 for all else."""
    return 1 if any(isinstance(c, nn.modules.conv._ConvNd) for c in m.modules()) else -1


def _drawn(width: int, rank: int, axis: int) -> Surgery:
    down = torch.empty(rank, width)
    nn.init.kaiming_uniform_(down, a=math.sqrt(5))
    return Surgery(down, torch.zeros(width, rank), axis)


def _fitted(
    model: Adapted, task: str, data: Sequence[Batch], goals: Sequence[Mapping[str, Tensor]], steps: int,
    lr: float, distance: Distance, forward: Forward | None,
) -> list[float]:  # fmt: skip
    """Adam on the task's adapters; the loss of every step, before it."""
    maps = list(model.maps.parameters())
    optimizer = torch.optim.Adam(maps, lr=lr)
    losses = []
    places = list(goals[0])
    for step in range(steps):
        i = step % len(data)
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            stack.enter_context(model.at(task))
            stack.enter_context(hooked(watching(model.inner, places, found)))
            if forward is None:
                functional_call(model.inner, model.own(task), data[i].args, dict(data[i].kwargs))
            else:
                outputs_of(model.inner, data[i], forward)
        loss = torch.stack([distance(found[p], goals[i][p]) for p in places]).sum()
        told = float(loss.detach())
        if not math.isfinite(told):
            raise DataError(f"surgery for {task!r}: the loss is {told} at step {step + 1}; lower lr, or look for "
                            "values in the models or data that are not finite")  # fmt: skip
        losses.append(told)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for p in maps:
        p.requires_grad_(False)
    return losses
