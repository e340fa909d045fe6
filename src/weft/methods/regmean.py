"""Linear maps fitted to all models' outputs on their own inputs: RegMean, LOT and their kin.

    RegMean   W = (Σ wᵢ WᵢG̃ᵢ)(Σ wᵢ G̃ᵢ)⁻¹       G̃ = α G + (1 − α) diag G,  G = XᵀX/n of the layer's inputs
    LOT       Δ = (Σ wᵢ τᵢGᵢ)(Σ wᵢ Gᵢ)⁺            scales and tables, row by row: Σ wᵢgᵢτᵢ / Σ wᵢgᵢ, g = mean of x²

Jin et al., ICLR 2023, arXiv:2212.09849; LOT Merging, NeurIPS 2025. Both are the Gram solver (least_squares.py) with
measured Gram matrices. RegMean keeps the mean of the models where no model has inputs: there the published code
fails on a singular matrix (one dead input feature is enough) or, with fewer samples than inputs, returns noise. LOT
keeps the base, as its pseudo-inverse does; of all Δ that fit equally well this takes the smallest in units of each
input's size, the paper the smallest as it is (the same wherever ΣGᵢ is regular). LOT's formula was derived from its
objective, Σ ‖Xᵢ(Δ − τᵢ)‖²; a re-implementation agrees. Biases get the mean.

RegMean's α is 0.9 in the paper (0.1 for T5); re-implementations use 0.95 for CLIP and 0.6 for GPT-2. The smaller it
is, the fewer examples are enough.
"""

from __future__ import annotations

from weft.methods.averages import scaled
from weft.methods.gram import fit_inputs
from weft.methods.least_squares import Normalize, Weights
from weft.methods.params import Fraction, NonNegative
from weft.methods.registry import method
from weft.methods.step import Pipeline


@method(
    space="weights",
    base="optional",
    paper="Jin et al., Dataless knowledge fusion by merging weights of language models, arXiv:2212.09849",
    needs=("gram",),
)
def regmean(
    *,
    weight: Weights = 1.0,
    off_diagonal: Fraction = 0.9,
    ridge: NonNegative = 0.0,
    normalize: Normalize = "none",
) -> Pipeline:
    """For every linear map the one whose outputs are nearest to all models' on each model's own inputs.

    Needs `weft measure --what gram` of every model. `off_diagonal` is the paper's α. `ridge` pulls towards the
    mean, relative to the mean eigenvalue. A base changes nothing, but for rounding.
    """
    return fit_inputs(weight=weight, off_diagonal=off_diagonal, ridge=ridge, normalize=normalize)


@method(space="deltas", paper="LOT Merging: layer-wise task vector fusion, NeurIPS 2025", needs=("gram",))
def lot(*, weight: Weights = 1.0, ridge: NonNegative = 0.0, scale: float = 1.0) -> Pipeline:
    """The change of every layer whose outputs are nearest to all task vectors' on each task's own inputs.

    Needs `weft measure --what gram` of every model (16 to 64 unlabelled examples are reported to do). Tables, and
    scales of norms, are fitted row by row.
    """
    fitted = fit_inputs(weight=weight, ridge=ridge, keep="zero", diagonal=True)
    return fitted | scaled(scale=scale)
