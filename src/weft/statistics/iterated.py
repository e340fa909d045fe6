"""IterIS: measure what inputs the merged model makes, solve every layer for the experts' outputs, again. CVPR 2025.

    start with the mean; then, for every round:
        X̃ᵢ = inputs of every layer as the merged model makes them of task i's data, Xᵢ = as expert i makes them
        every W = the solution of min Σ λᵢ ‖W X̃ᵢ − WᵢXᵢ‖²          (methods/iteris.py)

Both models run on the same batch, and the moments of [Xᵢ; X̃ᵢ] side by side are added up: four times a Gram matrix,
of all layers at once, so this is for models that fit into memory (RegMean++ can go by block: remeasured.py). Layers
whose rows are chosen by their values (routed experts) cannot be paired.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from weft.api import materialize
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.errors import DataError, UsageError
from weft.methods.fingerprint import Fingerprint
from weft.methods.iteris import aligned_outputs
from weft.methods.kinds import ABOUT
from weft.methods.merge import Merge
from weft.methods.registry import METHODS
from weft.statistics.batches import Batch, Data, Forward, batches, outputs_of
from weft.statistics.measure import evaluating
from weft.statistics.observe import Observer, slow_attention
from weft.statistics.remeasured import Source, as_stored
from weft.statistics.sums import Sums
from weft.statistics.uses import Parameters, Use

Told = Callable[[int, float], None]


def iteris(
    models: Sequence[Source],
    data: Sequence[Data],
    *,
    module: nn.Module | None = None,
    weight: float | Sequence[float] = 1.0,
    rounds: int = 5,
    mix: float = 5e-4,
    ridge: float = 1e-6,
    tol: float = 1e-4,
    samples: int | None = None,
    forward: Forward | None = None,
    told: Told | None = None,
) -> Model:
    """Merge so that every layer gives the experts' outputs on the inputs that the merged model itself makes.

    `data` holds one iterable of batches a model (its own task's, no labels needed). `module` is the network that
    the checkpoints are of, where the models are no modules and none of transformers. `rounds` of measuring and
    solving, fewer where all weights together change by less than `tol` of themselves; `told(round, change)` hears
    of each. `mix` is how much of an expert's inputs is mixed into the merged model's, `ridge` a pull towards the
    mean relative to the mean eigenvalue. Biases, norms and tables are averaged. In memory, in the first model's
    dtypes.
    """
    if len(data) != len(models):
        raise UsageError(f"there are {len(models)} models, and data of {len(data)}: give each its own")
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, not {rounds}")
    sources = [load(m) for m in models]
    net = _network(models[0], sources[0], module)
    every = [list(batches(d, torch.device("cpu"), samples)) for d in data]
    empty = [s.origin for s, found in zip(sources, every, strict=True) if not found]
    if empty:
        raise DataError(f"there are no examples for {', '.join(empty)}")
    params = {"weight": weight if isinstance(weight, int | float) else list(weight)}
    mean = Merge(sources, method=METHODS["linear"], params=params)
    values = {n: as_stored(mean, n) for n in mean}
    merged, expert = deepcopy(net), net
    method = aligned_outputs(weight=params["weight"], ridge=ridge)
    for i in range(rounds):
        materialize(values, merged)
        stats = [
            _paired(materialize(s, expert), merged, s, found, forward, mix)
            for s, found in zip(sources, every, strict=True)
        ]
        node = Merge(sources, method=method, statistics=stats)
        before, values = values, {n: as_stored(node, n) for n in node}
        change = _change(before, values)
        if told is not None:
            told(i + 1, change)
        if change < tol:
            break
    first = sources[0]
    return Model(
        StateDict(values), first.config, first.assets, f"iteris({', '.join(s.origin for s in sources)})"
    )


def _network(first: Source, source: Checkpoint, module: nn.Module | None) -> nn.Module:
    if module is not None or isinstance(first, nn.Module):
        return deepcopy(module if module is not None else first)  # type: ignore[return-value]
    from weft.llm.hf import to_transformers

    return to_transformers(source)


def _paired(
    expert: nn.Module, merged: nn.Module, source: Checkpoint, data: Sequence[Batch], forward: Forward | None,
    mix: float,
) -> Model:  # fmt: skip
    """Moments of every map's inputs in both models, as a checkpoint of statistics of the expert."""
    sums = Sums({"gram"})
    own, other = Parameters(expert), Parameters(merged)
    with evaluating(expert), evaluating(merged), slow_attention(), torch.no_grad():
        for batch in data:
            seen: list[tuple[Use, Tensor]] = []
            with Observer(own, lambda use, x, y, seen=seen: seen.append((use, x)), batch.masks):  # type: ignore[misc]
                outputs_of(expert, batch, forward)
            waiting = iter(seen)

            def pair(use: Use, x: Tensor, y: Tensor, waiting: Any = waiting) -> None:
                before, first = next(waiting, (None, x))
                if before != use or first.shape != x.shape:
                    raise UsageError(
                        f"the merged model does not use {use.name} on the rows on which {source.origin} does, "
                        f"so their inputs cannot be paired"
                    )
                if not use.table and not use.scale:
                    sums.seen(use, torch.cat([first, x + mix * (first - x)], -1), y[..., :0])

            with Observer(other, pair, batch.masks):
                outputs_of(merged, batch, forward)
    values = {f"pair/{k.partition('/')[2]}": v for k, v in sums.results(own.tied).items()}
    told = {
        "samples": sum(b.size for b in data),
        "transposed": sorted(u.name for u in sums.rows if u.transposed),
        "tied": dict(own.tied),
        "model": Fingerprint.of(source, [n for n in own.named if n in source]).data(),
    }
    return Model(StateDict(values), {ABOUT: told}, (), f"inputs of {source.origin}")


def _change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """‖after − before‖ / ‖before‖ over all floating values."""
    names = [n for n, v in before.items() if v.is_floating_point()]
    moved = sum(float((after[n].double() - before[n].double()).square().sum()) for n in names)
    size = sum(float(before[n].double().square().sum()) for n in names)
    return float((moved / size) ** 0.5) if size else 0.0
