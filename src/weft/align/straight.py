"""The straight-through estimator of Git Re-Basin (arXiv:2209.04836, section 3.3): matching by the midpoint's loss.

    π = matching(θ̂, θB)      g = ∂L/∂θ at ½ (θA + πθB)      θ̂ ← θ̂ − η g / 2

The loss is that of the network with a permutation in it; its gradient moves the free weights θ̂, which begin at θA
and decide the permutation, as if πθB were θ̂ itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weft.align.data import line
from weft.align.spec import Permutations, PermutationSpec
from weft.align.weights import Ascent, Slices
from weft.analysis.network import Network
from weft.errors import UsageError


def straight_through(
    spec: PermutationSpec, a: Any, b: Any, net: Network, *, steps: int = 60, lr: float = 0.1,
    momentum: float = 0.9, sweeps: int = 10, start: Permutations | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Permutations of `b` with the lowest loss halfway to `a` on the data of `net` that are met in `steps`.

    SGD with momentum, one batch of `net` a step; each matching begins at the last. It starts with the weight
    matching, which counts among those met: the result is never worse than that on these data. The paper takes
    lr 0.01 and thousands of steps; a larger one finds as much in tens.
    """
    if steps < 1 or lr <= 0:
        raise UsageError(f"steps must be at least 1 and lr positive, not {steps} and {lr}")
    between = line(spec, a, b, net)
    free = {n: between.a[n].clone() for n in between.counted}
    velocity = {n: torch.zeros_like(t) for n, t in free.items()}
    at = spec.identity() if start is None else spec.complete(start)
    ascent = Ascent(spec, Slices({n: (free[n], between.b[n]) for n in free}))
    ascent.climb(at, torch.Generator().manual_seed(seed))
    best = between.cost(at, "midpoint"), dict(at)
    names = set(net.parameters)
    for step in range(steps):
        middle = between.middle(at)
        parameters = {n: middle[n].detach().requires_grad_() for n in free if n in names}
        loss = between.loss(middle | parameters, step)
        gradients = torch.autograd.grad(loss, [*parameters.values()])
        for n, g in zip(parameters, gradients, strict=True):
            velocity[n] = momentum * velocity[n] + g / 2
            free[n] -= lr * velocity[n]
        before = {n: p.clone() for n, p in at.items()}
        ascent.climb(at, torch.Generator().manual_seed(seed + step + 1), sweeps)
        if any(not torch.equal(before[n], p) for n, p in at.items()):
            best = min(best, (between.cost(at, "midpoint"), dict(at)), key=lambda found: found[0])
    return best[1]
