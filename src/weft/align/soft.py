"""Soft permutations: doubly stochastic matrices where `reorder` has permutations, and the way back.

`Soft` maps each movable group to `[*sizes of the groups it is within, n, n]`: entry [i, j] is how much of source
unit j stands at unit i. A permutation π is the matrix with ones at [i, π(i)].
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from weft.align.assign import assigned
from weft.align.spec import Permutations, PermutationSpec
from weft.align.terms import Chain, Product, Term, groups_in, size_of

Soft: TypeAlias = Mapping[str, Tensor]


def softened(spec: PermutationSpec, permutations: Permutations, dtype: torch.dtype) -> dict[str, Tensor]:
    """Permutations as matrices."""
    return {n: torch.nn.functional.one_hot(p, p.shape[-1]).to(dtype) for n, p in permutations.items()}


def hardened(spec: PermutationSpec, soft: Soft) -> dict[str, Tensor]:
    """The permutations nearest to soft ones: the assignment of the largest sum."""
    made = {}
    for name in spec.movable:
        flat = soft[name].reshape(-1, *soft[name].shape[-2:])
        made[name] = torch.stack([assigned(m) for m in flat]).reshape(spec.shape(name))
    return made


def softly_reordered(state: Mapping[str, Tensor], spec: PermutationSpec, soft: Soft) -> dict[str, Tensor]:
    """A state dict mixed by soft permutations; gradients flow to both. What does not move is as it was."""
    return {n: _mixed(t, spec, n, soft) if n in spec.axes else t for n, t in state.items()}


def _mixed(tensor: Tensor, spec: PermutationSpec, name: str, soft: Soft) -> Tensor:
    units: dict[str, Tensor] = {}
    n = tensor.dim()
    for k, term in enumerate(spec.axes[name]):
        if term is None:
            continue
        here = torch.arange(tensor.shape[k])
        if isinstance(term, str) and term in soft and not spec.groups[term].within:
            matrix = soft[term].reshape(*[1] * k, *soft[term].shape)
        elif any(g in soft for g in groups_in(term)):
            # [earlier axes …, out, in]
            out, into = here.reshape(*[1] * k, -1, 1), here.reshape(*[1] * k, 1, -1)
            above = {g: u.reshape(*u.shape[:k], 1, 1) for g, u in units.items()}
            matrix = _matrix(term, out, into, above, spec, soft)
        else:
            matrix = None
        if matrix is not None:
            tensor = _applied(matrix.to(tensor.dtype), tensor, k, n)
        for group in groups_in(term):
            positions = _units(term, group, here, spec)
            if positions is not None:
                units[group] = positions.reshape([-1 if j == k else 1 for j in range(n)])
    return tensor


def _applied(matrix: Tensor, tensor: Tensor, axis: int, dims: int) -> Tensor:
    """Σ_i matrix[earlier axes …, o, i] · tensor[…, i, …]."""
    moved = tensor.movedim(axis, -1)
    if matrix.numel() == matrix.shape[-1] * matrix.shape[-2]:
        return (moved @ matrix.reshape(matrix.shape[-2:]).T).movedim(-1, axis)
    later = dims - 1 - axis
    matrix = matrix.reshape(*matrix.shape[:axis], *[1] * later, *matrix.shape[-2:])
    return (matrix @ moved[..., None])[..., 0].movedim(-1, axis)


def _matrix(
    term: Term, out: Tensor, into: Tensor, units: dict[str, Tensor], spec: PermutationSpec, soft: Soft
) -> Tensor:
    """Entries for output positions `out` and input positions `into`, which broadcast."""
    if isinstance(term, str):
        units[term] = out
        if term in soft:
            return soft[term][(*(units[w] for w in spec.groups[term].within), out, into)]
        return (out == into).to(_dtype(soft))
    sizes = {n: g.size for n, g in spec.groups.items()}
    if isinstance(term, Product):
        lengths = [size_of(f, sizes) or 1 for f in term.factors]
        total: Tensor | None = None
        for i, factor in enumerate(term.factors):
            stride = prod(lengths[i + 1 :])
            there, here = (x // stride % lengths[i] for x in (out, into))
            part = _matrix(factor, there, here, units, spec, soft)
            total = part if total is None else total * part
        assert total is not None
        return total
    if isinstance(term, Chain):
        start, total = 0, None
        for piece in term.parts:
            length = size_of(piece, sizes) or 0
            inside = (out >= start) & (out < start + length) & (into >= start) & (into < start + length)
            there, here = ((x - start).clamp(0, length - 1) for x in (out, into))
            part = _matrix(piece, there, here, dict(units), spec, soft) * inside
            total = part if total is None else total + part
            start += length
        assert total is not None
        return total
    return (out == into).to(_dtype(soft))


def _units(term: Term, group: str, here: Tensor, spec: PermutationSpec) -> Tensor | None:
    """The unit of `group` at each position of an axis; None where not every position has one."""
    sizes = {n: g.size for n, g in spec.groups.items()}
    if term == group:
        return here
    if isinstance(term, Product):
        lengths = [size_of(f, sizes) or 1 for f in term.factors]
        for i, factor in enumerate(term.factors):
            found = _units(factor, group, here // prod(lengths[i + 1 :]) % lengths[i], spec)
            if found is not None:
                return found
    return None


def _dtype(soft: Soft) -> torch.dtype:
    return next(iter(soft.values())).dtype
