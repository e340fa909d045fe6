"""DC-Merge: merge the tasks' cores in directions that cover all of them. CVPR 2026, arXiv:2603.06242.

    τᵢ ≈ Uᵢ diag(sᵢ) Vᵢᵀ            ⌊p/T⌋ triplets; sᵢ as they are, at their mean, or on a line
    Ū = polar([U₁ … U_T]),  V̄ = polar([V₁ … V_T])                                 the cover
    Mᵢ = Ūᵀ Uᵢ diag(sᵢ) Vᵢᵀ V̄       of each the largest entries
    θ = θ0 + α Ū (TIES mean of the Mᵢ, in T diagonal blocks) V̄ᵀ

Settings of the solver of methods/spectral.py. The smoothing is that of the paper's experiments on adapters; fully
fine-tuned vision models go without. A line keeps Σs and is used where s₁/sᵣ exceeds `ratio`. A task's own triplets
are always kept, without which small matrices would keep none; where the cover is dependent, coordinates are taken
along unit vectors. So identical experts give the expert.
"""

from __future__ import annotations

from typing import Literal

from weft.methods.averages import scaled
from weft.methods.params import Fraction, Weight
from weft.methods.registry import method
from weft.methods.spectral import AtLeastOne, Clip, spectral
from weft.methods.step import Pipeline


@method(space="deltas", paper="DC-Merge, arXiv:2603.06242")
def dc_merge(
    *,
    weight: Weight = 1.0,
    smooth: Literal["none", "mean", "linear"] = "none",
    ratio: AtLeastOne = 5.0,
    density: Fraction = 0.001,
    clip: Clip = "numerical",
    scale: float = 1.0,
) -> Pipeline:
    """Project every task into common directions, elect signs there, average what agrees.

    `smooth="linear"` or `"mean"` evens out each task's singular values first, as for adapters.
    """
    merged = spectral(
        weight=weight, smooth=smooth, ratio=ratio, density=density, clip=clip, basis="polar", core="ties"
    )
    return merged | scaled(scale=scale)
