"""STAR: spectral truncation and rescaling before an average. Lee et al., NAACL 2025, arXiv:2502.10339.

    τ̂ᵢ = (Σ sᵢ / Σ_{j ≤ rᵢ} sᵢⱼ) Σ_{j ≤ rᵢ} sᵢⱼ uᵢⱼ vᵢⱼᵀ        rᵢ: fewest that hold a share η of Σ sᵢ
    θ = θ0 + λ Σ wᵢ τ̂ᵢ / k

Small singular values are noise that disturbs the other tasks; what is kept is scaled up to the whole nuclear norm.
Vectors are averaged as they are. Made for adapters of language models, and robust in η (0.4 by default).
"""

from __future__ import annotations

from weft.methods.averages import scaled
from weft.methods.params import Weight
from weft.methods.registry import method
from weft.methods.spectral import Outside, Share, spectral
from weft.methods.step import Pipeline


@method(space="deltas", paper="Lee et al., STAR, arXiv:2502.10339")
def star(
    *, weight: Weight = 1.0, nuclear: Share = 0.4, outside: Outside = "spectral", scale: float = 1.0
) -> Pipeline:
    """Keep each task's leading directions, scaled up to its whole nuclear norm, and average.

    `nuclear` is the share of Σs that is kept before the scaling, the paper's η.
    """
    merged = spectral(
        weight=weight, share=1.0, nuclear=nuclear, smooth="restore", average=True, outside=outside
    )
    return merged | scaled(scale=scale)
