"""RegMean++: Gram matrices of the inputs that the merged model itself makes, part by part. arXiv:2508.03121.

    for l = 1 … L:   Gᵢ of part l's maps = inputs of expert i's part l on what the merged parts < l make of its data
                     part l = the Gram solver's merge of the experts' parts l

RegMean takes every layer's inputs from the expert alone, though in the merged model they come from merged layers. A
part is a block where the network is a stack of blocks (trunk.py): the data go through once, and one block's weights
and Gram matrices are in memory at a time. Else it is a module with parameters of its own, in the order of use
(below): the networks are in memory, and run once a part. What has no Gram matrix is averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import DataError, UsageError
from weft.methods.merge import Merge
from weft.methods.registry import METHODS
from weft.statistics.batches import Batch, Data, Forward, batches, outputs_of
from weft.statistics.gradients import Asked
from weft.statistics.measure import Measurement, evaluating
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.sums import Precision
from weft.statistics.uses import Parameters

Source = nn.Module | Checkpoint | str | Path


def regmean_pp(
    models: Sequence[Source],
    data: Sequence[Data],
    *,
    base: Source | None = None,
    module: nn.Module | None = None,
    method: str = "regmean",
    by_block: bool | None = None,
    samples: int | None = None,
    forward: Forward | None = None,
    precision: Precision = "float64",
    device: str | torch.device = "cpu",
    **params: Any,
) -> Model:
    """Merge part by part, each part's inputs being those that the merged parts before it make.

    `data` holds one iterable of batches a model (its own task's, no labels needed), `samples` bounds the examples
    of each. `module` is the network that the checkpoints are of, where the models are no modules and none of
    transformers. `by_block` asks for blocks, or for single modules; by default it is blocks where the network is a
    stack of them that run once each, in order, on one tensor. `method` is any that merges by Gram matrices
    ("regmean", "lot", "gram"), `params` are its. The result is in memory, in the dtypes of the base, or of the
    first model.

    Raises UsageError where blocks are asked for and there are none, DataError where data are missing.
    """
    if len(data) != len(models):
        raise UsageError(f"there are {len(models)} models, and data of {len(data)}: give each its own")
    if method not in METHODS or not any(n.kind == "gram" for n in METHODS[method].needs):
        able = ", ".join(n for n in METHODS if any(need.kind == "gram" for need in METHODS[n].needs))
        raise UsageError(f"{method} does not merge by Gram matrices of inputs: choose from {able}")
    sources = [load(m) for m in models]
    where = torch.device(device)
    every = [list(batches(d, where, samples)) for d in data]
    empty = [s.origin for s, found in zip(sources, every, strict=True) if not found]
    if empty:
        raise DataError(f"there are no examples for {', '.join(empty)}")
    growing = Growing(
        sources,
        None if base is None else load(base),
        method,
        params,
        precision,
        Asked("model", None, forward, 0),
    )
    first = module if module is not None else models[0]
    with slow_attention(), torch.no_grad():
        if by_block is not False and not _by_block(growing, first, every, where, must=bool(by_block)):
            by_block = False
        if by_block is False:
            by_module(growing, _whole(first, sources[0]), every, where)
    kept = growing.base or sources[0]
    origin = f"{method}++({', '.join(s.origin for s in sources)})"
    return Model(StateDict(growing.values), kept.config, kept.assets, origin)


class Growing:
    """The merged values as far as they are solved; averages elsewhere."""

    def __init__(
        self, sources: Sequence[Checkpoint], base: Checkpoint | None, method: str, params: Mapping[str, Any],
        precision: Precision, asked: Asked,
    ) -> None:  # fmt: skip
        self.sources, self.base, self.method = list(sources), base, METHODS[method]
        self.params, self.precision, self.asked = self.method.check(params), precision, asked
        averaged = Merge(sources, method=METHODS["linear"], params={"weight": self.params.get("weight", 1.0)})
        self.values = {n: as_stored(averaged, n) for n in averaged}

    def measurement(self, module: nn.Module, names: Iterable[str]) -> Measurement:
        """One of the Gram matrices of these parameters."""
        only = [escape(n) for n in names]
        return Measurement(module, ["gram"], only, None, self.precision, self.asked)

    def solve(self, found: Sequence[Measurement], stored: Mapping[str, str]) -> set[str]:
        """Merge what was in use, given a measurement of each expert; `stored` maps names to those of the values."""
        stats = [
            m.checkpoint(s, s.origin, None, torch.float32, "", quiet=True)
            for m, s in zip(found, self.sources, strict=True)
        ]
        keys = list(dict.fromkeys(k for s in stats for k in s))
        measured = {k.partition("/")[2] for k in keys}
        names = {stored.get(n, n) for n in measured} & self.values.keys()
        if names:
            node = Merge(
                self.sources, base=self.base, method=self.method, params=self.params,
                statistics=[_completed(s, stats, keys) for s in stats],
            )  # fmt: skip
            self.values |= {n: as_stored(node, n) for n in names}
        return measured


def as_stored(node: Checkpoint, name: str) -> Tensor:
    """A value in the dtype it is stored in."""
    values = node.tensor(name)
    return round_to(values, node.info(name).dtype) if values.is_floating_point() else values


def _completed(one: Model, every: Sequence[Model], keys: Iterable[str]) -> Model:
    """With zeros for what only others used (experts of a mixture that one task never chose): no vote."""
    values = {
        k: one.tensor(k) if k in one else torch.zeros(next(s.info(k).shape for s in every if k in s))
        for k in keys
    }
    return Model(StateDict(values), one.config, (), one.origin)


def _by_block(
    growing: Growing, first: Source, every: Sequence[Sequence[Batch]], device: torch.device, must: bool
) -> bool:
    """Whether it could be done by block; with `must` an error where it cannot."""
    from weft.statistics.blockwise import skeleton
    from weft.statistics.trunk import Trunk

    module = first if isinstance(first, nn.Module) else skeleton(growing.sources[0])
    with evaluating(module):
        try:
            trunk = Trunk(growing, module, every, device)
        except UsageError:
            if must:
                raise
            return False
        trunk.run()
    return True


def _whole(first: Source, source: Checkpoint) -> nn.Module:
    if isinstance(first, nn.Module):
        return first
    from weft.llm.hf import to_transformers

    return to_transformers(source)


def by_module(
    growing: Growing, module: nn.Module, every: Sequence[Sequence[Batch]], device: torch.device
) -> None:
    """Every module with parameters of its own in the order of use: measured, merged, and put into all networks."""
    from weft.api import materialize

    nets = [materialize(s, deepcopy(module)).to(device) for s in growing.sources]
    forward = growing.asked.forward
    order: list[str] = []
    with ExitStack() as modes:
        for net in nets:
            modes.enter_context(evaluating(net))
        for net, data in zip(nets, every, strict=True):  # not all parts need be used by the first
            with Observer(Parameters(net), lambda use, x, y: order.append(use.name)):
                for batch in data:
                    outputs_of(net, batch, forward)
        parts = list(dict.fromkeys(n.rpartition(".")[0] for n in order))
        of = {part: _own(nets[0], part) for part in parts}
        stored = {n: growing.sources[0].aliases.get(n, n) for n in dict(nets[0].named_parameters())}
        later = {n for names in of.values() for n in names}
        _put(growing, nets, [n for n in stored if n not in later], stored)
        for names in of.values():
            found = []
            for net, data in zip(nets, every, strict=True):
                one = growing.measurement(net, names)
                for batch in data:
                    one.watched(batch, partial(outputs_of, net, batch, forward))
                one.count(sum(b.size for b in data))
                found.append(one)
            growing.solve(found, stored)
            _put(growing, nets, names, stored)


def _own(net: nn.Module, part: str) -> list[str]:
    """The parameters of one module, without those of modules in it."""
    names = [n for n, _ in net.get_submodule(part).named_parameters(recurse=False)]
    return [f"{part}.{n}" if part else n for n in names]


def _put(
    growing: Growing, nets: Sequence[nn.Module], names: Iterable[str], stored: Mapping[str, str]
) -> None:
    """The merged values of these parameters into every network."""
    for name in names:
        if stored[name] in growing.values:
            for net in nets:
                net.get_parameter(name).copy_(growing.values[stored[name]])
