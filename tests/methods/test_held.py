"""What a merge holds of a tensor is what it would read, wherever pieces and ranges meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.checkpoints.execution import TILE, Execution, executing
from weft.checkpoints.memory import StateDict
from weft.methods.held import LENGTH, Held
from weft.methods.merge import Merge
from weft.methods.registry import METHODS


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


def test_what_lies_in_a_local_file_is_read_again_rather_than_held(tmp_path: Path) -> None:
    """What must be computed is held beside it, and both give what a merge in memory gives."""
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(3 * TILE, generator=g) for _ in range(3)]
    for i, v in enumerate(values):
        save_file({"w": v}, tmp_path / f"{i}.safetensors")
    base, a, b = (weft.load(tmp_path / f"{i}.safetensors") for i in range(3))
    files = Merge([a, b], base=base, method=METHODS["ties"], params={"scope": "tensor"})
    assert files.held_bytes("w") == 0
    mixed = Merge([a, b * 2.0], base=base, method=METHODS["ties"], params={"scope": "tensor"})
    assert mixed.held_bytes("w") == 3 * TILE * 8
    with executing(Execution(chunk=TILE)):
        mixed.hold("w")
        assert not mixed.holds("w")
        found = mixed.tensor("w")
    plain = (
        StateDict({"w": values[0]}),
        [StateDict({"w": values[1]}), StateDict({"w": values[2].double() * 2})],
    )
    memory = Merge(plain[1], base=plain[0], method=METHODS["ties"], params={"scope": "tensor"})
    assert torch.equal(found, memory.tensor("w"))
