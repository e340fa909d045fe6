"""Sinkhorn re-basin: permutations learned through doubly stochastic matrices (arXiv:2212.12042).

    P = lim  rows and columns of exp(Z/τ) scaled to sum to 1, in turn        Z ← Z − η ∂L/∂Z

L is the distance of the weights, ‖θA − PθB‖², the loss at the midpoint or the loss at a random point of the line.
The gradient goes through the unrolled iterations, or through the equations P1 = 1, Pᵀ1 = 1 that their limit
fulfils (`implicit`): with S = P ⊙ ∂L/∂P, solve  [[diag P1, P], [Pᵀ, diag Pᵀ1]] (u, v) = (S1, Sᵀ1); then
∂L/∂Z = (S − P ⊙ (u1ᵀ + 1vᵀ)) / τ.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from weft.align.data import Line, line
from weft.align.soft import hardened, softly_reordered
from weft.align.spec import Permutations, PermutationSpec
from weft.analysis.network import Network
from weft.errors import UsageError

Gradient = Literal["implicit", "unrolled"]
Objective = Literal["weights", "midpoint", "random"]


def sinkhorn(
    scores: Tensor, tau: float = 1.0, iterations: int = 100, gradient: Gradient = "implicit"
) -> Tensor:
    """Doubly stochastic matrices `[…, n, n]` from scores, after `iterations` scalings of rows and columns.

    Implicit gradients are those of the limit: exact only where `iterations` reach it.
    """
    if tau <= 0 or iterations < 1:
        raise UsageError(f"tau must be positive and iterations at least 1, not {tau} and {iterations}")
    if gradient == "unrolled":
        return _scaled(scores / tau, iterations).exp()
    return _Implicit.apply(scores / tau, iterations)  # type: ignore[no-any-return,no-untyped-call]


def _scaled(logs: Tensor, iterations: int) -> Tensor:
    for _ in range(iterations):
        logs = logs - logs.logsumexp(-1, keepdim=True)
        logs = logs - logs.logsumexp(-2, keepdim=True)
    return logs


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logs: Tensor, iterations: int) -> Tensor:
        p = _scaled(logs, iterations).exp()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        s, n = p * grads[0], p.shape[-1]
        rows, columns = p.sum(-1), p.sum(-2)
        system = torch.cat(
            [torch.cat([torch.diag_embed(rows), p], -1), torch.cat([p.mT, torch.diag_embed(columns)], -1)], -2
        )[..., :-1, :-1]  # one of the 2n equations follows from the others
        right = torch.cat([s.sum(-1), s.sum(-2)], -1)[..., :-1]
        solved = torch.linalg.solve(system, right)
        u, v = solved[..., :n], torch.nn.functional.pad(solved[..., n:], (0, 1))
        return s - p * (u[..., :, None] + v[..., None, :]), None


def sinkhorn_matching(
    spec: PermutationSpec, a: Any, b: Any, net: Network | None = None, *,
    objective: Objective | None = None, steps: int = 100, lr: float = 0.1, tau: float = 1.0,
    iterations: int = 20, gradient: Gradient = "implicit", start: Permutations | None = None, seed: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    """Permutations of `b` learned by AdamW on the scores Z, hardened by assignment at the end.

    `objective`: "weights" needs no data; "midpoint" and "random" (the default where `net` is given) are the loss
    of `net` halfway, or at a point of the line drawn anew for each batch. Z begins at the permutations of `start`
    (or as b is) plus a tenth of standard normal noise; of the hard permutations met, the ones with the lowest
    objective count. In memory: for networks of up to some thousand units a layer.
    """
    objective = objective or ("weights" if net is None else "random")
    if objective not in ("weights", "midpoint", "random"):
        raise UsageError(f"there is no objective {objective!r}; there are weights, midpoint and random")
    if objective != "weights" and net is None:
        raise UsageError(f"the objective {objective!r} is a loss: give net=, the network with its data")
    if steps < 1:
        raise UsageError(f"steps must be at least 1, not {steps}")
    between = line(spec, a, b, net)
    generator = torch.Generator().manual_seed(seed)
    eye = spec.identity() if start is None else spec.complete(start)
    scores = {}
    for name, p in eye.items():
        noise = 0.1 * torch.randn(*p.shape, p.shape[-1], generator=generator)
        hot = torch.nn.functional.one_hot(p, p.shape[-1]).float()
        scores[name] = (hot + noise).requires_grad_()
    if not scores:
        return {}
    optimiser = torch.optim.AdamW(scores.values(), lr=lr)
    best = between.cost(eye, objective), eye
    for step in range(steps):
        alpha = float(torch.rand(1, generator=generator)) if objective == "random" else 0.5
        optimiser.zero_grad()
        soft = {n: sinkhorn(z, tau, iterations, gradient) for n, z in scores.items()}
        loss = _loss(between, softly_reordered(between.b, spec, soft), objective, alpha, step)
        torch.autograd.backward(loss)
        optimiser.step()
        if step % 10 == 9 or step == steps - 1:
            hard = hardened(spec, {n: z.detach() for n, z in soft.items()})
            best = min(best, (between.cost(hard, objective), hard), key=lambda found: found[0])
    return best[1]


def _loss(between: Line, moved: dict[str, Tensor], objective: str, alpha: float, step: int) -> Tensor:
    if objective == "weights":
        total = torch.zeros(())
        for n in between.counted:
            total = total + (between.a[n] - moved[n]).pow(2).sum()
        return total
    return between.loss(between.mixed(moved, alpha), step)
