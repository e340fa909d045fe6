"""bitsandbytes' 4-bit blocks: NF4 and FP4, with doubly quantised scales or without (arXiv 2305.14314).

    w[i] = table[code[i]] · absmax[i // blocksize]

over the flattened weight, two codes in a byte, the first in the high half. Doubly quantised, absmax itself is
`nested_table[byte[b]] · nested_absmax[b // nested_blocksize] + nested_offset`. A small JSON tensor states
shape, block sizes and offset.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.quantised.node import Part
from weft.checkpoints.quantised.packing import unpack_nibbles
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataError
from weft.late import Tensor, torch

_STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
_MAX_STATE = 1 << 16


@dataclass(frozen=True, slots=True)
class Blocks4:
    """A weight of 4-bit codes in blocks."""

    name: str
    state: str
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int = 0
    """0 where absmax is stored as float32."""
    offset: float = 0.0

    @property
    def parts(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map") if self.nested_blocksize else ()
        return (self.name, self.state, *(f"{self.name}.{n}" for n in ("absmax", "quant_map", *nested)))

    @property
    def grain(self) -> int:
        return 1

    @property
    def scattered(self) -> bool:
        return False

    def values(self, part: Part, start: int, stop: int) -> Tensor:
        first = start // 2
        codes = unpack_nibbles(part(self.name, first, -(-stop // 2)), low_first=False)
        codes = codes[start - 2 * first : stop - 2 * first]
        block = torch.arange(start, stop) // self.blocksize
        low, high = int(block[0]), int(block[-1]) + 1
        table = part(f"{self.name}.quant_map", 0, None).double()
        return table[codes] * self._absmax(part, low, high)[block - low]

    def _absmax(self, part: Part, low: int, high: int) -> Tensor:
        stored = part(f"{self.name}.absmax", low, high)
        if not self.nested_blocksize:
            return stored.double()
        block = torch.arange(low, high) // self.nested_blocksize
        first, last = int(block[0]), int(block[-1]) + 1
        table = part(f"{self.name}.nested_quant_map", 0, None).double()
        scale = part(f"{self.name}.nested_absmax", first, last).double()
        return table[stored.long()] * scale[block - first] + self.offset


def find_blocks4(model: Checkpoint, problems: list[str]) -> dict[str, Blocks4]:
    """Every weight with a `quant_state`."""
    states = {m[1]: m[0] for n in model.tensors if (m := _STATE.fullmatch(n))}
    with ThreadPoolExecutor(8) as pool:
        read = dict(zip(states, pool.map(lambda s: _state(model, s), states.values()), strict=True))
    found = {}
    for name, state in read.items():
        weight = state if isinstance(state, str) else _blocks(model, name, states[name], state)
        if isinstance(weight, str):
            problems.append(f"{shown(name)}: {weight}; fetch the file again")
        else:
            found[name] = weight
    return found


def _state(model: Checkpoint, name: str) -> dict[str, Any] | str:
    info = model.info(name)
    if info.dtype != torch.uint8 or info.numel > _MAX_STATE:
        return f"{shown(name)} is no JSON text"
    try:
        data = bytes(model.read(name).tolist())
        return parse_json(data, f"{model.origin}: {shown(name)}", "config-json", depth=8)
    except DataError as error:
        return str(error)


def _blocks(model: Checkpoint, name: str, key: str, state: dict[str, Any]) -> Blocks4 | str:
    """The weight that a state describes, or what is wrong with it."""
    shape, size = state.get("shape"), state.get("blocksize")
    nested_size, offset = state.get("nested_blocksize", 0), state.get("nested_offset", 0.0)
    numbers = isinstance(shape, list) and all(type(n) is int and n > 0 for n in [*shape, size])
    if not numbers or type(nested_size) is not int or nested_size < 0 or not _finite(offset):
        return "its quant_state states no shape and blocksize that a weight can have"
    assert isinstance(shape, list) and isinstance(size, int)
    weight = Blocks4(name, key, tuple(shape), size, nested_size, float(offset))
    blocks = -(-prod(shape) // size)
    wanted = {
        name: (torch.uint8, -(-prod(shape) // 2)),
        f"{name}.absmax": (torch.uint8 if nested_size else torch.float32, blocks),
        f"{name}.quant_map": (torch.float32, 16),
    }
    if nested_size:
        wanted[f"{name}.nested_absmax"] = (torch.float32, -(-blocks // nested_size))
        wanted[f"{name}.nested_quant_map"] = (torch.float32, 256)
    for part, (dtype, count) in wanted.items():
        if part not in model:
            return f"{shown(part)} is missing"
        info = model.info(part)
        if info.dtype != dtype or info.numel != count:
            return f"{shown(part)} should be {count} of {dtype}, but is {info.numel} of {info.dtype}"
    return weight


def _finite(number: object) -> bool:
    return isinstance(number, int | float) and isfinite(number)
