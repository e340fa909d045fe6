"""The first pass of a merge: a step's statistic (see stats.py), gathered over one tensor or over all of them.

The tensors are read in ranges, with the steps before it done; the ranges' summaries are joined and combined, once
a round. What comes out does not depend on how the tensors were cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from weft.checkpoints.execution import execution, map_joined, own_stream, ranges
from weft.methods import by_torch
from weft.methods.held import LENGTH
from weft.methods.parts import stored_name
from weft.methods.step import Bound

if TYPE_CHECKING:
    from weft.methods.merge import Merge


def gather(merge: Merge, j: int, bound: Bound, names: Sequence[str]) -> dict[str, Any]:
    """Stream over the tensors once a round, and combine: the keywords that step j asks for."""
    stat, how = bound.step.stat, execution()
    assert stat is not None
    cut = [
        (n, a, b)
        for n in names
        for a, b in ranges(merge.info(n).numel, merge.grain(n), how.chunk * (LENGTH if merge.holds(n) else 1))
        or [(0, 0)]
    ]
    numel = sum(merge.info(n).numel for n in names)
    memo: Any = None
    hint = how.kernels.hint(merge, names, j) if how.kernels is not None else None

    def summarise(item: tuple[str, int, int]) -> Any:
        name, start, stop = item
        steps = merge.pipeline(name).steps
        if how.kernels is not None:
            fused = how.kernels.partial(merge, name, j, start, stop, memo, hint)
            if fused is not None:
                return fused
        with own_stream(how.device):
            x, base = by_torch.stack(merge, name, start, stop)
            x = by_torch.run(merge, name, x, base, start, steps[:j])
            at = replace(merge.at(name), start=start)
            return stat.partial(x, memo, bound.params, at)

    left = stat.rounds()
    while left and (memo is None or not stat.finished(memo)):
        part = map_joined(how.map, summarise, cut, stat.join, stat.needs_order)
        memo = stat.combine(part, memo, bound.params, numel)
        how.surveyed(sum((b - a) * _stored_width(merge, n) for n, a, b in cut))
        if memo is None:
            hint = None
        else:
            left -= 1
    return stat.result(memo, bound.params)


def _stored_width(merge: Merge, name: str) -> int:
    held = [s for s in merge.readers(name) if s is not None]
    return sum(s.info(stored_name(s, name)).kind.itemsize for s in held)
