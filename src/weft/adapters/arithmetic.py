"""Adapters as vectors: `a + 0.5 * (b - c)`, exactly, for LoRA and for (IA)³.

Zhang et al., Composing parameter-efficient modules, NeurIPS 2023, arXiv:2306.14870 (PEM). An adapter is a
difference from the base, so it adds, negates and makes analogies as task vectors do. The sum depends on the kind:

    LoRA    Σ cᵢΔWᵢ, concatenated: rank Σ rᵢ, no cross-terms; a negative cᵢ negates Bᵢ alone
    (IA)³   l = 1 + Σ cᵢ(lᵢ − 1): 1 is the vector that changes nothing, so −a is 2 − l

The paper adds LoRA's factors (A to A, B to B), which has cross-terms: `merge_adapters(…, how="factorwise")`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from weft.adapters.factors import Adapter
from weft.adapters.together import check_bases
from weft.checkpoints.adapters import describe
from weft.checkpoints.base import Asset, Checkpoint, TensorInfo
from weft.checkpoints.dtypes import is_mergeable, round_to
from weft.checkpoints.ranges import element_range
from weft.errors import DataProblems, UsageError

Formula = Callable[[Tensor], Tensor]


class Combined(Adapter):
    """Σ cᵢ · adapterᵢ; sums of sums are one. `weft.save(combined.checkpoint, out)` writes it."""

    def __init__(self, terms: Sequence[tuple[float, Adapter]]) -> None:
        merged: dict[int, tuple[float, Adapter]] = {}
        for c, adapter in terms:
            before = merged.get(id(adapter), (0.0, adapter))[0]
            merged[id(adapter)] = (before + c, adapter)
        self.terms = tuple(merged.values())
        self.checkpoint = _sum(self.terms)
        origin = " ".join(f"{c:+g}·({a.origin})" for c, a in self.terms)
        config: Mapping[str, Any] = self.checkpoint.adapter_config  # type: ignore[attr-defined]
        super().__init__(describe(config, self.checkpoint, origin))


def terms_of(adapter: Adapter) -> tuple[tuple[float, Adapter], ...]:
    """The adapter as a sum."""
    return adapter.terms if isinstance(adapter, Combined) else ((1.0, adapter),)


def plus(a: Adapter, b: Adapter, sign: float = 1.0) -> Combined:
    """a ± b."""
    if not isinstance(b, Adapter):
        raise UsageError(f"only adapters can be added to an adapter, not {type(b).__name__}")
    return Combined([*terms_of(a), *((sign * c, t) for c, t in terms_of(b))])


def times(a: Adapter, factor: float) -> Combined:
    """factor · a."""
    return Combined([(c * (factor * 1.0), t) for c, t in terms_of(a)])


def _sum(terms: Sequence[tuple[float, Adapter]]) -> Checkpoint:
    from weft.adapters.merge import merge_adapters

    weights, adapters = [c for c, _ in terms], [a for _, a in terms]
    if all(a.scalings and not a.names for a in adapters):
        return combined_ia3(adapters, weights)
    return merge_adapters(adapters, weights, how="concat", missing="zero")


# -- (IA)³ ------------------------------------------------------------------------------------------


class Vectors(Checkpoint):
    """Vectors of (IA)³ adapters combined entry by entry; the first adapter's names and config."""

    stem = "adapter_model"

    def __init__(self, adapters: Sequence[Adapter], formula: Formula, what: str) -> None:
        self.adapters, self.formula, self.what = tuple(adapters), formula, what
        self.origin = f"{what}({', '.join(a.origin for a in adapters)})"
        self.adapter_config: Mapping[str, Any] = {**adapters[0].config, "inference_mode": True}
        self._tensors = _vectors(self.adapters)

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return tuple(a.lora.weights for a in self.adapters)

    @property
    def assets(self) -> tuple[Asset, ...]:
        text = json.dumps(self.adapter_config, indent=2, ensure_ascii=False) + "\n"
        return (Asset("adapter_config.json", text.encode),)

    def identity(self) -> str | None:
        inner = super().identity()
        return inner and f"{self.what}{inner}"

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        start, stop = element_range(name, self.info(name), start, stop)
        x = torch.stack([s.read(name, start, stop).to(torch.float64) for s in self.inputs])
        values = self.formula(x)
        return values if dtype is None else round_to(values, dtype)


def _vectors(adapters: Sequence[Adapter]) -> dict[str, TensorInfo]:
    """The tensors that all of these hold; every difference at once otherwise."""
    check_bases(adapters)
    first, problems = adapters[0].lora.weights, []
    for adapter in adapters:
        if adapter.names or adapter.replaced or adapter.biases or not adapter.scalings:
            raise UsageError(f"{adapter.origin} is no plain (IA)³ adapter, and cannot be added to one")
        other = adapter.lora.weights
        problems += [f"{n}: in {first.origin}, not in {other.origin}" for n in first if n not in other]
        problems += [f"{n}: in {other.origin}, not in {first.origin}" for n in other if n not in first]
        problems += [
            f"{n}: {list(i.shape)} in {first.origin}, {list(other.info(n).shape)} in {other.origin}"
            for n, i in first.tensors.items()
            if n in other and (other.info(n).shape != i.shape or not is_mergeable(i.dtype))
        ]
    if problems:
        raise DataProblems("these (IA)³ adapters do not scale the same activations", problems)
    return dict(first.tensors)


class _Affine:
    """1 + Σ cᵢ(xᵢ − 1). A class, so that it pickles."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.weights = list(weights)

    def __call__(self, x: Tensor) -> Tensor:
        change: Tensor = torch.tensor(self.weights, dtype=x.dtype) @ (x - 1)
        return change + 1


def combined_ia3(adapters: Sequence[Adapter], weights: Sequence[float]) -> Vectors:
    """l = 1 + Σ wᵢ(lᵢ − 1), lazily: the mean where Σ wᵢ = 1, 2 − l for one adapter and w = −1."""
    if len(weights) != len(adapters):
        raise UsageError(f"{len(weights)} weights for {len(adapters)} adapters")
    return Vectors(adapters, _Affine(weights), f"(IA)³{list(weights)}")


class _Transfer:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, x: Tensor) -> Tensor:
        task, target, source = x.unbind()
        return task * (self.scale * (target / source - 1) + 1)


def transferred(task: Adapter, target: Adapter, source: Adapter, scale: float = 1.0) -> Checkpoint:
    """AdaMergeX: a task's adapter moved by what a reference task's adapters in two languages differ.

        LoRA    ΔW_task + λ(ΔW_target − ΔW_source)        differences add
        (IA)³   l_task ∘ (λ(l_target ⊘ l_source − 1) + 1)   factors divide

    Zhao et al., NAACL 2025, arXiv:2402.18913. The authors' code adds LoRA's factors; here the products. Gives
    an adapter checkpoint.
    """
    if not all(a.scalings and not a.names for a in (task, target, source)):
        return Combined([(1.0, task), (scale, target), (-scale, source)]).checkpoint
    adapters = (task, target, source)
    zeros = [n for n in source.scalings if bool((source.scaling(n) == 0).any())]
    if zeros:
        raise DataProblems(f"{source.origin} scales by 0, which cannot be divided by", zeros)
    return Vectors(adapters, _Transfer(scale), f"transferred[{scale}]")
