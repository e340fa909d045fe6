"""Isotropic merging: all directions alike. Marczak et al., ICML 2025, arXiv:2502.04959.

    Iso-C     Σ τᵢ = U diag(s) Vᵀ                     θ = θ0 + α s̄ U Vᵀ,  s̄ = mean s
    Iso-CTS   Σ τᵢ ≈ U_c diag(s_c) V_cᵀ               a common share of its directions, 0.8
              (I − U_cU_cᵀ) τᵢ ≈ Uᵢ diag(sᵢ) Vᵢᵀ      the rest, divided evenly among the tasks
              θ = θ0 + α s̄ polar([U_c U₁ … U_T]) polar([V_c V₁ … V_T])ᵀ,  s̄ = mean of all s

Large singular values are what tasks share, small ones what is one task's own: equal ones serve all. Only where
there are directions: the published codes spread s̄ over the null space of low-rank (LoRA) sums too, which puts most
of the update where nobody trained; here the mean is over the numerical rank. Reported best factors α are 1.3 to
1.5 for Iso-C, 1.5 to 1.9 for Iso-CTS, chosen on data; 1 is the released configuration's.
"""

from __future__ import annotations

from weft.methods.averages import scaled
from weft.methods.params import Fraction, Weight
from weft.methods.registry import method
from weft.methods.spectral import Clip, Outside, spectral
from weft.methods.step import Pipeline


@method(space="deltas", paper="Marczak et al., No Task Left Behind, arXiv:2502.04959")
def iso_c(
    *, weight: Weight = 1.0, clip: Clip = "numerical", outside: Outside = "spectral", scale: float = 1.0
) -> Pipeline:
    """Iso-C: the sum of task vectors with all its singular values at their mean."""
    merged = spectral(weight=weight, factor="sum", clip=clip, spectrum="mean", outside=outside)
    return merged | scaled(scale=scale)


@method(space="deltas", paper="Marczak et al., No Task Left Behind, arXiv:2502.04959")
def iso_cts(
    *,
    weight: Weight = 1.0,
    common: Fraction = 0.8,
    clip: Clip = "numerical",
    outside: Outside = "spectral",
    scale: float = 1.0,
) -> Pipeline:
    """Iso-CTS: Iso-C on the sum's leading directions and on what each task has outside them.

    `common` is the share of directions taken from the sum.
    """
    merged = spectral(
        weight=weight,
        factor="both",
        common=common,
        clip=clip,
        basis="polar",
        spectrum="mean",
        outside=outside,
    )
    return merged | scaled(scale=scale)
