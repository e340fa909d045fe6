"""`Kernels`: merges and statistics through fused loops, and through torch where a step has no emitter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.checkpoints.bits import Array, Bits
from weft.checkpoints.dtypes import F32, F64, DType, round_to
from weft.checkpoints.execution import TILE, execution
from weft.engine.kernels.emit import SUMS, Body
from weft.engine.kernels.generate import RAW, Source
from weft.engine.kernels.objects import kernel
from weft.engine.kernels.work import Range, array_of, fusable, nonfinite
from weft.late import Tensor, torch
from weft.methods.counting import Counted, reach
from weft.methods.stats import Gram, Select, Sums, pairs
from weft.methods.step import Bound

if TYPE_CHECKING:
    from weft.methods.merge import Merge

TRANSPARENT = ("weighted_sum", "scaled")
"""Steps whose result is not finite where an entry of any model isn't: even a weight of zero makes it NaN."""
FEW_DIGITS = 5
"""Up to so many upper halves are counted by comparing; more by a table."""
_STORED = (*RAW, F32, F64)
"""Dtypes a kernel writes itself."""


_ROUND = """\
from weft.engine.kernels.primitives import to_{kind}


def kernel(x, out):
    for s in range(0, x.shape[0], 1024):  # of slices the compiler sees that no index is negative
        part, to = x[s : s + 1024], out[s : s + 1024]
        for i in range(part.shape[0]):
            to[i] = to_{kind}(part[i])
"""


