"""`Kernels`: merges and statistics through fused loops, and through torch where a step has no emitter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.checkpoints.dtypes import round_to
from weft.checkpoints.execution import TILE
from weft.engine.kernels.emit import EMITTERS, SUMS, Body
from weft.engine.kernels.generate import SPAN, Source
from weft.engine.kernels.objects import Kernel, kernel
from weft.methods.dare import ratios
from weft.methods.params import per_model
from weft.methods.random import stream_key
from weft.methods.stats import Counted, Gram, Select, Sums, pairs
from weft.methods.step import At, Bound, row_length

if TYPE_CHECKING:
    from weft.methods.merge import Merge

THINNING = ("thin", "thin_keep_l1")
"""Steps that primitives.thin_rows does: they sort rows, which no loop over single values can."""
TRANSPARENT = ("weighted_sum", "scaled")
"""Steps whose result is not finite where an entry of any model isn't: even a weight of zero makes it NaN."""
FEW_DIGITS = 5
"""Up to so many upper halves are counted by comparing; more by a table."""
_STORED = (torch.bfloat16, torch.float32, torch.float64)
"""Dtypes a kernel writes itself."""


class Kernels:
    """Fused execution of one save. Holds nothing, so threads share it."""

    def merge(
        self, node: Merge, name: str, start: int, stop: int, dtype: torch.dtype | None
    ) -> Tensor | None:
        """The merged range, rounded to `dtype` (float64 without one); None where torch must do it."""
        steps = node.pipeline(name).steps
        if node.measured is not None:  # what was measured reaches only steps in torch
            return None
        # where a first pass has read everything, it has looked for NaN too; a sum shows those of its terms
        shows = all(b.step.name in TRANSPARENT for b in steps)
        unread = not any(b.step.stat for b in steps)
        work = _Range.read(node, name, start, stop, check=unread and not shows)
        if work is None:
            return None
        tail = len(steps) - _fusable(tuple(reversed(steps)))  # from here on all steps have emitters
        work.advance(tail)
        out = torch.empty(stop - start, dtype=dtype if dtype in _STORED else torch.float64)
        _apply(work, len(steps), out)
        if unread and shows and _nonfinite(out):
            work.refuse_nonfinite()
        return out if dtype is None or dtype == out.dtype else round_to(out, dtype)

    def hint(self, node: Merge, names: Sequence[str], j: int) -> Tensor | None:
        """Where step j's order statistics nearly surely are, from a few tiles: upper halves `[k, q, 2]`."""
        bound = node.pipeline(names[0]).steps[j]
        stat = bound.step.stat
        if type(stat) is not Select or stat.value is not None:
            return None
        if any(node.grain(n) > 1 or node.info(n).numel > 1 << 32 for n in names):
            return None
        numel = sum(node.info(n).numel for n in names)
        # tiles evenly spread over all tensors together
        every = max(TILE, numel // min(max(numel // TILE // 32, 8), 512))
        counts, seen, begin = None, 0, 0
        for name in names:
            size = node.info(name).numel
            for start in range(-begin % every // TILE * TILE, size, every // TILE * TILE):
                part = self.partial(node, name, j, start, min(start + TILE, size), None, None)
                if part is None:
                    return None
                counts = part if counts is None else counts + part
                seen += min(TILE, size - start)
            begin += size
        return None if counts is None else _bracket(counts, stat, bound, seen, numel)

    def partial(
        self, node: Merge, name: str, j: int, start: int, stop: int, memo: Any, hint: Tensor | None
    ) -> Any:
        """Step j's statistic of a range; None where torch must do it."""
        if node.measured is not None:
            return None
        bound = node.pipeline(name).steps[j]
        stat = bound.step.stat
        simple = type(stat) is Gram or (type(stat) is Select and stat.value is None)
        summed = type(stat) is Sums and (bound.step.name in SUMS or bound.step.name in THINNING)
        work = _Range.read(node, name, start, stop, check=memo is None) if simple or summed else None
        if work is None:
            return None
        if bound.step.name in THINNING:
            work.advance(j)
            return _thinned_masses(work, bound)
        work.advance(j - _fusable(tuple(reversed(node.pipeline(name).steps[:j]))))
        if summed:
            emit = SUMS[bound.step.name]
            return _sums(work, j, len(work.stack) * 2, lambda body: emit(body, bound.params, work.at))
        if type(stat) is Gram:
            return _gram(work, j)
        return _counts(work, j, memo, hint)


@dataclass
class _Range:
    """A range of one tensor on its way through the pipeline."""

    node: Merge
    name: str
    at: At
    base: Tensor | None
    stack: list[Tensor]
    """One tensor a model, as stored; after `advance`, float64 task vectors."""
    done: int = 0
    """Steps done so far."""
    lifted: bool = False
    """Whether the stack holds float64 task vectors rather than what is stored."""
    reduced: bool = False

    @classmethod
    def read(cls, node: Merge, name: str, start: int, stop: int, check: bool) -> _Range | None:
        """Read the inputs; None for ranges that kernels don't take (empty, or across 2**32)."""
        if stop == start or (start >> 32) != ((stop - 1) >> 32):
            return None
        inputs, base = node.values(name, start, stop)
        work = cls(node, name, replace(node.at(name), start=start), base, inputs)
        if check:
            work.refuse_nonfinite()
        return work

    def refuse_nonfinite(self) -> None:
        """DataError if an input has NaN or infinite values, unless they are allowed."""
        if self.node.nonfinite == "error":
            for values, source in zip([*self.stack, self.base], self.node.readers(self.name), strict=True):
                if values is not None and source is not None and _nonfinite(values):
                    self.node.refuse_nonfinite(self.name, source)

    def advance(self, upto: int) -> None:
        """Do the steps before `upto`: fused where they have emitters, else in torch."""
        steps = self.node.pipeline(self.name).steps
        while self.done < upto:
            run = _fusable(steps[self.done : upto])
            if run or not self.lifted:
                reduced = self.reduced_by(self.done + run)
                self.lift(self.done + run)
                self.reduced = reduced
                self.done += run
            if self.done < upto:
                self._in_torch(steps[self.done])
                self.done += 1

    def lift(self, upto: int) -> None:
        """The stack as float64 task vectors, with the steps up to `upto` done."""
        self.stack = list(_stacked(self, upto))
        self.lifted = True

    def program(self, purpose: object, upto: int, finish: Callable[[Source], str]) -> Program:
        """The program that loads the stack, does the steps from `done` to `upto` and what `finish` adds.

        It is the same for all ranges of a tensor, so it is kept until the tensor is done.
        """
        kept = self.node.remembered(self.name)
        stored = tuple(None if x is None else x.dtype for x in (*self.stack, self.base))
        key = (purpose, self.done, upto, self.at.start >> 32, self.lifted, stored)
        found: Program | None = kept.get(key)
        if found is None:
            source = self.source(upto)
            found = kept[key] = Program.of(source, finish(source))
        return found

    def reduced_by(self, upto: int) -> bool:
        """Whether the steps before `upto` leave one tensor of the models."""
        return self.reduced or any(
            b.step.reduces for b in self.node.pipeline(self.name).steps[self.done : upto]
        )

    def source(self, upto: int) -> Source:
        """A kernel that loads the stack and does the steps from `done` to `upto`."""
        raw = [x.dtype == torch.bfloat16 for x in self.stack]
        base = None if self.lifted else self.base
        source = Source(raw, None if base is None else base.dtype == torch.bfloat16)
        for j, bound in enumerate(self.node.pipeline(self.name).steps[self.done : upto], self.done):
            EMITTERS[bound.step.name](source.body, bound.params, self.node.found(self.name, j), self.at)
        return source

    def _in_torch(self, bound: Bound) -> None:
        if bound.step.name in THINNING:
            _thin(self.stack, bound, self.at)
            found = self.node.found(self.name, self.done)
            if found:
                for x, ratio in zip(self.stack, ratios(found["masses"]).tolist(), strict=True):
                    x.mul_(ratio)
            return
        k, shape = len(self.stack), self.at.shape
        view = {"element": (-1,), "row": (-1, row_length(shape)), "tensor": shape}[bound.grain]
        x = self.stack[0] if self.reduced else torch.stack(self.stack)
        x = x.reshape(*(() if self.reduced else (k,)), *view)
        base = None if self.base is None else self.base.double().reshape(view)
        out = bound.step.run(x, bound.params, self.node.found(self.name, self.done), self.at, base)
        self.reduced = self.reduced or bound.step.reduces
        self.stack = [out.reshape(-1)] if self.reduced else list(out.reshape(k, -1))


def _fusable(steps: Sequence[Bound]) -> int:
    """How many of the first steps have emitters."""
    return next((n for n, b in enumerate(steps) if b.step.name not in EMITTERS), len(steps))


def _array(x: Tensor) -> np.ndarray[Any, Any]:
    """A kernel's view of a 1-D tensor: raw uint16 for bf16, else float32 or float64."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.uint16).numpy()
    return (x if x.dtype in (torch.float32, torch.float64) else x.float()).contiguous().numpy()


@dataclass(frozen=True)
class Program:
    """A kernel and the numbers it is called with."""

    kernel: Kernel
    floats: np.ndarray[Any, Any]
    words: np.ndarray[Any, Any]
    scratch: dict[str, int]
    base: bool
    """Whether the base is among the inputs."""

    @classmethod
    def of(cls, source: Source, text: str) -> Program:
        floats, words = np.array(source.body.floats, np.float64), np.array(source.body.words, np.uint32)
        return cls(kernel(text), floats, words, source.scratch, "b" in source.arguments)

    def run(self, work: _Range, *extra: np.ndarray[Any, Any]) -> None:
        inputs = [_array(x) for x in work.stack]
        if self.base and work.base is not None:
            inputs.append(_array(work.base))
        scratch = [np.empty(n, dtype) for dtype, n in self.scratch.items()]
        low = np.uint32(work.at.start & 0xFFFFFFFF)
        self.kernel(*inputs, *extra, *scratch, self.floats, self.words, low)


_FOUND = """\
from weft.engine.kernels.primitives import nonfinite_{kind}


def kernel(x, found):
    found[0] = nonfinite_{kind}(x)
"""
_THIN = """\
from weft.engine.kernels.primitives import thin_rows


def kernel(x, n, density, window, rescale, start, k0, k1, words, long_words, starts, counts):
    thin_rows(x, n, density, window, rescale, start, k0, k1, words, long_words, starts, counts)
"""


def _nonfinite(x: Tensor) -> bool:
    found = np.zeros(1, np.uint8)
    kernel(_FOUND.format(kind="bf16" if x.dtype == torch.bfloat16 else "float"))(_array(x), found)
    return bool(found[0])


def _apply(work: _Range, upto: int, out: Tensor) -> None:
    """Do the steps and round the result into `out`, plus the base where there is one."""
    raw = out.dtype == torch.bfloat16

    def finish(source: Source) -> str:
        value = source.body.values[0]
        if work.base is not None:
            if work.lifted:  # the differences were formed before; the base comes in again here
                source.add_base(work.base.dtype == torch.bfloat16)
            value = f"base + {value}"
        source.sliced.append("out")
        return source.finish(["out"], [f"out_[j] = to_bf16({value})" if raw else f"out_[j] = {value}"])

    program = work.program(("apply", raw, work.base is None), upto, finish)
    program.run(work, out.view(torch.uint16).numpy() if raw else out.numpy())


def _stacked(work: _Range, upto: int) -> Tensor:
    """Do the steps into a float64 stack [k', n]."""
    k = 1 if work.reduced_by(upto) else len(work.stack)
    rows = [f"o{i}" for i in range(k)]

    def finish(source: Source) -> str:
        source.sliced += rows
        values = source.body.values
        return source.finish(rows, [f"{row}_[j] = {v}" for row, v in zip(rows, values, strict=True)])

    out = torch.empty((k, work.stack[0].numel()), dtype=torch.float64)
    work.program("stack", upto, finish).run(work, *out.numpy())
    return out


def _gram(work: _Range, upto: int) -> Tensor:
    """Gram.partial: [tiles, k(k+1)/2]."""
    k, n = len(work.stack), work.stack[0].numel()

    def finish(source: Source) -> str:
        bufs = [source.block(f"buf{i}", "float64") for i in range(k)]
        return source.finish(
            ["out"],
            [f"{buf}[j] = {v}" for buf, v in zip(bufs, source.body.values, strict=True)],
            [f"out[s // {TILE}, {c}] += dot({bufs[i]}, {bufs[j]}, m)" for c, (i, j) in enumerate(pairs(k))],
        )

    out = np.zeros((max(1, -(-n // TILE)), len(pairs(k))), np.float64)
    work.program("gram", upto, finish).run(work, out)
    return torch.from_numpy(out)


def _sums(work: _Range, upto: int, m: int, quantities: Callable[[Body], list[str]]) -> Tensor:
    """Sums.partial of m quantities: [tiles, m]."""
    n = work.stack[0].numel()

    def finish(source: Source) -> str:
        bufs = [source.block(f"buf{c}", "float64") for c in range(m)]
        return source.finish(
            ["out"],
            [f"{buf}[j] = {q}" for buf, q in zip(bufs, quantities(source.body), strict=True)],
            [f"out[s // {TILE}, {c}] += total({buf}, m)" for c, buf in enumerate(bufs)],
        )

    out = np.zeros((max(1, -(-n // TILE)), m), np.float64)
    work.program(("sums", m), upto, finish).run(work, out)
    return torch.from_numpy(out)


def _thinned_masses(work: _Range, bound: Bound) -> Tensor:
    """Sums.partial of `thin_keep_l1`: the masses before and after, [tiles, 2k]."""
    if not work.lifted:
        work.lift(work.done)
    before = _masses(work)
    _thin(work.stack, bound, work.at)
    return torch.cat([before, _masses(work)], 1)


def _masses(work: _Range) -> Tensor:
    """Σ|x| of each task vector, [tiles, k]; they are in float64 by now."""
    return _sums(work, work.done, len(work.stack), lambda body: [f"abs({v})" for v in body.values])


def _bracket(counts: Tensor, stat: Select, bound: Bound, seen: int, numel: int) -> Tensor:
    """Upper halves `[k, q, 2]` between which the wanted ranks nearly surely lie; counts: [k, 1, digits]."""
    k, digits = counts.shape[0], counts.shape[-1]
    above = counts[:, 0].flip(-1).cumsum(-1)  # from the largest digit down
    share = torch.tensor(stat.ranks(bound.params, k, numel)).clamp(1, numel).double() / numel  # [k, q]
    # values that lie together are alike, so a sample in tiles tells less than its length
    slack = 8 * (share * (1 - share) * seen).sqrt() + 2
    around = torch.stack([share * seen - slack, share * seen + slack], -1).clamp(1, seen).long()
    high, low = torch.searchsorted(above, around.reshape(k, -1)).reshape(around.shape).unbind(-1)
    return torch.stack([digits - 1 - low, digits - high], -1).clamp(0, digits)


def _counts(work: _Range, upto: int, memo: Any, hint: Tensor | None) -> Tensor | Counted:
    """Select.partial: counts [k, q, digits], with the keys that a second pass would count, given a hint."""
    k = len(work.stack)

    def finish(extra: Sequence[str], after: Sequence[str]) -> Callable[[Source], str]:
        def finished(source: Source) -> str:
            values, loads = source.body.values, None
            if not source.body.lines and all(x.dtype.itemsize < 8 for x in work.stack):  # bare differences
                loads = source.short_loads()
                values = [f"f{i}" for i in range(k)]
            keys = [source.block(f"keys{i}", "uint32") for i in range(k)]
            lines = [
                f"{key}[j] = np.float32(abs({v})).view(np.uint32)"
                for key, v in zip(keys, values, strict=True)
            ]
            return source.finish(extra, lines, after, loads)

        return finished

    if memo is None and hint is None:
        table = np.zeros((k, 1, 1 << 15), np.int32)  # a range is shorter than 2**31
        after = [f"count_upper(keys{i}, m, out[{i}, 0])" for i in range(k)]
        work.program("upper", upto, finish(["out"], after)).run(work, table)
        return torch.from_numpy(table)
    if memo is None:
        assert hint is not None
        return _counted(work, upto, hint, finish)
    prefix = memo["prefix"].numpy().astype(np.uint32)  # [k, q]
    q = prefix.shape[1]
    lower = np.zeros((k, q, 1 << 16), np.int64)
    after = [f"count_lower(keys{i}, m, prefix[{i}, {c}], out[{i}, {c}])" for i in range(k) for c in range(q)]
    work.program(("lower", q), upto, finish(["prefix", "out"], after)).run(work, prefix, lower)
    return torch.from_numpy(lower)


def _counted(
    work: _Range, upto: int, hint: Tensor, finish: Callable[[list[str], list[str]], Callable[[Source], str]]
) -> Counted:
    """The summary of a range given where the wanted magnitudes are likely to be."""
    k, q, _ = hint.shape
    few = int((hint[..., 1] - hint[..., 0]).max()) <= FEW_DIGITS
    every = [(i, c) for i in range(k) for c in range(q)]
    rest, kept = np.empty((k, q, work.stack[0].numel() // 8 + 1), np.uint32), np.zeros((k, q), np.int64)
    after = [
        f"kept[{i}, {c}] = keep_long(keys{i}, m, bracket[{i}, {c}], rest[{i}, {c}], kept[{i}, {c}])"
        for i, c in every
    ]
    if few:
        out = np.zeros((k, q, 1 + FEW_DIGITS), np.int32)  # a range is shorter than 2**31
        after += [f"tally(keys{i}, m, bracket[{i}, {c}], out[{i}, {c}])" for i, c in every]
    else:
        out = np.zeros((k, 1, 1 + (1 << 15)), np.int32)
        after += [f"count_upper(keys{i}, m, out[{i}, 0, 1:])" for i in range(k)]
    program = work.program(("counted", few, q), upto, finish(["bracket", "out", "rest", "kept"], after))
    program.run(work, hint.numpy().astype(np.uint32), out, rest, kept)
    counts, first = torch.from_numpy(out), hint[..., 0] if few else torch.zeros((k, 1), dtype=torch.int64)
    if kept.max() > rest.shape[-1]:
        return Counted(counts, first, hint, None)
    return Counted(
        counts, first, hint, tuple((torch.from_numpy(rest[i, c, : kept[i, c]].copy()),) for i, c in every)
    )


def _thin(stack: list[Tensor], bound: Bound, at: At) -> None:
    """DELLA's rank-dependent dropping, in place."""
    params, n = bound.params, row_length(at.shape)
    words, long_words = np.empty(5 * n + 1, np.uint32), np.empty(2 * n, np.uint64)
    starts, counts = np.empty(2 * SPAN, np.int32), np.empty((4, 256), np.int32)
    for i, (x, p) in enumerate(zip(stack, per_model(params["density"], len(stack)), strict=True)):
        window = min(params["epsilon"], p, 1.0 - p)
        low, k0, k1 = map(
            np.uint32, (at.start & 0xFFFFFFFF, *stream_key(at.seed, i, at.name, at.start >> 32))
        )
        kernel(_THIN)(
            x.numpy(), n, p, window, bool(params.get("rescale", False)), low, k0, k1,
            words, long_words, starts, counts,
        )  # fmt: skip
