"""PEFT's merges of factors: A's with A's and B's with B's. Known by everybody, exact for one adapter only.

PEFT's `add_weighted_adapter` (0.21) merges each factor by itself, wᵢ a user's weight and sᵢ the adapter's scale:

    A = merge of A₁ … A_k with weights sgn(wᵢ) √|wᵢsᵢ|,   B = merge of B₁ … B_k with weights √|wᵢsᵢ|

so the product BA holds the cross-terms BᵢAⱼ of different adapters. With k equal adapters and weights 1/k it is
k times too large; with independent ones its cosine to Σ wᵢΔWᵢ is 1/√k. These ways are here under PEFT's names
to compare with; `svd` and `concat` are exact. LoraHub (arXiv:2307.13269) adds factors with the weights themselves.

Where PEFT is wrong these differ: a merged rsLoRA adapter keeps its strength (PEFT's is √rank too strong).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import copysign, sqrt
from typing import Literal

import torch
from torch import Tensor

from weft.adapters.factors import Factors
from weft.adapters.lowrank import same_weight
from weft.errors import UsageError
from weft.methods.dare import drop
from weft.methods.step import At, Pipeline
from weft.methods.ties import Elect, elect_sign, trim

Kind = Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"]


def linear(
    factors: Sequence[Factors], weights: Sequence[float], *, scales: Sequence[float] | None = None
) -> Factors:
    """A = Σ ±√|wᵢsᵢ| Aᵢ, B = Σ √|wᵢsᵢ| Bᵢ: PEFT's "linear". Rank r; all ranks must be equal."""
    return on_factors(factors, weights, kind="linear", scales=scales)


def on_factors(
    factors: Sequence[Factors],
    weights: Sequence[float],
    *,
    kind: Kind,
    density: float = 0.5,
    elect: Elect = "mass",
    seed: int = 0,
    name: str = "",
    scales: Sequence[float] | None = None,
) -> Factors:
    """One of PEFT's combinations, on each factor by itself. Rank r; all ranks must be equal.

    `scales` are the adapters' alpha/r, which `Factors` has folded into B; they matter only where they differ.
    A random mask (DARE) depends on seed, adapter number, `name` and position; PEFT's on torch's global state.
    """
    shape, transposed = same_weight(factors)
    ranks = sorted({f.rank for f in factors})
    if len(ranks) > 1:
        raise UsageError(
            f"merging factor by factor needs equal ranks, got {', '.join(map(str, ranks))}"
            f"{f' for {name}' if name else ''}: use svd or concat, or resize the adapters first"
        )
    s = scales or [1.0] * len(factors)
    root = [sqrt(abs(w * c)) for w, c in zip(weights, s, strict=True)]
    signed = [copysign(r, w * c) for r, w, c in zip(root, weights, s)]
    b = torch.stack([f.b / c if c else f.b for f, c in zip(factors, s)])  # [k, out, r]
    a = torch.stack([f.a for f in factors])  # [k, r, in]
    steps = _steps(kind, density, elect)
    return Factors(
        _merged(b, root, steps, At(f"{name}.lora_B", seed=seed), "ties" in kind),
        _merged(a, signed, steps, At(f"{name}.lora_A", seed=seed), "ties" in kind),
        shape,
        transposed,
    )


def factorwise(
    factors: Sequence[Factors], weights: Sequence[float], *, scales: Sequence[float] | None = None
) -> Factors:
    """A = Σ wᵢAᵢ, B = Σ wᵢBᵢ at the first adapter's scale: LoraHub, PEM addition, what LoRAX serves.

    Quadratic in w, cross-terms included. Ranks must be equal.
    """
    shape, transposed = same_weight(factors)
    if len({f.rank for f in factors}) > 1:
        raise UsageError("adding factor to factor needs equal ranks: use svd or concat, or resize first")
    s = scales or [1.0] * len(factors)
    b = sum(w * (f.b / c if c else f.b) for f, w, c in zip(factors, weights, s, strict=True))
    a = sum(w * f.a for f, w in zip(factors, weights, strict=True))
    assert isinstance(a, Tensor) and isinstance(b, Tensor)
    return Factors(b * s[0], a, shape, transposed)


def _steps(kind: Kind, density: float, elect: Elect) -> Pipeline:
    """What happens to the stack before it is added up; PEFT elects signs before it weighs."""
    steps = Pipeline()
    if kind in ("ties", "magnitude_prune"):
        steps = steps | trim(density=density)
    if kind.startswith("dare"):
        steps = steps | drop(density=density)
    if kind.endswith("ties"):
        steps = steps | elect_sign(weight=1.0, elect=elect, tie="plus")
    return steps


def _merged(x: Tensor, weights: Sequence[float], steps: Pipeline, at: At, disjoint: bool) -> Tensor:
    """Σ wᵢx̂ᵢ, divided by the number of entries that agree where signs were elected. x: [k, m, n]"""
    kept = steps(x, at=at)
    total = torch.einsum("k,kmn->mn", torch.tensor(list(weights), dtype=x.dtype), kept)
    return total / (kept != 0).sum(0).clamp_min(1) if disjoint else total
