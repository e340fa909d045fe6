"""Model merging by uncertainty-based gradient matching. Daheim et al. 2024, arXiv:2310.12808.

    θ = θ0 + Σ αₜ H̄⁻¹ (Hₜ + H0 + δ0) (θₜ − θ0)         H̄ = Σ αₜHₜ + H0 + δ0
    Hₜ = sₜFₜ,  H0 = s0F0                              diagonal; F = mean over examples of (∂ log p / ∂θ)², s = size

The Hessian is that of the whole loss, a sum over the data, so Fisher information (a mean) is multiplied with the
number of examples; the prior δ0 must be small beside it. Without Hₜ this is task arithmetic with λ = 1, without
H0 and δ0 Fisher averaging. A negative α removes a task. Without one no gain αₜ H̄⁻¹ (Hₜ + H0 + δ0) exceeds 1 + αₜ;
with one H̄ may come near zero, so 1 + |αₜ| is a bound here, and entries with H̄ ≤ 0 are those of task arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft.errors import UsageError
from weft.late import Tensor, torch
from weft.methods.averages import weighted_sum
from weft.methods.params import NonNegative, Weight, per_model
from weft.methods.registry import method
from weft.methods.step import Pipeline, step


def sizes(size: float | Sequence[float] | None, samples: Tensor | None, k: int) -> list[float]:
    """sₜ of k models: as given, else the number of examples that were measured."""
    if size is not None:
        return per_model(size, k, "size")
    if samples is None:
        raise UsageError("ubgm needs the size of the data: the statistics do not tell, so give size")
    return [float(s) for s in samples.reshape(-1)]


@step(needs=("fisher", "fisher_samples?", "base_fisher?", "base_fisher_samples?"), reduces=True)
def match_gradients(
    x: Tensor,
    *,
    fisher: Tensor | None,
    fisher_samples: Tensor | None,
    base_fisher: Tensor | None,
    base_fisher_samples: Tensor | None,
    weight: Weight = 1.0,
    size: Weight | None = None,
    base_size: NonNegative | None = None,
    delta: NonNegative = 1e-12,
) -> Tensor:
    """Σ αₜ (Hₜ + H0 + δ0) xₜ / H̄ over task vectors x: [k, *shape] → [*shape]; Σ αₜxₜ where nothing was measured."""
    if fisher is None:
        return weighted_sum.fn(x, weight=weight)
    alpha = per_model(weight, x.shape[0])
    s = sizes(size, fisher_samples, x.shape[0])
    h = [f.to(x) * st for f, st in zip(fisher, s, strict=True)]
    prior: Tensor | float = delta
    if base_fisher is not None:
        prior = base_fisher.to(x) * sizes(base_size, base_fisher_samples, 1)[0] + delta
    below = torch.zeros_like(x[0]) + prior
    for ht, a in zip(h, alpha, strict=True):
        below = below + ht * a
    known = below > 0
    out = torch.zeros_like(x[0])
    for xt, ht, a in zip(x, h, alpha, strict=True):
        gain = torch.where(known, (ht + prior) / torch.where(known, below, 1.0), 1.0) * a
        out = out + xt * gain.clamp(-1 - abs(a), 1 + abs(a))
    return out


@method(
    space="deltas",
    paper="Daheim et al., Model merging by uncertainty-based gradient matching, arXiv:2310.12808",
    needs=("fisher", "fisher_samples?", "base_fisher?", "base_fisher_samples?"),
)
def ubgm(
    *,
    weight: Weight = 1.0,
    size: Weight | None = None,
    base_size: NonNegative | None = None,
    delta: NonNegative = 1e-12,
) -> Pipeline:
    """Add up task vectors, each entry scaled by how sure its own task is of it.

    Needs `weft measure --what fisher` of every model, and takes the base's. `size` is the number of training
    examples of each task (by default, of those measured), `base_size` that of the base.
    """
    return match_gradients(weight=weight, size=size, base_size=base_size, delta=delta)
