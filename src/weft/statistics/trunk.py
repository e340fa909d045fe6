"""RegMean++ by block: the merged trunk grows, the experts' blocks beside it run on what it makes.

One block's weights are in memory at a time, and its Gram matrices of all experts (float32); the hidden states of
all examples wait between blocks (blockwise.py). Parts before the blocks are fitted on the data themselves, parts
behind them on the true result of the last merged block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from weft.statistics.batches import Batch
from weft.statistics.blockwise import Passing, Stack
from weft.statistics.measure import Measurement
from weft.statistics.remeasured import Growing

Run = Callable[[Measurement, Stack, Passing], object]


class Trunk:
    """The merged model and the experts beside it, in one module. UsageError where that is no stack of blocks."""

    def __init__(
        self, growing: Growing, module: nn.Module, every: Sequence[Sequence[Batch]], device: torch.device
    ) -> None:
        forward = growing.asked.forward
        self.growing, self.module = growing, module
        self.experts = [Stack(module, s, device, forward) for s in growing.sources]
        self.merged = Stack(module, growing.sources[0], device, forward)
        self.merged.values = lambda name: growing.values[name]
        self.passing = [[Passing(b) for b in found] for found in every]
        first = self.experts[0]
        with first.without_cache(), first.outside():
            with first.filled(0):
                first.begin(self.passing[0][0])
            first.record(self.passing[0][0], len(first.blocks))
        for stack in (self.merged, *self.experts):
            stack.tuple = first.tuple

    @property
    def all(self) -> list[Passing]:
        return [one for found in self.passing for one in found]

    def run(self) -> None:
        """Solve what lies before the blocks, block after block, and what lies behind."""
        merged = self.merged
        names = list(dict(self.module.named_parameters()))
        outside = [n for n in names if not n.startswith(tuple(merged.names))]
        with merged.without_cache():
            before = self.solve(outside, Stack.outside, recording)
            with merged.outside():
                for one in self.all:
                    merged.record(one, len(merged.blocks))
            for i, prefix in enumerate(merged.names):
                self.solve([n for n in names if n.startswith(prefix)], Block(i).filled, Block(i).advancing)
                with merged.filled(i):
                    for one in self.all:
                        one.hidden, _ = merged.advance(one, i)
            self.solve([n for n in outside if n not in before], Stack.outside, handing_on)

    def solve(self, names: Sequence[str], filled: Callable[[Stack], Any], run: Run) -> set[str]:
        """Measure every expert's parameters `names` while it runs, and merge those that were in use."""
        if not names:
            return set()
        found = [self.growing.measurement(self.module, names) for _ in self.experts]
        for one, stack, passing in zip(found, self.experts, self.passing, strict=True):
            with filled(stack):
                for batch in passing:
                    run(one, stack, batch)
            one.count(sum(batch.batch.size for batch in passing))
        return self.growing.solve(found, self.merged.stored)


class Block:
    """The i-th block of any stack."""

    def __init__(self, i: int) -> None:
        self.i = i

    def filled(self, stack: Stack) -> Any:
        return stack.filled(self.i)

    def advancing(self, found: Measurement, stack: Stack, one: Passing) -> object:
        """Through the block, whose result nobody needs: the merged one's goes on."""
        return found.watched(one.batch, lambda: stack.advance(one, self.i))


def recording(found: Measurement, stack: Stack, one: Passing) -> object:
    """Up to the blocks, which do nothing."""
    return found.watched(one.batch, lambda: stack.record(one, len(stack.blocks)))


def handing_on(found: Measurement, stack: Stack, one: Passing) -> object:
    """From the last block's result on."""
    return stack.hand_on(one, found.watched)  # type: ignore[func-returns-value]
