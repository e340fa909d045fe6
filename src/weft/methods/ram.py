"""RAM and RAM+: average what several models changed, keep whole what one did. arXiv:2601.13572.

    cⱼ = number of models with |τᵢ[j]| > ε            ("contributors")
    τ  = Σ_{contributors} τᵢ / c                       so a change made by one model is not diluted
    RAM+: where c = 1 the change is multiplied by λᵢ = 1 + r · clip(sharedᵢ/uniqueᵢ, 0, α)

sharedᵢ and uniqueᵢ count the model's entries with c > 1 and c = 1, over the whole model as in the paper;
MergeKit, where it is called ramplus_tl, can only count each tensor by itself (`scope="tensor"`). Made for
reinforcement-learned agents, whose task vectors are sparse; ε is an absolute size. Entries below ε are
dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.late import Tensor, torch
from weft.methods.params import NonNegative, Scope
from weft.methods.registry import method
from weft.methods.stats import Sums
from weft.methods.step import At, Pipeline, step
from weft.methods.ties import column, disjoint_mean


@step()
def drop_small(x: Tensor, *, epsilon: NonNegative = 1e-5) -> Tensor:
    """Zero the entries of magnitude ε and below."""
    return torch.where(x.abs() > epsilon, x, 0.0)


def _counts(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    changed = x != 0
    several = changed.sum(0) > 1
    return torch.cat([changed & several, changed & ~several]).double()  # [2k, n]


@step(stat=Sums("counts", _counts, scope="model"))
def boost_unique(
    x: Tensor, *, counts: Tensor, r: NonNegative = 0.1, alpha: NonNegative = 0.2, scope: Scope = "model"
) -> Tensor:
    """Multiply the entries only one model changed by 1 + r·clip(shared/unique, 0, α). counts: [2k]."""
    shared, unique = counts.reshape(2, -1)
    ratio = torch.where(unique > 0, shared / torch.where(unique > 0, unique, 1.0), 0.0)
    factor = column((1 + r * ratio.clamp(max=alpha)).to(x.dtype), x)
    return torch.where((x != 0).sum(0) == 1, x * factor, x)


@method(space="deltas", paper="Reinforced Agent Merging, arXiv:2601.13572")
def ram(*, epsilon: NonNegative = 1e-5) -> Pipeline:
    """Average changes that models share, keep those of a single model as they are."""
    return drop_small(epsilon=epsilon) | disjoint_mean()


@method(
    space="deltas",
    paper="Reinforced Agent Merging, arXiv:2601.13572",
    aliases=("ramplus_tl",),
    compat={"mergekit": {"scope": "tensor"}},
)
def ram_plus(
    *,
    epsilon: NonNegative = 1e-5,
    r: NonNegative = 0.1,
    alpha: NonNegative = 0.2,
    scope: Scope = "model",
) -> Pipeline:
    """RAM, with the changes of a single model scaled up by how much of it overlaps with others."""
    return drop_small(epsilon=epsilon) | boost_unique(r=r, alpha=alpha, scope=scope) | disjoint_mean()
