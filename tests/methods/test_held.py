"""What a merge holds of a tensor is what it would read, wherever pieces and ranges meet."""

from __future__ import annotations

import pytest
import torch

from weft.checkpoints.execution import TILE, Execution, executing
from weft.checkpoints.memory import StateDict
from weft.methods.held import LENGTH, Held


@pytest.mark.parametrize("grain", [1, 64, 700])
def test_any_range_of_what_is_held(grain: int) -> None:
    numel = (2 * LENGTH + 1) * TILE + 321
    a, b = (StateDict({"w": torch.arange(numel) + i}) for i in (0, 7))
    with executing(Execution(chunk=TILE)):
        held = Held([a, None, b], "w", numel, grain)
    for start, stop in [(0, numel), (0, 1), (TILE - 3, 8 * TILE + 5), (numel - 1, numel), (5, 16 * TILE + 9)]:
        first, none, last = held.values(start, stop)
        assert none is None and first is not None and last is not None
        assert torch.equal(first.tensor(), torch.arange(start, stop))
        assert torch.equal(last.tensor(), torch.arange(start, stop) + 7)
