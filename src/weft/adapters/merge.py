"""`merge_adapters`: adapters of one base into one adapter, weight by weight, lazily and from the factors alone.

    merged = merge_adapters(["math", "code"], [0.7, 0.5], how="svd", rank=32)
    weft.save(merged, "out")       # a folder that peft loads
    merged.report["…q_proj.weight"]["error"]  # what the truncation lost; also norm, rank, overlap of the A's

`concat` and `svd` give Σ wᵢΔWᵢ; the other ways trade exactness for something (see `ways.py`). `report` is filled
as weights are computed: the error is exact, since singular values are known from the factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch

from weft.adapters.coordinates import InBasis, Shared
from weft.adapters.extras import Extras, merged_extras
from weft.adapters.factors import Adapter, as_adapter
from weft.adapters.merging import Merging, Weights
from weft.adapters.output import AdapterCheckpoint, adapter_checkpoint
from weft.adapters.products import Deltas, Zeros
from weft.adapters.spaces import Space
from weft.adapters.together import Missing, Together, together
from weft.adapters.ways import EQUAL_RANKS, Kind, check_factor_params, kind_of, merged_in
from weft.checkpoints.adapters import Lora
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.refs import Ref
from weft.errors import DataProblems, UsageError

Source = Adapter | Lora | Checkpoint | Ref | Path | str


def merge_adapters(
    adapters: Sequence[Source],
    weights: Weights | None = None,
    *,
    how: str = "svd",
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    missing: Missing = "error",
    extras: Extras = "error",
    base: Checkpoint | None = None,
    bases: Literal["same", "any"] = "same",
    dtype: torch.dtype | None = None,
    layout: Literal["peft", "kohya"] = "peft",
    serve: Literal["vllm"] | None = None,
    **params: Any,
) -> AdapterCheckpoint:
    """A lazy adapter: `adapters` (folders, ids, `Adapter`s) merged; `weft.save` writes it as peft loads it.

    `weights`: one number an adapter (1/k each by default: the mean), or for each weight's name a list of them.
    `how`: `concat` (exact, rank Σ rᵢ), `svd` (the best approximation of Σ wᵢΔWᵢ at `rank`, the greatest rᵢ by
    default), a way on factors (`linear`, `ties_factors`, `dare_linear_factors`, `dare_ties_factors`,
    `magnitude_prune_factors`, `factorwise`, `robustmerge`, `lego`), `knots` or `core_space` (with `method=` any
    of weft's for task vectors), or the name of such a method, which then works on the products entry by
    entry. `params` are the way's own. `energy` asks for the least rank that keeps that share of ‖ΔW‖², found
    in a first pass; `rank` is then the most. `missing="zero"`: an adapter without an update of a weight adds
    nothing there. `extras` says what becomes of biases and of whole tensors (modules_to_save): `error`,
    `average` by the weights, or `drop`. `base` is the model they belong to: names and shapes are then held
    against it (kohya's files need it). `bases="any"` allows configs that name different bases.
    `layout="kohya"` writes kohya's names into one file; `serve="vllm"` what vLLM loads, or says why it would not.

    Raises UsageError for what cannot be meant and DataError where adapters do not fit together.
    """
    if isinstance(adapters, str | Path | Adapter | Checkpoint):
        raise UsageError("adapters must be a list, even for one adapter")
    fitting = together([as_adapter(a, base) for a in adapters], missing=missing, bases=bases)
    if layout == "peft" and any(a.lora.underscored for a in fitting.adapters):
        raise UsageError(
            "the names of these adapters have underscores where the base has dots, which peft would not find; "
            'pass the base, or layout="kohya"'
        )
    kind = kind_of(how)
    _check_weights(weights, fitting, kind)
    _check_size(rank, energy)
    job = Merging(fitting, how, kind, weights, rank, energy, seed, params)
    inputs: tuple[Checkpoint, ...] = tuple(a.lora.weights for a in fitting.adapters)
    if kind == "sum" and params:
        raise UsageError(f"{how} has no parameter {next(iter(params))!r}; it has none")
    if kind == "factors":
        check_factor_params(how, params)
        _check_ranks(how, fitting)
    if kind in ("basis", "products"):
        job.node = _node(job)
        inputs = (job.node,)
    shared = None if isinstance(weights, Mapping) else job.weights_of("")
    found = merged_extras(fitting, shared, extras)
    if energy is not None:
        if job.node is not None:
            job.node.survey()
        job.ranks = {name: job(name).rank for name in fitting.slots}
    slots = {n: replace(s, rank=job.limit(n), dtype=dtype or s.dtype) for n, s in fitting.slots.items()}
    shown = ", ".join(a.origin for a in fitting.adapters)
    made = adapter_checkpoint(
        slots, job, origin=f"{how}({shown})", inputs=inputs, what=str(job), base_name=_base(fitting),
        replaced=found.replaced, biases=found.biases, reads=job.reads, working=job.working, layout=layout,
        serve=serve, notes=found.notes,
    )  # fmt: skip
    made.report = cast("dict[str, Any]", job.report)
    made.seed = seed if kind == "factors" else None  # a node of the other kinds names its own
    return made


def _node(job: Merging) -> Checkpoint:
    """The lazy merge that `products` and `basis` ways read from."""
    fitting, params = job.together, dict(job.params)
    k = len(fitting.adapters)
    nodes: list[Checkpoint]
    if job.kind == "products":
        shapes = {n: fitting.shape(n) for n in fitting.slots}
        nodes, method = [Deltas(a, shapes) for a in fitting.adapters], job.how
    else:
        job.shared = Shared(fitting, cast(Space, job.how))
        nodes = [InBasis(job.shared, i) for i in range(k)]
        method = str(params.pop("method", "ties"))
    given = None if job.weights is None else job.weights_of("")
    made: Checkpoint = merged_in(nodes, Zeros(nodes[0]), method, given, k, seed=job.seed, params=params)
    return made


def _base(fitting: Together) -> str | None:
    return next((a.base_name for a in fitting.adapters if a.base_name), None)


def _check_size(rank: int | None, energy: float | None) -> None:
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise UsageError(f"rank must be a whole number from 1, not {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy is a share of the squared norm in (0, 1], not {energy!r}")


def _check_weights(weights: Weights | None, fitting: Together, kind: Kind) -> None:
    k = len(fitting.adapters)
    lists = [("weights", weights)] if not isinstance(weights, Mapping) else list(weights.items())
    if isinstance(weights, Mapping):
        if kind in ("basis", "products"):
            raise UsageError(
                "weights for each tensor are for ways that merge tensor by tensor; pass one list"
            )
        lacking = [n for n in fitting.slots if n not in weights]
        if lacking:
            raise UsageError(f"there are no weights for {len(lacking)} tensors, e.g. {lacking[0]!r}")
    for where, value in lists:
        given = [value] if isinstance(value, int | float) else list(value or [0.0] * k)
        if not isinstance(value, int | float) and value is not None and len(given) != k:
            raise UsageError(f"{where}: {len(given)} weights for {k} adapters")
        if not all(isinstance(w, int | float) and -float("inf") < w < float("inf") for w in given):
            raise UsageError(f"{where}: weights must be finite numbers, got {given}")


def _check_ranks(how: str, fitting: Together) -> None:
    if how not in EQUAL_RANKS:
        return
    problems = []
    for name in fitting.slots:
        ranks = {a.origin: a.rank(name) for a in fitting.adapters if name in a.names}
        if len(set(ranks.values())) > 1:
            problems.append(f"{name}: " + ", ".join(f"{r} in {origin}" for origin, r in ranks.items()))
    if problems:
        raise DataProblems(
            f"{how} adds factor to factor and needs equal ranks; use svd or concat, or resize the adapters",
            problems,
        )
