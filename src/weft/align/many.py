"""Many models in one order: MergeMany (arXiv:2209.04836) and C²M³ (arXiv:2405.17897).

Both return one set of permutations a model, each from the model's own order into an order that all share, so
that the way from a to b and on to c is the way from a to c.

    MergeMany   πᵢ ← matching(mean of the others, θᵢ)   until nothing moves
    C²M³        maximise  f(P) = Σ_{i<j} ⟨Pᵢθᵢ, Pⱼθⱼ⟩  over all groups and models at once (Frank–Wolfe)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from weft.align.pair import Pair
from weft.align.sinkhorn import sinkhorn
from weft.align.soft import Soft, hardened, softened, softly_reordered
from weft.align.spec import Permutations, PermutationSpec
from weft.align.terms import groups_in
from weft.align.weights import weight_matching
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.errors import UsageError


def merge_many(
    spec: PermutationSpec, models: Sequence[Any], *, seed: int = 0, rounds: int = 20, sweeps: int = 100,
    memory: int | str | None = None, start: Sequence[Permutations] | None = None,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Each model, in an order drawn anew each round, is matched by weights to the mean of the others as they are
    then, until a round moves none. Σ_{i<j} ⟨πᵢθᵢ, πⱼθⱼ⟩ never falls from what it is at `start` (the models as they
    are, by default). Streams, as weight matching does."""
    sources = _several(spec, models)
    found = _begun(spec, sources, start)
    generator = torch.Generator().manual_seed(seed)
    for turn in range(rounds):
        moved = False
        for i in torch.randperm(len(sources), generator=generator).tolist():
            others = [spec.apply(s, found[j]) for j, s in enumerate(sources) if j != i]
            new = weight_matching(
                spec, mean(others), sources[i], start=found[i], seed=seed + turn, sweeps=sweeps, memory=memory
            )
            moved = moved or any(not torch.equal(p, found[i][n]) for n, p in new.items())
            found[i] = new
        if not moved:
            break
    return found


def c2m3(
    spec: PermutationSpec, models: Sequence[Any], *, seed: int = 0, tries: int = 1, steps: int = 200,
    patience: int = 5, start: Sequence[Permutations] | None = None, polish: bool = False,
) -> list[dict[str, Tensor]]:  # fmt: skip
    """Permutations into a universe by Frank–Wolfe over doubly stochastic matrices, hardened at the end.

    What is hardened need not be at a maximum any more: with `polish` (not in the paper) each model's groups are
    then matched in turn to the mean of the others, as `merge_many` does, until f rises no more.

    Each step goes towards the permutations that the gradient favours most, as far as f rises; it ends after
    `patience` steps that gain less than a millionth. The first of `tries` begins at `start` (permutations of each
    model; as they are, by default), the others near the centre of all permutations; of all that come out, and
    `start` itself, the one with the highest f counts. In memory: seconds to minutes for some hundred units a layer.
    """
    sources = _several(spec, models)
    names = Pair(spec, sources[0], sources[1]).names
    for source in sources[1:]:
        names = [n for n in names if n in set(Pair(spec, sources[0], source).names)]
    states = [{n: s.tensor(s.aliases.get(n, n)).double() for n in names} for s in sources]
    if tries < 1 or steps < 1:
        raise UsageError(f"tries and steps must be at least 1, not {tries} and {steps}")
    if not spec.movable:
        return [{} for _ in sources]
    begun = _begun(spec, sources, start)
    soft = [softened(spec, p, torch.float64) for p in begun]
    best = float(shared(spec, states, soft)), begun
    generator = torch.Generator().manual_seed(seed)
    for attempt in range(tries):
        at = soft if attempt == 0 else [_central(spec, generator) for _ in states]
        hard = [hardened(spec, p) for p in _frank_wolfe(spec, states, at, steps, patience)]
        if polish:
            hard = merge_many(spec, sources, seed=seed, start=hard)
        reached = float(shared(spec, states, [softened(spec, p, torch.float64) for p in hard]))
        best = max(best, (reached, hard), key=lambda found: found[0])
    return best[1]


def shared(spec: PermutationSpec, states: Sequence[Mapping[str, Tensor]], soft: Sequence[Soft]) -> Tensor:
    """f = Σ_{i<j} ⟨Pᵢθᵢ, Pⱼθⱼ⟩ = ½ (‖Σᵢ Pᵢθᵢ‖² − Σᵢ ‖Pᵢθᵢ‖²)."""
    placed = [softly_reordered(s, spec, p) for s, p in zip(states, soft, strict=True)]
    total = torch.zeros((), dtype=torch.float64)
    for name in placed[0]:
        every = torch.stack([p[name] for p in placed])
        total = total + (every.sum(0).pow(2).sum() - every.pow(2).sum()) / 2
    return total


