"""Whether statistics are those of the models of a merge: how many, which kinds, names, shapes, fingerprints.

All of it is said before a weight is merged, and every problem of the data at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from weft.errors import DataError, DataProblems, UsageError
from weft.methods.fingerprint import Fingerprint, mismatches
from weft.methods.kinds import ABOUT, ELEMENTWISE, Need

if TYPE_CHECKING:
    from weft.methods.measured import Measured
    from weft.methods.merge import Merge


def check_given(merge: Merge, measured: Measured) -> None:
    """UsageError unless the merge is given the statistics that its method needs, and no others."""
    who, k, given = merge.method.name, len(merge.models), len(measured.models)
    kinds = dict.fromkeys(n.kind for n in measured.needs if not n.of_base and not n.optional)
    of_base = dict.fromkeys(n.kind for n in measured.needs if n.of_base and not n.optional)
    if kinds and not given:
        raise UsageError(
            f"{who} needs statistics of every model ({', '.join(kinds)}): make them with weft measure, and give "
            f"them in the order of the models"
        )
    if of_base and measured.base is None:
        raise UsageError(
            f"{who} needs statistics of the base ({', '.join(of_base)}): make them with weft measure, and give "
            f"them as base_statistics"
        )
    if given and all(n.of_base for n in measured.needs):
        raise UsageError(f"{who} takes no statistics of the models, but some are given")
    if measured.base is not None and not any(n.of_base for n in measured.needs):
        raise UsageError(f"{who} takes no statistics of the base, but some are given")
    if measured.base is not None and merge.base is None:
        raise UsageError(f"{who} is given statistics of a base, but no base")
    if given and given != k:
        raise UsageError(f"there are {k} models, and statistics of {given}: give one a model, in their order")


def check_fit(merge: Merge, measured: Measured) -> None:
    """DataProblems for everything that names, shapes and fingerprints say against these statistics."""
    problems: list[str] = []
    for name in merge.merged_names():
        part = merge.part(name)
        for need in merge.declared(name).needs:
            if need.tensorwise:
                problems += _problems(measured, need, name, part.info.shape, part.sources)
    models = [*merge.models[: len(measured.models)], merge.base]
    for statistics, model in zip(measured.all, models, strict=False):
        assert model is not None
        others = [m for m in merge.inputs if m is not model]
        told = (statistics.config or {}).get(ABOUT, {}).get("model")
        problems += mismatches(statistics.origin, Fingerprint.read(told), model, others)
    if problems:
        raise DataProblems("these statistics are not those of the models: measure them again", problems)
    names = merge.merged_names()
    empty = dict.fromkeys(
        n.kind
        for n in measured.needs
        if (not n.optional or n.of_base)
        and measured.asked(n)
        and not any(measured.holders(n, m) for m in names)
    )
    if names and empty:
        whose = ", ".join(dict.fromkeys(s.origin for s in measured.all))
        raise DataError(
            f"{whose}: no {' and no '.join(empty)} of any merged tensor: measure with --what {','.join(empty)}"
        )


def _problems(
    measured: Measured, need: Need, name: str, shape: tuple[int, ...], sources: Sequence[int]
) -> list[str]:
    """What is wrong with one statistic of one tensor."""
    holders, asked = measured.holders(need, name, sources), measured.asked(need, sources)
    if not holders:
        return []
    if len(holders) < len(asked):
        without = [measured.all[i].origin for i in asked if not measured.has(i, need.kind, name)]
        return [f"{need.kind} of {name}: not in {', '.join(without)}, but in {holders[0][0].origin}"]
    shapes = [(s.origin, s.info(key).shape) for s, key in holders]
    if len({found for _, found in shapes}) > 1:
        return [f"{need.kind} of {name}: shapes differ: {', '.join(f'{list(v)} in {o}' for o, v in shapes)}"]
    problem = _misshapen(need.kind, shapes[0][1], shape, measured.transposed(name))
    return [f"{need.kind} of {name} in {shapes[0][0]}: {problem}"] if problem else []


def _misshapen(kind: str, got: tuple[int, ...], weight: tuple[int, ...], transposed: bool) -> str:
    """Why a statistic cannot be one of a weight of this shape; an empty string if it can."""
    if kind in ELEMENTWISE:
        return "" if got == weight else f"shape {list(got)}, but the weight has {list(weight)}"
    if kind == "node" and weight:
        outputs = weight[-1] if transposed else weight[0]
        return "" if len(got) == 1 and got[0] and outputs % got[0] == 0 else (
            f"shape {list(got)}, but the weight has {outputs} outputs")  # fmt: skip
    if not weight or not got:
        return f"shape {list(got)} for a weight of shape {list(weight)}"
    ends = {weight[0], prod(weight[:2])} if len(weight) > 2 else {weight[0]}
    misfit = f"shape {list(got)}, which does not fit a weight of shape {list(weight)}"
    if kind in ("mean", "abs_mean", "gram", "kfac_a"):
        matrix = kind in ("gram", "kfac_a") and len(got) > 1
        if kind in ("gram", "kfac_a") and not matrix:
            return "" if got[0] == weight[0] else f"{got[0]} rows, but the table has {weight[0]}"
        blocks = prod(got[: -2 if matrix else -1])
        fits = blocks * got[-1] in ends if transposed else got[-1] in {prod(weight[1:]), weight[-1]}
        return "" if fits and (not matrix or got[-1] == got[-2]) else misfit
    if kind == "kfac_g":
        fits = got[-1] == weight[-1] if transposed else prod(got[:-2]) * got[-1] in ends
        return "" if len(got) > 1 and got[-1] == got[-2] and fits else misfit
    return ""
