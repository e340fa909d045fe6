"""From scores of pairs of units to permutations and maps, group by group, nested groups from the inside out.

`score(group)` is [n, m] (made by given; larger is more alike), for a group within others [o, p, …, n, m] for every
pair of their units, or None where a group shows only in those within it. A pair of heads is worth what the best
matching of their dimensions is worth.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from weft.align.plans import assigned, gained
from weft.align.spec import PermutationSpec, _grid

Score = Callable[[str], Tensor | None]


def total(spec: PermutationSpec, group: str, score: Score, known: Mapping[str, Tensor]) -> Tensor | None:
    """Scores of a group's pairs with those of the groups within it."""
    found = score(group)
    mine = (*spec.groups[group].within, group)
    nested = spec.inner(group)
    for inner in nested:
        if any(inner in spec.inner(between) for between in nested):
            continue  # counted with the group that it is within
        theirs = spec.groups[inner].within
        s = total(spec, inner, score, known)
        if s is None:
            continue
        value = _summed(spec, gained(s), theirs, mine, known)
        found = value if found is None else found + value
    return found


def _summed(
    spec: PermutationSpec, value: Tensor, theirs: tuple[str, ...], mine: tuple[str, ...],
    known: Mapping[str, Tensor],
) -> Tensor:  # fmt: skip
    """Sums over groups that are not asked about, paired as they are matched now; pairs in the order of `mine`."""
    for k, w in reversed(list(enumerate(theirs))):
        if w not in mine:
            pairing = known.get(w, torch.arange(spec.groups[w].size))
            pairing = pairing.reshape(-1, pairing.shape[-1])[0]
            value = value.movedim((2 * k, 2 * k + 1), (-2, -1))[..., torch.arange(len(pairing)), pairing].sum(
                -1
            )
    kept = [w for w in theirs if w in mine]
    order = [2 * kept.index(w) + side for w in mine for side in (0, 1)]
    return value.permute(*order)


def at_pairs(
    spec: PermutationSpec, group: str, scores: Tensor, known: Mapping[str, Tensor],
    made: Mapping[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """[o, p, …, n, m] → [o, …, n, m]: only the pairs of outer units that are matched, by `known` and by `made`
    (the identity) for the two sides."""
    within = spec.groups[group].within
    if not within:
        return scores
    sides = [_grid(spec, within, order) for order in (made or {}, known)]
    return scores[tuple(x for pair in zip(*sides, strict=True) for x in pair)]


def permutations(
    spec: PermutationSpec, score: Score, groups: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The best permutation of every group by its scores; outer groups first. Groups without scores stay."""
    known: dict[str, Tensor] = {}
    for group in spec.movable if groups is None else groups:
        scores = total(spec, group, score, known)
        if scores is not None:
            known[group] = assigned(at_pairs(spec, group, scores, known))
    return known
