"""NearSwap: take over a model where it is near the base. Invented by the user "alchemonaut"; in MergeKit.

    a = min(t / |θ1 − θ0|, 1)           θ = θ0 + a (θ1 − θ0)

that is, every entry of the task vector is clamped to [−t, t]. Where the two are within t of each other the
other model's weight is taken over, elsewhere the base moves by t towards it. (MergeKit bounds |θ1 − θ0|
from below by 1e-6, which matters only for t < 1e-6.)
"""

from __future__ import annotations

from weft.late import Tensor
from weft.methods.averages import weighted_sum
from weft.methods.params import NonNegative
from weft.methods.registry import method
from weft.methods.step import Pipeline, step


@step()
def bounded(x: Tensor, *, t: NonNegative) -> Tensor:
    """x with every entry clamped to [−t, t]."""
    return x.clamp(-t, t)


@method(space="deltas", models=(1, 1), paper="Goddard et al., MergeKit, arXiv:2403.13257 (after alchemonaut)")
def nearswap(*, t: NonNegative) -> Pipeline:
    """Move the base towards another model by at most t in every entry."""
    return bounded(t=t) | weighted_sum()
