"""SCE: select, calculate, erase. Wan et al. 2024, FuseChat, arXiv:2408.07990.

    Select     keep the positions whose variance over the models is among the ⌊pn⌋ largest
    Calculate  wᵢ = Σ τ̂ᵢ² / Σⱼ Σ τ̂ⱼ²                     one weight a model and tensor, from the selected
    Erase      zero the entries whose sign is not that of Σ τ̂ᵢ
    θ = θ0 + Σ wᵢτ̂ᵢ / Σ wᵢ                                at every position over the entries left

n is the number of entries of the tensor (`select_of="all"`), or of those where the variance is not zero,
which is MergeKit's. MergeKit besides gives up the weights where task vectors are small (a sum of mean squares
below 1e-6), as after light fine-tuning; here they follow from the data at any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from weft.late import Tensor, torch
from weft.methods.params import Fraction
from weft.methods.registry import method
from weft.methods.stats import Chain, Select, Sums, compared
from weft.methods.step import At, Pipeline, step
from weft.methods.ties import Tie, column, elect_sign, kept_count

SelectOf = Literal["all", "nonzero"]


def spread(x: Tensor) -> Tensor:
    """Variance over the models, x: [k, *shape] → [1, *shape]."""
    mean = x[0]
    for xi in x[1:]:
        mean = mean + xi
    mean = mean / x.shape[0]
    total = torch.zeros_like(mean)
    for xi in x:
        total = total + (xi - mean) ** 2
    return total[None] / x.shape[0]


def selected(x: Tensor, cut: Tensor) -> Tensor:
    """x where the variance reaches the cut [1, 1], zero elsewhere."""
    return torch.where(compared(spread(x.detach())) >= column(cut[:, 0], x), x, 0.0)


def _varying(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    return (compared(spread(x)) > 0).double()


def _ranks(params: Mapping[str, Any], k: int, numel: int) -> list[list[int]]:
    n = numel if params["select_of"] == "all" else int(params["varying"][0])
    # where nothing varies there is nothing to choose by: all is kept
    return [[kept_count(params["select_topk"], n) if n else numel + 1]]


def _spread(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    return spread(x)


def _energy(x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
    return selected(x.double(), params["cut"]) ** 2


@step(
    stat=Chain(Sums("varying", _varying), Select("cut", _ranks, value=_spread), Sums("energy", _energy)),
    reduces=True,
)
def select_calculate_erase(
    x: Tensor,
    *,
    varying: Tensor,
    cut: Tensor,
    energy: Tensor,
    select_topk: Fraction = 1.0,
    select_of: SelectOf = "all",
    tie: Tie = "none",
) -> Tensor:
    """The three stages. varying: [1] positions of variance > 0, cut: [1, 1], energy: [k]."""
    weight = energy.clamp(min=torch.finfo(torch.float64).tiny)
    weight = (weight / weight.sum()).to(x)
    kept = elect_sign.fn(selected(x, cut), tie=tie)
    total, mass = torch.zeros_like(x[0]), torch.zeros_like(x[0])
    for xi, wi in zip(kept, weight, strict=True):
        total, mass = total + wi * xi, mass + torch.where(xi != 0, wi, 0.0)
    return torch.where(mass > 0, total / torch.where(mass > 0, mass, 1.0), 0.0)


@method(
    space="deltas",
    paper="Wan et al., FuseChat, arXiv:2408.07990",
    compat={"mergekit": {"select_of": "nonzero", "tie": "plus"}},
)
def sce(*, select_topk: Fraction = 1.0, select_of: SelectOf = "all", tie: Tie = "none") -> Pipeline:
    """Merge where models differ most, by weights from their energy, without the minority sign."""
    return select_calculate_erase(select_topk=select_topk, select_of=select_of, tie=tie)
