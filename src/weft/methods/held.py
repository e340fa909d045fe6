"""A tensor of several checkpoints, kept in memory while a merge reads it more than once."""

from __future__ import annotations

from collections.abc import Sequence

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.bits import Bits, join
from weft.checkpoints.execution import execution, ranges
from weft.methods.parts import stored_name

LENGTH = 8
"""Ranges of a held piece: what is held needs no buffers, and fewer summaries are fewer to join."""


class Held:
    """The values of one tensor, from each reader that is not None and not `at_hand`, in pieces.

    Pieces rather than whole tensors: they come from what was freed before, where a block of many MiB would
    come from the system each time, to be cleared page by page.
    """

    def __init__(self, readers: Sequence[Checkpoint | None], name: str, numel: int, grain: int) -> None:
        how = execution()
        self._cut = ranges(numel, grain, how.chunk * LENGTH)
        self._length = self._cut[0][1] if self._cut else 1

        def read(at: tuple[Checkpoint | None, int, int]) -> Bits | None:
            source, start, stop = at
            return None if source is None else source.bits(stored_name(source, name), start, stop)

        self.whole = not any(s is not None and _at_hand(s, name) for s in readers)
        """Whether all readers' values are in memory."""
        far = [None if s is None or _at_hand(s, name) else s for s in readers]
        flat = how.map(read, [(s, a, b) for a, b in self._cut for s in far])
        k = len(readers)
        self._pieces = [flat[i * k : (i + 1) * k] for i in range(len(self._cut))]

    def values(self, start: int, stop: int) -> list[Bits | None]:
        """The range of every reader; None of those that are not held."""
        first, last = start // self._length, max(stop - 1, start) // self._length
        parts = []
        for i in range(first, last + 1):
            begin = self._cut[i][0]
            inside = slice(max(start - begin, 0), stop - begin)
            parts.append([None if v is None else v[inside] for v in self._pieces[i]])
        if len(parts) == 1:
            return parts[0]
        return [
            None if row[0] is None else join([v for v in row if v is not None])
            for row in zip(*parts, strict=True)
        ]


def _at_hand(source: Checkpoint, name: str) -> bool:
    return source.at_hand(stored_name(source, name))
