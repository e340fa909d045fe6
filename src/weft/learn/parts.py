"""Partitions of the parameters: which coefficient an entry of a tensor takes.

model      one number a model                      layer    one a model and block (or module outside the blocks)
tensor     one a model and tensor                  row      one a model and output unit
column     one a model and input (vectors: one)    element  one a model and entry
Blocks(n)  n a model and matrix, each for a random share of its entries (aTLAS ×n, arXiv:2407.02880)
function   tensor's name → name of its part
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from weft.errors import UsageError, did_you_mean
from weft.methods.layers import block_of
from weft.methods.random import uniform_bits
from weft.methods.step import At


@dataclass(frozen=True)
class Blocks:
    """A random `count`-way partition of every matrix, drawn by `seed`; other tensors are one part each."""

    count: int
    seed: int = 0


Parts = str | Callable[[str], str] | Blocks
NAMES = ("model", "layer", "tensor", "row", "column", "element")


@dataclass(frozen=True)
class Place:
    """How one tensor takes its coefficients from a table `[k, *shape]`.

    `shape` broadcasts against the tensor's. With `blocks`, shape is (n,) and entry e takes number index[e].
    """

    key: str
    """Of the table, which several tensors may share."""
    shape: tuple[int, ...]
    of: tuple[int, ...]
    """The tensor's own shape."""
    name: str = ""
    blocks: Blocks | None = None

    @cached_property
    def index(self) -> Tensor | None:
        """[*of] int64: which block an entry is in."""
        if self.blocks is None:
            return None
        at = At(self.name, self.of, 0, self.blocks.seed)
        n = 1
        for size in self.of:
            n *= size
        return (uniform_bits(at, 0, n) * self.blocks.count >> 32).reshape(self.of)

    def spread(self, c: Tensor) -> Tensor:
        """One model's coefficients [*shape], so that they broadcast against the tensor."""
        return c if self.index is None else c[self.index.to(c.device)]

    def gathered(self, x: Tensor) -> Tensor:
        """Σ of x [*of] over the entries that share a coefficient: [*shape], the adjoint of `spread`."""
        if self.index is None:
            return x.sum_to_size(self.shape)
        zeros = x.new_zeros(self.shape)
        return zeros.index_add(0, self.index.to(x.device).reshape(-1), x.reshape(-1))

    @property
    def whole(self) -> bool:
        """Whether the tensor has one coefficient."""
        return self.shape == ()


def place_of(name: str, shape: tuple[int, ...], parts: Parts) -> Place:
    """The part(s) of one tensor. UsageError for an unknown partition."""
    if isinstance(parts, Blocks):
        if parts.count < 1:
            raise UsageError(f"a partition has 1 block or more, not {parts.count}")
        split = len(shape) >= 2 and parts.count > 1
        return Place(name, (parts.count,) if split else (), shape, name, parts if split else None)
    if callable(parts):
        return Place(str(parts(name)), (), shape, name)
    if parts not in NAMES:
        raise UsageError(
            f"there is no partition {parts!r}{did_you_mean(parts, NAMES)}; known: {', '.join(NAMES)}, "
            "Blocks(n), or a function of the tensor's name"
        )
    ones = (1,) * len(shape)
    sizes = {
        "model": (), "layer": (), "tensor": (), "element": shape,
        "row": (*shape[:1], *ones[1:]), "column": (1, shape[1], *ones[2:]) if len(shape) > 1 else (),
    }  # fmt: skip
    key = {"model": "all", "layer": layer_of(name)}.get(parts, name)
    return Place(key, tuple(sizes[parts]), shape, name)


def layer_of(name: str) -> str:
    """`model.layers.3`, or for a tensor outside the blocks its module's name."""
    block = block_of(name)
    return f"{block[0]}{block[1]}" if block else name.rpartition(".")[0] or name


def table_shapes(places: list[Place], k: int) -> dict[str, tuple[int, ...]]:
    """Key → [k, *shape] of its table. UsageError where tensors of different shapes were given one key."""
    found: dict[str, tuple[int, ...]] = {}
    for place in places:
        shape = (k, *place.shape)
        if found.setdefault(place.key, shape) != shape:
            raise UsageError(f"part {place.key!r} has tensors whose coefficients differ in shape")
    return found


def as_table(value: float | Tensor | list[float], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A start: one number, or one a model, as a table [k, *shape]."""
    given = torch.as_tensor(value, dtype=dtype)
    if not bool(given.isfinite().all()):
        raise UsageError("the coefficients to start from must be finite numbers")
    if given.ndim == 1 and len(given) != shape[0]:
        raise UsageError(f"there are {len(given)} coefficients to start from for {shape[0]} models")
    if given.ndim == 1:
        given = given.reshape(-1, *[1] * (len(shape) - 1))
    try:
        return given.expand(shape).clone()
    except RuntimeError:
        raise UsageError(
            f"coefficients to start from of shape {list(given.shape)} do not fill a table of {list(shape)}"
        ) from None