def _central(spec: PermutationSpec, generator: torch.Generator) -> dict[str, Tensor]:
    draws = {n: (*spec.shape(n), spec.groups[n].size) for n in spec.movable}
    return {n: sinkhorn(torch.randn(s, generator=generator, dtype=torch.float64), gradient="unrolled")
            for n, s in draws.items()}  # fmt: skip


def _frank_wolfe(
    spec: PermutationSpec, states: Sequence[Mapping[str, Tensor]], at: list[dict[str, Tensor]], steps: int,
    patience: int,
) -> list[dict[str, Tensor]]:  # fmt: skip
    degree = 2 * max(
        sum(g in spec.movable for term in spec.axes[n] for g in groups_in(term)) for n in states[0]
    )
    # f is a polynomial of this degree along a line, so that many and one values say all of it
    grid = (1 - np.cos(np.pi * np.arange(degree + 1) / max(1, degree))) / 2
    value, idle = float(shared(spec, states, at)), 0
    for _ in range(steps):
        leaves = [{n: p.clone().requires_grad_() for n, p in ps.items()} for ps in at]
        shared(spec, states, leaves).backward()  # type: ignore[no-untyped-call]
        slopes = [{n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in ps.items()}
                  for ps in leaves]  # fmt: skip
        goal = [softened(spec, hardened(spec, g), torch.float64) for g in slopes]
        found = [float(shared(spec, states, _along(at, goal, t))) for t in grid]
        t, gain = _peak(np.asarray(grid), np.asarray(found))
        if t == 0:
            break
        idle = idle + 1 if gain < 1e-6 * abs(value) else 0
        at, value = _along(at, goal, t), value + gain
        if idle >= patience:
            break
    return at


def _along(at: Sequence[Soft], goal: Sequence[Soft], t: float) -> list[dict[str, Tensor]]:
    return [{n: p + t * (g[n] - p) for n, p in a.items()} for a, g in zip(at, goal, strict=True)]


def _peak(grid: np.ndarray[Any, Any], values: np.ndarray[Any, Any]) -> tuple[float, float]:
    """Where in [0, 1] the polynomial through these values is largest, and how far above its value at 0."""
    fitted = np.polynomial.Polynomial.fit(grid, values - values[0], len(grid) - 1, domain=[0, 1])
    roots = [complex(r) for r in fitted.deriv().roots()]
    inside = [r.real for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    t = max([0.0, 1.0, *inside], key=lambda t: float(fitted(t)))
    return t, float(fitted(t) - fitted(0.0))


def together(
    models: Sequence[Any], how: str = "c2m3", *, spec: PermutationSpec, **options: Any
) -> list[Checkpoint]:
    """Models in one order, as lazy checkpoints that can be merged. `how`: "c2m3" or "merge_many"."""
    ways: dict[str, Callable[..., list[dict[str, Tensor]]]] = {"c2m3": c2m3, "merge_many": merge_many}
    if how not in ways:
        raise UsageError(
            f"there is no way to bring many models into one order called {how!r}; there are c2m3 and merge_many"
        )
    sources = [load(m) for m in models]
    found = ways[how](spec, sources, **options)
    return [spec.apply(s, p) for s, p in zip(sources, found, strict=True)]


def mean(models: Sequence[Checkpoint]) -> Checkpoint:
    """The average, as a lazy checkpoint."""
    total: Any = models[0]
    for model in models[1:]:
        total = total + model
    return total / len(models) if len(models) > 1 else total  # type: ignore[no-any-return]


def _several(spec: PermutationSpec, models: Sequence[Any]) -> list[Checkpoint]:
    if len(models) < 2:
        raise UsageError(f"at least two models can be brought into one order, not {len(models)}")
    sources = [load(m) for m in models]
    for source in sources:
        spec.check(source)
    return sources


def _begun(
    spec: PermutationSpec, sources: Sequence[Checkpoint], start: Sequence[Permutations] | None
) -> list[dict[str, Tensor]]:
    if start is not None and len(start) != len(sources):
        raise UsageError(f"start must hold permutations for each of {len(sources)} models, not {len(start)}")
    return [spec.complete(p) for p in start] if start is not None else [spec.identity() for _ in sources]


def relating(spec: PermutationSpec, a: Permutations, b: Permutations) -> dict[str, Tensor]:
    """The permutations that put b into the order of a, from those that put both into a common one."""
    return spec.compose(b, spec.inverse(a))
