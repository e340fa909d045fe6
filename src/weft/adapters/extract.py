"""`extract_lora`: the difference of two models as an adapter, weight by weight, in bounded memory.

ΔW = W_model − W_base is approximated at a rank, or at the least rank that keeps an energy; A and B share the
singular values evenly and alpha = r. Whatever changed and has no low-rank form is reported, or saved whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from weft.adapters.difference import Approximation, Difference
from weft.adapters.factors import Factors, Slot, split_slice
from weft.adapters.kinds import Kind, kinds
from weft.adapters.output import AdapterCheckpoint, Extra, adapter_checkpoint
from weft.adapters.ranks import Keep
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.execution import execution
from weft.checkpoints.limits import shown
from weft.checkpoints.load import load
from weft.errors import DataProblems, UsageError

Rest = Literal["skip", "save"]
Embeddings = Literal["lora", "save", "skip"]


def extract_lora(
    model: object,
    base: object,
    *,
    rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    threshold: float | None = None,
    fast: bool = False,
    seed: int = 0,
    include: str | None = None,
    exclude: str | None = None,
    rest: Rest = "skip",
    embeddings: Embeddings = "lora",
    dtype: torch.dtype = torch.float32,
    layout: Literal["peft", "kohya"] = "peft",
    serve: Literal["vllm"] | None = None,
    base_name: str | None = None,
) -> AdapterCheckpoint:
    """A lazy adapter that turns `base` into (nearly) `model`; `weft.save` writes it.

    `model`, `base`: whatever `load` takes, of one architecture. What to keep: `rank` (32 if nothing is said),
    `energy` (share of ‖ΔW‖²), `ratio` (to the largest singular value), `threshold`; all but a rank alone need a
    first pass over the weights when this is called. `fast` sketches (seeded by `seed`). `include` and `exclude`
    are regular expressions on weights' names. `rest` says what becomes of changed norms, biases and other
    tensors, `embeddings` of embeddings: "save" stores them whole (modules_to_save). `serve="vllm"`: see
    `adapter_checkpoint`. Errors of each weight are in `.report` once it is computed.

    Raises UsageError for what cannot be meant, DataProblems where the models are not of one shape.
    """
    keep = Keep(32 if (rank, energy, ratio, threshold) == (None,) * 4 else rank, energy, ratio, threshold)
    ours, theirs = load(model), load(base)
    _same_shapes(ours, theirs)
    ours.survey()
    theirs.survey()
    found = _Changed.between(ours, theirs, _chosen(theirs, include, exclude))
    low_rank = {
        n: k for n, k in found.kinds.items() if k != "other" and (k != "embedding" or embeddings == "lora")
    }
    others = [n for n, k in found.kinds.items() if n not in low_rank]
    saved = [n for n in others if (embeddings if found.kinds[n] == "embedding" else rest) == "save"]
    report: dict[str, Any] = {}
    compute = _Compute(ours, theirs, keep, seed if fast else None, report)
    slots = _slots(compute, theirs, low_rank, dtype)
    made = adapter_checkpoint(
        slots, compute, origin=f"LoRA of {ours.origin} over {theirs.origin}", inputs=(ours, theirs),
        what=f"extract {keep} fast={fast} seed={seed}", base_name=base_name or _name(base),
        replaced={n: _Whole(ours, n).extra(dtype) for n in saved},
        reads=compute.reads, working=compute.working, layout=layout, serve=serve, notes=found.notes(saved, others),
    )  # fmt: skip
    made.report = report
    return made


def _name(base: object) -> str | None:
    return str(base) if isinstance(base, str | Path) else getattr(base, "origin", None)


def _chosen(base: Checkpoint, include: str | None, exclude: str | None) -> dict[str, Kind]:
    every = kinds(base)
    for what, pattern in (("include", include), ("exclude", exclude)):
        if pattern is None:
            continue
        try:
            hits = [n for n in every if re.search(pattern, n)]
        except re.error as error:
            raise UsageError(f"{what} {pattern!r} is no regular expression: {error}") from None
        if not hits:
            raise UsageError(f"{what} {pattern!r} matches no tensor of {base.origin}")
        every = {n: k for n, k in every.items() if (n in hits) == (what == "include")}
    return every


def _same_shapes(model: Checkpoint, base: Checkpoint) -> None:
    """Every difference in names and shapes at once."""

    def shape(source: Checkpoint, name: str) -> tuple[int, ...]:
        return source.info(source.aliases.get(name, name)).shape

    ours, theirs = {*model.tensors, *model.aliases}, {*base.tensors, *base.aliases}
    problems = [f"{shown(n)}: not in {base.origin}" for n in sorted(ours - theirs)]
    problems += [f"{shown(n)}: not in {model.origin}" for n in sorted(theirs - ours)]
    problems += [
        f"{shown(n)}: {list(shape(model, n))} in {model.origin}, {list(shape(base, n))} in {base.origin}"
        for n in sorted(ours & theirs)
        if shape(model, n) != shape(base, n)
    ]
    if problems:
        raise DataProblems(
            "an adapter needs a model and a base of one architecture and vocabulary (resize the vocabulary first "
            "where rows differ)", problems,
        )  # fmt: skip


@dataclass(frozen=True)
class _Changed:
    """The tensors that differ, with their kinds."""

    kinds: dict[str, Kind]

    @classmethod
    def between(cls, model: Checkpoint, base: Checkpoint, every: Mapping[str, Kind]) -> _Changed:
        # a tied name follows the tensor it is tied to, unless one of the two models has untied it
        names = [
            n for n in every if n in base or n not in model.aliases or model.aliases[n] != base.aliases[n]
        ]
        changed = execution().map(lambda n: Difference(model, base, n).changed, names)
        found = {n: every[n] for n, differs in zip(names, changed, strict=True) if differs}
        if not found:
            raise UsageError(f"{model.origin} does not differ from {base.origin} in what was asked for")
        return cls(found)

    def notes(self, saved: list[str], others: list[str]) -> list[str]:
        skipped = [n for n in others if n not in saved]
        if not skipped:
            return []
        told = ", ".join(map(shown, skipped[:5])) + (" …" if len(skipped) > 5 else "")
        return [
            f'{len(skipped)} changed tensors are not in the adapter (rest="save" stores them whole): {told}'
        ]


def _slots(
    compute: _Compute, base: Checkpoint, chosen: Mapping[str, Kind], dtype: torch.dtype
) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    # stacks of one module in the order in which modules define them: PEFT nests their wrappers in that order
    last = [n for n in chosen if "down" in n.rpartition(".")[2] and chosen[n].endswith("experts")]
    for name in [*(n for n in chosen if n not in last), *last]:
        kind, shape = chosen[name], base.info(base.aliases.get(name, name)).shape
        turned = kind in ("embedding", "transposed", "transposed experts")
        stack = kind.endswith("experts")
        dims = shape[1:] if stack else shape
        most = compute.keep.most(min(dims[0], prod(dims[1:])))
        for each in [f"{name}[{i}]" for i in range(shape[0])] if stack else [name]:
            slots[each] = Slot(most, dims[::-1] if turned else dims, dtype, turned, kind == "embedding")
    compute.turned = {n: s.transposed for n, s in slots.items()}
    if compute.keep.fixed:
        return slots
    ranks = execution().map(compute.rank, list(slots))
    return {n: replace(s, rank=r) for (n, s), r in zip(slots.items(), ranks, strict=True)}


class _Compute:
    """One weight's factors. A class, so that it pickles."""

    def __init__(
        self, model: Checkpoint, base: Checkpoint, keep: Keep, sketch: int | None, report: dict[str, Any]
    ) -> None:
        self.model, self.base, self.keep, self.sketch, self.report = model, base, keep, sketch, report
        self.turned: dict[str, bool] = {}
        self.ranks: dict[str, int] = {}

    def difference(self, weight: str) -> Difference:
        return Difference(self.model, self.base, *split_slice(weight))

    def rank(self, weight: str) -> int:
        """The rank that the singular values ask for."""
        found = self.difference(weight)
        most = self.keep.most(min(found.rows, found.columns))
        spectrum = found.sketched(most, self.sketch)[1] if self.sketch is not None else found.spectrum()
        self.ranks[weight] = self.keep.of(spectrum)
        return self.ranks[weight]

    def __call__(self, weight: str) -> Factors:
        found = self.difference(weight)
        rank = self.ranks.get(weight, self.keep.most(min(found.rows, found.columns)))
        made: Approximation = (
            found.best(rank) if self.sketch is None else found.sketched(rank, self.sketch)[0]
        )
        self.report[weight] = {"rank": rank, "norm": made.norm, "error": made.error}
        if self.turned[weight]:
            return Factors(made.right.T, made.left.T, found.shape, True)
        return Factors(made.left, made.right, found.shape, False)

    def reads(self, weight: str) -> int:
        name, index = split_slice(weight)
        info = self.base.info(self.base.aliases.get(name, name))
        own = self.model.aliases.get(name, name)
        whole = self.model.bytes_read(own) + self.base.bytes_read(self.base.aliases.get(name, name))
        return whole if index is None else whole // info.shape[0]

    def working(self, weight: str) -> int:
        return self.difference(weight).working_bytes


@dataclass(frozen=True)
class _Whole:
    """A tensor of the model as it is."""

    model: Checkpoint
    name: str

    def extra(self, dtype: torch.dtype) -> Extra:
        return Extra(
            TensorInfo(self.model.info(self.model.aliases.get(self.name, self.name)).shape, dtype), self
        )

    def __call__(self) -> Tensor:
        name = self.model.aliases.get(self.name, self.name)
        self.model.ready(name)
        return self.model.tensor(name)