class Kernels:
    """Fused execution of one save. Holds nothing, so threads share it."""

    def merge(self, node: Merge, name: str, start: int, stop: int, dtype: DType | None) -> Bits | None:
        """The merged range, rounded to `dtype` (float64 without one); None where torch must do it."""
        steps = node.pipeline(name).steps
        if node.measured is not None:  # what was measured reaches only steps in torch
            return None
        # where a first pass has read everything, it has looked for NaN too; a sum shows those of its terms
        shows = all(b.step.name in TRANSPARENT for b in steps)
        unread = not any(b.step.stat for b in steps)
        work = Range.read(node, name, start, stop)
        if work is None:
            return None
        if unread and not shows:
            work.refuse_nonfinite()
        tail = len(steps) - fusable(tuple(reversed(steps)))  # from here on all steps have emitters
        work.advance(tail)
        out = Bits.empty(stop - start, dtype if dtype is not None and dtype in _STORED else F64)
        _apply(work, len(steps), out)
        if unread and shows and nonfinite(out):
            work.refuse_nonfinite()
        return out if dtype is None or dtype == out.dtype else Bits.of(round_to(out.tensor(), dtype.torch))

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor | None:
        """float64 rounded once to a dtype that kernels write as bits; None for others."""
        kind = DType.of(dtype)
        if kind not in RAW:
            return None
        out = Bits.empty(values.numel(), kind)
        kernel(_ROUND.format(kind=RAW[kind]))(Bits.of(values).array, array_of(out))
        return out.tensor().reshape(values.shape)

    def hint(self, node: Merge, names: Sequence[str], j: int) -> Array | None:
        """Where step j's order statistics nearly surely are, from a few tiles: upper halves `[k, q, 2]`."""
        bound = node.pipeline(names[0]).steps[j]
        stat = bound.step.stat
        if type(stat) is not Select or stat.value is not None:
            return None
        if node.measured is not None or any(node.grain(n) > 1 or node.info(n).numel > 1 << 32 for n in names):
            return None
        numel = sum(node.info(n).numel for n in names)
        # tiles evenly spread over all tensors together
        every = max(TILE, numel // min(max(numel // TILE // 32, 8), 512))
        counts, seen, begin = np.zeros((0,)), 0, 0
        # without steps before it, it does not matter where a value lies: tiles are counted together
        together = max(1, execution().chunk // TILE) if j == 0 else 1
        for name in names:
            size = node.info(name).numel
            tiles = range(-begin % every // TILE * TILE, size, every // TILE * TILE)
            cut = [(start, min(start + TILE, size)) for start in tiles]
            begin += size
            for i in range(0, len(cut), together):
                work = Range.sampled(node, name, cut[i : i + together])
                work.advance(j - fusable(tuple(reversed(node.pipeline(name).steps[:j]))))
                part = _uppers(work, j)
                counts = np.add(counts, part, out=counts) if seen else part
                seen += len(work.stack[0])
        return _bracket(counts, stat, bound, seen, numel) if seen else None

    def partial(
        self, node: Merge, name: str, j: int, start: int, stop: int, memo: Any, hint: Array | None
    ) -> Any:
        """Step j's statistic of a range; None where torch must do it."""
        if node.measured is not None:
            return None
        bound = node.pipeline(name).steps[j]
        stat = bound.step.stat
        simple = type(stat) is Gram or (type(stat) is Select and stat.value is None)
        summed = type(stat) is Sums and bound.step.name in SUMS
        work = Range.read(node, name, start, stop) if simple or summed else None
        if work is None:
            return None
        work.advance(j - fusable(tuple(reversed(node.pipeline(name).steps[:j]))))
        if summed:
            emit = SUMS[bound.step.name]
            found = _sums(work, j, len(work.stack) * 2, lambda body: emit(body, bound.params, work.at))
        elif type(stat) is Gram:
            found = _gram(work, j)
        elif memo is not None:
            return _lowers(work, j, memo)
        else:
            return _uppers(work, j) if hint is None else _counted(work, j, hint)
        if not np.isfinite(found).all():  # every value is in a sum, so each that is not finite shows
            work.refuse_nonfinite()
        return found


def _apply(work: Range, upto: int, out: Bits) -> None:
    """Do the steps and round the result into `out`, plus the base where there is one."""
    raw = RAW.get(out.dtype, "")

    def finish(source: Source) -> str:
        value = source.body.values[0]
        if work.base is not None:
            if work.lifted:  # the differences were formed before; the base comes in again here
                source.add_base(RAW.get(work.base.dtype, ""))
            value = f"base + {value}"
        source.sliced.append("out")
        return source.finish(["out"], [f"out_[j] = to_{raw}({value})" if raw else f"out_[j] = {value}"])

    program = work.program(("apply", raw, work.base is None), upto, finish)
    program.run(work, array_of(out))


def _gram(work: Range, upto: int) -> Array:
    """Gram.partial: [tiles, k(k+1)/2]."""
    k, n = len(work.stack), len(work.stack[0])

    def finish(source: Source) -> str:
        bufs = [source.body.block(f"buf{i}", "float64") for i in range(k)]
        return source.finish(
            ["out"],
            [f"{buf}[j] = {v}" for buf, v in zip(bufs, source.body.values, strict=True)],
            [f"out[s // {TILE}, {c}] += dot({bufs[i]}, {bufs[j]}, m)" for c, (i, j) in enumerate(pairs(k))],
        )

    out = np.zeros((max(1, -(-n // TILE)), len(pairs(k))), np.float64)
    work.program("gram", upto, finish).run(work, out)
    return out


def _sums(work: Range, upto: int, m: int, quantities: Callable[[Body], list[str]]) -> Array:
    """Sums.partial of m quantities: [tiles, m]."""
    n = len(work.stack[0])

    def finish(source: Source) -> str:
        bufs = [source.body.block(f"buf{c}", "float64") for c in range(m)]
        return source.finish(
            ["out"],
            [f"{buf}[j] = {q}" for buf, q in zip(bufs, quantities(source.body), strict=True)],
            [f"out[s // {TILE}, {c}] += total({buf}, m)" for c, buf in enumerate(bufs)],
        )

    out = np.zeros((max(1, -(-n // TILE)), m), np.float64)
    work.program(("sums", m), upto, finish).run(work, out)
    return out


def _bracket(counts: Array, stat: Select, bound: Bound, seen: int, numel: int) -> Array:
    """Upper halves `[k, q, 2]` between which the wanted ranks nearly surely lie; counts: [k, 1, digits]."""
    k, digits = counts.shape[0], counts.shape[-1]
    above = counts[..., ::-1].cumsum(-1)  # from the largest digit down, [k, 1, digits]
    share = np.array(stat.ranks(bound.params, k, numel)).clip(1, numel) / numel  # [k, q]
    # values that lie together are alike, so a sample in tiles tells less than its length
    slack = 8 * np.sqrt(share * (1 - share) * seen) + 2
    high, low = (reach(above, (share * seen + d).clip(1, seen).astype(np.int64))[0] for d in (-slack, slack))
    return np.stack([digits - 1 - low, digits - high], -1).clip(0, digits)


def _keyed(work: Range, extra: Sequence[str], after: Sequence[str]) -> Callable[[Source], str]:
    """A kernel that makes the keys of a block, `keys0` and so on, and does `after` with them."""

    def finish(source: Source) -> str:
        values, loads = source.body.values, None
        if not source.body.lines and all(x.dtype.itemsize < 8 for x in work.stack):  # bare differences
            loads = source.short_loads()
            values = [f"f{i}" for i in range(len(work.stack))]
        keys = [source.body.block(f"keys{i}", "uint32") for i in range(len(work.stack))]
        lines = [
            f"{key}[j] = np.float32(abs({v})).view(np.uint32)" for key, v in zip(keys, values, strict=True)
        ]
        return source.finish(extra, lines, after, loads)

    return finish


def _look(work: Range) -> tuple[Array, list[str]]:
    """A first pass looks for NaN and infinity too: where it notes them, and how."""
    k = len(work.stack)
    return np.zeros(k, np.int64), [f"odd[{i}] += unbounded(keys{i}, m)" for i in range(k)]


def _uppers(work: Range, upto: int) -> Array:
    """Select.partial's first round: counts of upper halves [k, 1, digits]."""
    k, (odd, look) = len(work.stack), _look(work)
    table = np.zeros((k, 1, 1 << 15), np.int32)  # a range is shorter than 2**31
    after = look + [f"count_upper(keys{i}, m, out[{i}, 0])" for i in range(k)]
    work.program("upper", upto, _keyed(work, ["out", "odd"], after)).run(work, table, odd)
    if odd.any():
        work.refuse_nonfinite()
    return table


def _lowers(work: Range, upto: int, memo: Any) -> Array:
    """Its second: counts of lower halves below the prefixes found, [k, q, digits]."""
    prefix = memo["prefix"].astype(np.uint32)  # [k, q]
    (k, q), every = prefix.shape, list(np.ndindex(prefix.shape))
    lower = np.zeros((k, q, 1 << 16), np.int64)
    after = [f"count_lower(keys{i}, m, prefix[{i}, {c}], out[{i}, {c}])" for i, c in every]
    work.program(("lower", q), upto, _keyed(work, ["prefix", "out"], after)).run(work, prefix, lower)
    return lower


def _counted(work: Range, upto: int, hint: Array) -> Counted:
    """Both in one, given where the wanted magnitudes are likely to be."""
    (k, q, _), (odd, look) = hint.shape, _look(work)
    few = int((hint[..., 1] - hint[..., 0]).max()) <= FEW_DIGITS
    every = list(np.ndindex(k, q))
    rest, kept = np.empty((k, q, len(work.stack[0]) // 8 + 1), np.uint32), np.zeros((k, q), np.int64)
    after = look + [
        f"kept[{i}, {c}] = keep_long(keys{i}, m, bracket[{i}, {c}], rest[{i}, {c}], kept[{i}, {c}])"
        for i, c in every
    ]
    if few:
        out = np.zeros((k, q, 1 + FEW_DIGITS), np.int32)  # a range is shorter than 2**31
        after += [f"tally(keys{i}, m, bracket[{i}, {c}], out[{i}, {c}])" for i, c in every]
    else:
        out = np.zeros((k, 1, 1 + (1 << 15)), np.int32)
        after += [f"count_upper(keys{i}, m, out[{i}, 0, 1:])" for i in range(k)]
    made = _keyed(work, ["bracket", "out", "rest", "kept", "odd"], after)
    program = work.program(("counted", few, q), upto, made)
    program.run(work, hint.astype(np.uint32), out, rest, kept, odd)
    if odd.any():
        work.refuse_nonfinite()
    first = hint[..., 0] if few else np.zeros((k, 1), np.int64)
    if kept.max() > rest.shape[-1]:
        return Counted(out, first, hint, None)
    return Counted(out, first, hint, tuple((rest[i, c, : kept[i, c]].copy(),) for i, c in every))
