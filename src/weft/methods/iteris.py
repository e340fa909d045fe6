"""IterIS's step: the map whose outputs on the merged model's inputs are the experts' own. arXiv:2411.15231.

    min over W of Σ λᵢ ‖W X̃ᵢ − WᵢXᵢ‖²,  λᵢ = wᵢ / ‖WᵢXᵢ‖²
    W = (Σ λᵢ Wᵢ XᵢX̃ᵢᵀ)(Σ λᵢ X̃ᵢX̃ᵢᵀ)⁻¹

X̃ᵢ are the inputs that the merged model makes of task i's data, Xᵢ those that expert i makes. It is the Gram solver
with a target of its own (least_squares.py); what it needs, the moments of both inputs side by side, is measured by
`weft.iteris` between solving and merging (statistics/iterated.py), so it is no method by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.late import Tensor
from weft.methods.gram import workspace
from weft.methods.inverse import Inverse
from weft.methods.least_squares import Settings, Weights, averaged, by_inputs
from weft.methods.params import NonNegative
from weft.methods.registry import Method
from weft.methods.step import At, Pipeline, Shapes, step


def _workspace(params: Mapping[str, Any], at: At, k: int, known: Shapes) -> int:
    return 2 * workspace(params, at, k, {"gram": known.get("pair", ())})


@step(grain="tensor", needs=("pair",), reduces=True, one_by_one=True, workspace=_workspace)
def fit_pairs(x: Tensor, *, pair: Any, at: At, weight: Weights = 1.0, ridge: NonNegative = 1e-6) -> Tensor:
    """W for the models x [k, *shape] and moments of [Xᵢ; X̃ᵢ], pair: [k, (b,) 2·in, 2·in] → [*shape]."""
    if pair is None or at.numel == 0 or len(pair.shape) < 3:
        return averaged(x, weight)
    how = Settings(
        normalize="outputs", inverse=Inverse("ridge" if ridge else "exact", ridge=ridge, unit=True)
    )
    return by_inputs(x, pair, at, weight, how, paired=True)


def aligned_outputs(weight: Any = 1.0, ridge: float = 1e-6) -> Method:
    """The step as a method on weights."""

    def iteris() -> Pipeline:
        """Fit the outputs of all models on the merged model's inputs."""
        return fit_pairs(weight=weight, ridge=ridge)

    return Method(
        iteris, space="weights", models=(1, None), paper="Chen et al., IterIS, arXiv:2411.15231", base="forbidden",
        compat={}, per_task=False, needs=("pair",),
    )  # fmt: skip


__all__ = ["aligned_outputs", "fit_pairs"]
