"""`cca_merge`: features aligned by canonical correlation, which mixes units (Horoi et al., arXiv:2407.05385).

    M = S_BB^{-1/2} V Uᵀ S_AA^{1/2},   U Σ Vᵀ = S_AA^{-1/2} S_AB S_BB^{-1/2}

brings activations of B, as rows, to those of A. Where B writes it is multiplied by Mᵀ, where B reads by M^{-T}.
The maps do not commute with activation functions, so B itself computes something else afterwards; the mean of both
works. BatchNorm's statistics have to be measured anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from weft.align.activations import Activations, Watch, activations
from weft.align.correlate import Alignment, matched
from weft.align.maps import Mix
from weft.align.networks import Net, comparable, opened
from weft.align.solving import at_pairs
from weft.align.spec import PermutationSpec
from weft.align.terms import groups_in
from weft.api import Model
from weft.errors import UsageError
from weft.statistics.batches import Data, Forward

TINY = 1e-6
"""Of gamma: how much the permutation by correlation counts, so that it decides where nothing varies."""


def cca_merge(
    model: Model, to: Model, data: Data, *, gamma: float = 0.1, module: nn.Module | None = None,
    spec: PermutationSpec | None = None, watch: Watch = "read", samples: int | None = None,
    forward: Forward | None = None,
) -> Alignment:  # fmt: skip
    """Maps `model` into the space of `to` by canonical correlation; `.merged()` is the mean of both.

    `gamma` is added to the variances (of activations as they are): without it directions that hardly vary explode.
    Units that no linear map reads (queries and keys), groups that hold others (heads), and tensors that are tied
    are permuted by correlation instead.
    """
    if not gamma > 0:
        raise UsageError(f"gamma must be above 0, not {gamma}: without it what hardly varies explodes")
    target, source = opened([to, model], data, module=module, spec=spec, forward=forward)
    comparable([target, source], same_size="CCA merging")
    found = activations([target, source], data, watch=watch, samples=samples)
    order = matched(found, "correlation")
    mixable = mixing_groups(source)
    maps = {g: _map(found, g, order, gamma) for g in order if g in mixable}
    return Alignment(target, source, {g: p for g, p in order.items() if g not in maps}, maps)


def mixing_groups(net: Net) -> set[str]:
    """Groups whose units may be mixed: they hold no others, a linear map reads them, and no tied tensor does."""
    spec = net.spec
    read = {g for n, k in net.reads if n in spec.axes for g in groups_in(spec.axes[n][k])}
    return (read - net.both) & {g for g in spec.movable if not spec.inner(g)}


def _map(found: Activations, group: str, order: dict[str, Tensor], gamma: float) -> Mix:
    """The maps of one group, for each unit of those it is within as they are matched."""
    target, source = found.nets
    sides: list[dict[str, Tensor]] = [{}, order]

    def block(i: int, j: int) -> Tensor:
        s = found.cross(group, i, j, "covariance")
        assert s is not None
        return at_pairs(target.spec, group, s, sides[j], sides[i])

    n = source.sizes[group]
    ridge = gamma * torch.eye(n, dtype=torch.float64)
    hint = (TINY * gamma) * torch.nn.functional.one_hot(order[group], n)
    aa, bb, ab = block(0, 0) + ridge, block(1, 1) + ridge, block(0, 1) + hint
    a_half, a_back = _roots(aa)
    b_half, b_back = _roots(bb)
    u, _, vt = torch.linalg.svd(a_back @ ab @ b_back)
    m = b_back @ vt.mT @ u.mT @ a_half
    return Mix(m.mT.contiguous(), a_back @ u @ vt @ b_half)


def _roots(s: Tensor) -> tuple[Tensor, Tensor]:
    """S^{1/2} and S^{-1/2} of symmetric S > 0."""
    values, vectors = torch.linalg.eigh(s)
    root = values.clamp_min(1e-300).sqrt()[..., None, :]
    return (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
