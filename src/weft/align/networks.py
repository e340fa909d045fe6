"""`Net`: a model that can be run beside others, its symmetries, and along which axes its tensors read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import nn

from weft.align.discovery import _guessed, discover, plain
from weft.align.spec import Axis, PermutationSpec
from weft.align.terms import groups_in
from weft.api import Model, materialize
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import DataError, Problems, UsageError
from weft.statistics.batches import Batch, Data, Forward, as_batch, outputs_of
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.uses import Parameters, Use

Reads = frozenset[tuple[str, int]]


@dataclass(frozen=True)
class Net:
    """A module with its weights, the weights as a checkpoint, and the groups of units that may change places."""

    module: nn.Module
    checkpoint: Checkpoint
    spec: PermutationSpec
    example: Batch
    forward: Forward | None = None

    @cached_property
    def origin(self) -> str:
        return self.checkpoint.origin

    @cached_property
    def reads(self) -> Reads:
        """(tensor, axis) along which a linear map reads its inputs; along all others units are written."""
        return reading_axes(self.module, self.example, self.forward)

    @cached_property
    def both(self) -> frozenset[str]:
        """Groups along which one tensor is written and read (tied embeddings): only a permutation does for both."""
        tied = {a: n for a, n in self.checkpoint.aliases.items() if a in self.spec.axes}
        kept = {(n, k) for n in tied.values() for k in range(len(self.spec.axes[n]))}
        return frozenset(g for n, k in kept & self.reads for g in groups_in(self.spec.axes[n][k]))

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {n: g.size for n, g in self.spec.groups.items()}

    def written(self, group: str) -> list[tuple[str, int]]:
        """Every (tensor, axis) that makes the units of a group, rather than reading them."""
        return [u for u in self.spec.uses(group) if u not in self.reads]


def opened(
    models: Sequence[Model],
    data: Data | None = None,
    *,
    module: nn.Module | Sequence[nn.Module] | None = None,
    spec: PermutationSpec | None = None,
    example_inputs: Any = None,
    forward: Forward | None = None,
) -> list[Net]:
    """Models that can be run: modules, or weights that fit `module` (one for all, or one each).

    `spec` holds for all of them; without it each network's symmetries are discovered, with the first examples of
    `data`, with `example_inputs`, or with inputs that are guessed. Raises UsageError where there is nothing to run,
    Problems where the networks' groups are others (their sizes may differ).
    """
    if isinstance(models, str | nn.Module | Checkpoint) or len(models) < 1:
        raise UsageError("models must be a list of at least one")
    every = [module] * len(models) if module is None or isinstance(module, nn.Module) else list(module)
    if len(every) != len(models):
        raise UsageError(f"there are {len(models)} models and {len(every)} modules: give one, or one each")
    made: list[Net] = []
    for i, (model, like) in enumerate(zip(models, every, strict=True)):
        if isinstance(model, nn.Module) and like is None:
            run = deepcopy(model)
        elif like is not None:
            run = materialize(model, deepcopy(like))
        else:
            raise UsageError(f"model {i} is weights alone: give module=, the network that they are for")
        run.eval().requires_grad_(False)
        example = made[0].example if made else _example(data, example_inputs, run)
        found = spec if spec is not None else discover(run, _inputs(example))
        source = load(model)
        if isinstance(model, nn.Module):  # modules of one class must be told apart in messages
            source.origin = f"model {i} ({source.origin})"
        found.check(source)
        made.append(Net(run, source, found, example, forward))
    comparable(made)
    return made


def _example(data: Data | None, given: Any, module: nn.Module) -> Batch:
    if given is not None:
        return as_batch(given)
    if data is None:
        return as_batch(_guessed(module))
    if isinstance(data, Iterator):
        raise UsageError("data are gone through more than once: give a list or a loader, no generator")
    first = next(iter(data), None) if not isinstance(data, torch.Tensor) else None
    if first is None:
        raise UsageError("data must be batches, at least one: a DataLoader, or [batch] for one")
    return as_batch(first).first(2)


def _inputs(example: Batch) -> Any:
    if example.args and example.kwargs:
        raise UsageError("a batch of arguments and keywords both cannot be traced: give spec=")
    return dict(example.kwargs) if example.kwargs else example.args


def comparable(nets: Sequence[Net], *, same_size: str | None = None) -> None:
    """Problems naming every group that is not in all networks; with `same_size`, every group of another size.

    `same_size` says what needs equal widths, for the message.
    """
    first, problems = nets[0], []
    for other in nets[1:]:
        ours, theirs = first.spec, other.spec
        for name in dict.fromkeys((*ours.movable, *theirs.movable)):
            if name not in ours.groups or name not in theirs.groups:
                has, lacks = (first, other) if name in ours.groups else (other, first)
                problems.append(f"{name}: in {has.origin}, not in {lacks.origin}")
            elif ours.groups[name].within != theirs.groups[name].within:
                problems.append(f"{name}: not within the same groups in {first.origin} and {other.origin}")
            elif same_size and ours.groups[name].size != theirs.groups[name].size:
                problems.append(
                    f"{name}: {ours.groups[name].size} units in {first.origin}, "
                    f"{theirs.groups[name].size} in {other.origin}"
                )
        problems += [
            f"{n}: its axes are made of other groups in {other.origin}"
            for n, row in ours.axes.items()
            if n in theirs.axes and _groups(row) != _groups(theirs.axes[n])
        ]
    if problems and same_size:
        raise Problems(
            f"{same_size} needs networks of equal widths (optimal transport, weft.align.transport, takes others)",
            problems,
        )
    if problems:
        raise Problems(
            "these networks do not have the same groups of units, so none can be matched", problems
        )


def _groups(row: Sequence[Axis]) -> list[list[str]]:
    return [list(groups_in(t)) for t in row]


def reading_axes(module: nn.Module, example: Batch, forward: Forward | None = None) -> Reads:
    """(tensor, axis) along which the linear maps of a module read their inputs, seen by running it once."""
    parameters = Parameters(module)
    found: set[tuple[str, int]] = set()

    def seen(use: Use, x: Any, y: Any) -> None:
        if not use.table and not use.scale:
            shape = parameters.named[use.name].shape
            axis = next(k for k in range(len(shape) + 1) if prod(shape[:k]) == use.of and k > 0)
            found.add((use.name, axis - 1 if use.transposed else axis))

    with plain(module), slow_attention(), torch.no_grad(), Observer(parameters, seen):
        try:
            outputs_of(module, example, forward)
        except (RuntimeError, TypeError, ValueError) as error:
            raise DataError(
                f"{type(module).__name__} cannot be run on these data: {str(error)[:300]}"
            ) from error
    return frozenset(found)
