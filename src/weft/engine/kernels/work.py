"""A range of one tensor on its way through a pipeline, and the programs that take it along."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from weft.checkpoints.bits import Array, Bits, join
from weft.checkpoints.dtypes import F32, F64
from weft.engine.kernels.emit import BLOCK, EMITTERS
from weft.engine.kernels.generate import RAW, Source
from weft.engine.kernels.objects import Kernel, kernel
from weft.late import torch
from weft.methods.step import At, Bound, row_length

if TYPE_CHECKING:
    from weft.methods.merge import Merge


@dataclass
class Range:
    """A range of one tensor on its way through the pipeline."""

    node: Merge
    name: str
    at: At
    place: tuple[int, int]
    """Start and stop."""
    base: Bits | None
    stack: list[Bits]
    """One a model, as stored; after `advance`, float64 task vectors."""
    done: int = 0
    """Steps done so far."""
    lifted: bool = False
    """Whether the stack holds float64 task vectors rather than what is stored."""
    reduced: bool = False

    @classmethod
    def read(cls, node: Merge, name: str, start: int, stop: int) -> Range | None:
        """Read the inputs; None for ranges that kernels don't take (empty, or across 2**32)."""
        if stop == start or (start >> 32) != ((stop - 1) >> 32):
            return None
        inputs, base = node.values(name, start, stop)
        return cls(node, name, replace(node.at(name), start=start), (start, stop), base, inputs)

    @classmethod
    def sampled(cls, node: Merge, name: str, cut: Sequence[tuple[int, int]]) -> Range:
        """Several ranges as one that begins where the first does."""
        read = [node.values(name, start, stop) for start, stop in cut]
        stack = [join(pieces) for pieces in zip(*(models for models, _ in read), strict=True)]
        base = [b for _, b in read if b is not None]
        at = replace(node.at(name), start=cut[0][0])
        return cls(node, name, at, cut[0], join(base) if base else None, stack)

    def refuse_nonfinite(self) -> None:
        """DataError if an input has NaN or infinite values, unless they are allowed."""
        if self.node.nonfinite == "error":
            stack, base = self.stack, self.base
            if self.done or self.lifted:  # the stack is no longer what was read
                stack, base = self.node.values(self.name, *self.place)
            for values, source in zip([*stack, base], self.node.readers(self.name), strict=True):
                if values is not None and source is not None and nonfinite(values):
                    self.node.refuse_nonfinite(self.name, source)

    def advance(self, upto: int) -> None:
        """Do the steps before `upto`: fused where they have emitters, else in torch."""
        steps = self.node.pipeline(self.name).steps
        while self.done < upto:
            run = fusable(steps[self.done : upto])
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
        self.stack = [Bits(row, F64) for row in _stacked(self, upto)]
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
        raw = [RAW.get(x.dtype, "") for x in self.stack]
        base = None if self.lifted else self.base
        source = Source(raw, None if base is None else RAW.get(base.dtype, ""))
        for j, bound in enumerate(self.node.pipeline(self.name).steps[self.done : upto], self.done):
            EMITTERS[bound.step.name](source.body, bound.params, self.node.found(self.name, j), self.at)
        return source

    def _in_torch(self, bound: Bound) -> None:
        k, shape = len(self.stack), self.at.shape
        view = {"element": (-1,), "row": (-1, row_length(shape)), "tensor": shape}[bound.grain]
        rows = [x.tensor() for x in self.stack]
        x = rows[0] if self.reduced else torch.stack(rows)
        x = x.reshape(*(() if self.reduced else (k,)), *view)
        base = None if self.base is None else self.base.tensor().double().reshape(view)
        out = bound.step.run(x, bound.params, self.node.found(self.name, self.done), self.at, base)
        self.reduced = self.reduced or bound.step.reduces
        self.stack = [Bits.of(row) for row in out.reshape(1 if self.reduced else k, -1)]


def fusable(steps: Sequence[Bound]) -> int:
    """How many of the first steps have emitters."""
    return next((n for n, b in enumerate(steps) if b.step.name not in EMITTERS), len(steps))


def array_of(x: Bits) -> Array:
    """A kernel's view of values: uint16 of those that it takes raw, else float32 or float64."""
    if x.dtype in RAW:
        return x.array.view(np.uint16)
    return x.array if x.dtype in (F32, F64) else x.tensor().float().numpy()


@dataclass(frozen=True)
class Program:
    """A kernel and the numbers it is called with."""

    kernel: Kernel
    floats: np.ndarray[Any, Any]
    words: np.ndarray[Any, Any]
    blocks: dict[str, int]
    """How many arrays of a block's length it uses for itself, by dtype."""
    fixed: list[tuple[str, tuple[int, ...]]]
    """Others, by dtype and shape."""
    rows: bool
    """Whether a block is a row."""
    base: bool
    """Whether the base is among the inputs."""

    @classmethod
    def of(cls, source: Source, text: str) -> Program:
        body = source.body
        floats, words = np.array(body.floats, np.float64), np.array(body.words, np.uint32)
        blocks = {dtype: len(names) for dtype, names in body.blocks.items()}
        return cls(
            kernel(text), floats, words, blocks, list(body.fixed.values()), body.rows, "b" in source.arguments
        )

    def run(self, work: Range, *extra: np.ndarray[Any, Any]) -> None:
        inputs = [array_of(x) for x in work.stack]
        if self.base and work.base is not None:
            inputs.append(array_of(work.base))
        block = row_length(work.at.shape) if self.rows else BLOCK
        scratch = [np.empty(count * block, dtype) for dtype, count in self.blocks.items()]
        fixed = [np.zeros(shape, dtype) for dtype, shape in self.fixed]
        low = np.uint32(work.at.start & 0xFFFFFFFF)
        self.kernel(*inputs, *extra, *scratch, *fixed, self.floats, self.words, low, block)


_FOUND = """\
import numpy as np
from weft.engine.kernels.primitives import nonfinite_bits, nonfinite_float


def kernel(x, found):
    found[0] = {call}
"""
_EXPONENT = {"bf16": 0x7F80, "f16": 0x7C00}


def nonfinite(x: Bits) -> bool:
    """Whether there is a NaN or an infinity."""
    raw, found = RAW.get(x.dtype), np.zeros(1, np.uint8)
    call = f"nonfinite_bits(x, np.uint16({_EXPONENT[raw]}))" if raw else "nonfinite_float(x)"
    kernel(_FOUND.format(call=call))(array_of(x), found)
    return bool(found[0])


def _stacked(work: Range, upto: int) -> Array:
    """Do the steps into a float64 stack [k', n]."""
    k = 1 if work.reduced_by(upto) else len(work.stack)
    rows = [f"o{i}" for i in range(k)]

    def finish(source: Source) -> str:
        source.sliced += rows
        values = source.body.values
        return source.finish(rows, [f"{row}_[j] = {v}" for row, v in zip(rows, values, strict=True)])

    out = np.empty((k, len(work.stack[0])), np.float64)
    work.program("stack", upto, finish).run(work, *out)
    return out
