"""weave: the Gram solver with the spectrum of its result evened; weft's own.

    Δ = argmin Σᵢ tr (Δ − τᵢ) Gᵢ (Δ − τᵢ)ᵀ            Gᵢ of inputs and of the change itself: see `gram`
    Δ = U diag(s) Vᵀ → α (‖s‖ / ‖sᵖ‖) U diag(sᵖ) Vᵀ    p = 1 leaves it, p = 0 is Iso's even spectrum

Least squares says where a change must go, and keeps directions long that tasks agree on; evening them gives room
to what is one task's own. The norm is kept, so that one factor α fits networks whose spectra fall fast or slowly,
where Iso's mean singular value needs one chosen for each. Task vectors that are long for the network want a smaller
factor still: docs/bench.md has the ablation, and where it fails.
"""

from __future__ import annotations

from weft.late import Tensor, torch
from weft.methods.averages import scaled
from weft.methods.gram import fit_both
from weft.methods.inverse import Filter
from weft.methods.least_squares import Keep, Weights
from weft.methods.params import Fraction, NonNegative
from weft.methods.registry import method
from weft.methods.spectral import Outside, is_spectral, matrixwise
from weft.methods.step import At, Pipeline, step

RANK_TOL = 1e-5
"""Singular values below this share of the largest are rounding, and stay as small as they are."""


@step(grain="tensor")
def evened(x: Tensor, *, at: At, power: Fraction = 0.25, outside: Outside = "spectral") -> Tensor:
    """Every matrix of x [*shape] with its singular values to a power, of the same norm; vectors as they are."""
    if power == 1 or not is_spectral(at, outside):
        return x
    return matrixwise(x[None], at, lambda one: flattened(one[0], power))


def flattened(t: Tensor, power: float) -> Tensor:
    """U diag(s) Vᵀ [m, n] → (‖s‖/‖sᵖ‖) U diag(sᵖ) Vᵀ over the numerical rank, float64. Zeros stay zeros."""
    t = t.double()
    u, s, vh = torch.linalg.svd(t, full_matrices=False)
    kept = s > RANK_TOL * s[:1]
    if not bool(kept.any()):
        return t
    u, s, vh = u[:, kept], s[kept], vh[kept]
    raised = (s / s[0]) ** power  # over the largest, so that no power leaves the range
    made: Tensor = (u * (raised * (s.norm() / raised.norm()))) @ vh
    return made


@method(space="deltas", paper="", needs=("gram?",))
def weave(
    *,
    weight: Weights = 1.0,
    prior: Fraction = 0.1,
    ridge: NonNegative = 0.01,
    filter: Filter = "ridge",
    keep: Keep = "sum",
    power: Fraction = 0.25,
    outside: Outside = "spectral",
    scale: float = 1.25,
) -> Pipeline:
    """The Gram solver's merge with its spectrum evened.

    With statistics (`weft measure --what gram`, 32 inputs a task are enough) they say what matters where, with the
    task vectors as a `prior`; without, the task vectors alone. Singular values of the merged change are raised to
    `power` (1 leaves them, 0 makes them equal), its norm kept, then multiplied by `scale`.
    """
    made = fit_both(weight=weight, prior=prior, ridge=ridge, filter=filter, keep=keep, outside=outside)
    return made | evened(power=power, outside=outside) | scaled(scale=scale)
