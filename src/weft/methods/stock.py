"""Model Stock: how far to go from the base to the mean, read off the angle. Jang et al., arXiv:2403.19522.

    cos φ = mean over pairs of ⟨τᵢ, τⱼ⟩/‖τᵢ‖‖τⱼ‖          t = k cos φ / (1 + (k−1) cos φ)
    θ     = θ0 + t · mean τᵢ

The paper derives t for models at one mutual angle (its experiments have two); several take the mean cosine,
as all implementations do. A pair with a zero task vector counts as orthogonal. Fine-tuned models that agree
less than chance (cos φ < 0) would give a negative t, and a pole at cos φ = −1/(k−1): cos φ is clamped to
[0, 1] unless `clamp=False`, so that they give the base. MergeKit and FusionBench don't clamp; MergeKit
besides bounds the product of norms from below, which makes small task vectors look orthogonal, and that is
not reproduced here.
"""

from __future__ import annotations

from typing import Any

from weft.checkpoints.bits import Array
from weft.late import Tensor
from weft.methods.params import Scope
from weft.methods.registry import method
from weft.methods.spherical import combination, squares
from weft.methods.stats import Gram, gram_of, namespace, pairs
from weft.methods.step import Pipeline, anything_goes, step


def stock_ratio(gram: Array | Tensor, clamp: bool = True) -> Any:
    """t, gram: [..., k, k] → [...]."""
    xp, k = namespace(gram), gram.shape[-1]
    square = squares(gram)
    directed = square > 0
    inverse = xp.where(directed, 1.0 / xp.sqrt(xp.where(directed, square, 1.0)), 0.0)
    unit = gram * inverse[..., :, None] * inverse[..., None, :]
    i, j = zip(*((i, j) for i, j in pairs(k) if i < j), strict=True)
    cos = unit[..., i, j].mean(-1)
    if clamp:
        cos = xp.clip(cos, 0, 1)
    below = 1 + (k - 1) * cos
    return k * cos / xp.where(below == 0, 1.0, below)


def _shrink(x: Tensor, gram: Array | Tensor, clamp: bool) -> Tensor:
    k = x.shape[0]
    share = (stock_ratio(gram, clamp) / k)[..., None]
    return combination(x, namespace(gram).concatenate([share] * k, -1))


@step(stat=Gram(), reduces=True, refuses=anything_goes)
def shrink_mean(x: Tensor, *, gram: Array | Tensor, clamp: bool = True, scope: Scope = "tensor") -> Tensor:
    """Mean of the task vectors times Model Stock's ratio, by the angle of the tensor or the whole model."""
    return _shrink(x, gram, clamp)


@step(grain="row", reduces=True)
def shrink_mean_rows(x: Tensor, *, clamp: bool = True) -> Tensor:
    """`shrink_mean`, each row by its own angle. x: [k, rows, n] → [rows, n]."""
    return _shrink(x, gram_of(x).cpu(), clamp)


@method(
    space="deltas",
    models=(2, None),
    paper="Jang et al., Model Stock, arXiv:2403.19522",
    compat={"mergekit": {"clamp": False}},
)
def model_stock(*, row_wise: bool = False, clamp: bool = True, scope: Scope = "tensor") -> Pipeline:
    """Go from the base towards the mean as far as the models' mutual angle says.

    `row_wise` takes the angle of each row (MergeKit's filter_wise); `scope` otherwise that of each tensor or
    of the whole model.
    """
    return shrink_mean_rows(clamp=clamp) if row_wise else shrink_mean(clamp=clamp, scope=scope)
