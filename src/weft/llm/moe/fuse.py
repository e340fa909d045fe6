"""Several experts as one, and several router rows as one.

Expert. With q_e the share of e's usage in its cluster C, after e's neurons are put in the order of the most used
expert's (any order of them computes the same):

    gate = Σ q_e gate_e,  up = Σ q_e up_e,  down = Σ q_e down_e          (M-SMoE, arXiv 2310.01334)

and, by least squares, down is then solved again for what the cluster really adds to the residual stream on the
inputs x (after MergeMoE, arXiv 2510.14436, which weighs the experts by q where this uses the gates g_e(x)):

    min over D of  Σ_x ‖ G(x) D h(x) − Σ_{e∈C} g_e(x) E_e(x) ‖² + λ‖D − down‖²,
    h(x) = act(gate x) ⊙ up x,   G(x) = Σ_{e∈C} g_e(x)

so that without data, or in directions the data do not reach, D is `down`.

Router. The row of a cluster is Σ q_e w_e. Given inputs, the rows are then fitted, by ridge regression, to

    z_C(x) = max_{e∈C} z_e(x)        less the mean over the clusters for a softmax, which does not see it

so that a cluster is chosen where its best expert would have been. The other candidate, logsumexp z_e, is what
the softmax over all experts gives the cluster; but only the k best count, and it made every reduction that
we measured worse than no fit at all, since many experts that would not be chosen add up to one that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from weft.errors import MissingExtra
from weft.llm.moe.blocks import Block
from weft.llm.moe.cluster import weights
from weft.llm.moe.routing import Routing, mlp


def fused_expert(
    block: Block,
    members: Sequence[int],
    share: Tensor,
    routing: Routing,
    *,
    align: bool = True,
    x: Tensor | None = None,
    gates: Tensor | None = None,
    ridge: float = 1e-2,
) -> dict[str, Tensor]:
    """gate, up and down (float64) of one expert for `members`, whose shares `share` `[len(members)]` sum to 1.

    With inputs x `[tokens, hidden]` and their gates `[tokens, experts]`, down is fitted by least squares; λ is
    `ridge` times the mean ‖G h‖². At most three experts are in memory. MissingExtra without scipy, to align.
    """
    lead = members[int(share.argmax())]
    leading = weights(block, lead)
    total = {role: torch.zeros_like(w) for role, w in leading.items()}
    used = None
    if x is not None and gates is not None:
        used = gates[:, list(members)].sum(1) > 0
        x, gates = x[used].double(), gates[used]
        target = torch.zeros_like(x)
    for e, q in zip(members, share.tolist(), strict=True):
        own = leading if e == lead else weights(block, e)
        if used is not None:
            assert x is not None and gates is not None
            target += gates[:, e, None] * mlp(x, **own, act=routing.act)
        if align and e != lead:
            own = in_order(own, leading)
        for role in total:
            total[role] += q * own[role]
    if used is not None and x is not None and gates is not None and len(x):
        h = routing.act(x @ total["gate"].T) * (x @ total["up"].T) * gates[:, list(members)].sum(1)[:, None]
        total["down"] += ridge_fit(h, target - h @ total["down"].T, ridge)
    return total


def in_order(own: dict[str, Tensor], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same function with its neurons permuted to agree best with another expert's, by inner products."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise MissingExtra("scipy", "llm", "aligning the neurons of experts") from None
    agreement = like["gate"] @ own["gate"].T + like["up"] @ own["up"].T + like["down"].T @ own["down"]
    order: Any = torch.as_tensor(linear_sum_assignment(agreement.numpy(), maximize=True)[1])
    return {"gate": own["gate"][order], "up": own["up"][order], "down": own["down"][:, order]}


def ridge_fit(x: Tensor, y: Tensor, ridge: float) -> Tensor:
    """argmin over W of ‖x Wᵀ − y‖² + λ‖W‖², `[outputs, inputs]`; λ = ridge · ‖x‖² / rows."""
    rows, columns = x.shape
    penalty = max(ridge * float(x.square().sum()) / rows, 1e-12)
    eye = torch.eye(min(rows, columns), dtype=x.dtype)
    solved: Tensor
    if rows <= columns:
        solved = x.T @ torch.linalg.solve(x @ x.T + penalty * eye, y)
    else:
        solved = torch.linalg.solve(x.T @ x + penalty * eye, x.T @ y)
    return solved.T


def fused_rows(
    rows: Tensor,
    bias: Tensor | None,
    correction: Tensor | None,
    clusters: Sequence[Sequence[int]],
    share: Tensor,
    routing: Routing,
    *,
    x: Tensor | None = None,
    ridge: float = 1e-2,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows `[clusters, hidden]`, bias and correction `[clusters]` for rows `[experts, hidden]`; float64.

    `share` `[experts]` sums to 1 within each cluster. With inputs x the rows are fitted.
    """
    mix = torch.zeros(len(clusters), len(rows), dtype=torch.float64)
    for c, members in enumerate(clusters):
        mix[c, list(members)] = share[list(members)]
    new = mix @ rows
    new_bias, new_correction = (None if b is None else mix @ b for b in (bias, correction))
    if x is not None and any(len(c) > 1 for c in clusters):
        logits = x.double() @ rows.T + (0 if bias is None else bias)
        wanted = torch.stack([logits[:, list(c)].amax(1) for c in clusters], dim=1)
        missing = wanted - x.double() @ new.T - (0 if new_bias is None else new_bias)
        if not routing.sigmoid:
            missing = missing - missing.mean(1, keepdim=True)
        new = new + ridge_fit(x.double(), missing, ridge)
    return new, new_bias, new_correction
