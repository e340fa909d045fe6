"""Which tensors belong together in a report: by block, stack of blocks, kind of module, repeated name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weft.checkpoints.base import TensorInfo
from weft.checkpoints.dtypes import DType
from weft.methods.layers import block_of
from weft.recipes.kinds import after_blocks, kinds_of


def group_of(name: str) -> str:
    """The block a tensor is in (`model.layers.3`), or outside the blocks its module (`model.norm`)."""
    block = block_of(name)
    return f"{block[0]}{block[1]}" if block else name.rpartition(".")[0] or name


def stack_of(name: str) -> str | None:
    """The stack of blocks (`model.layers`), None outside."""
    block = block_of(name)
    return block[0].removesuffix(".") or "(blocks)" if block else None


def kind_of(name: str) -> str:
    """The main kind of a tensor: attention, mlp, norm …"""
    return next(iter(kinds_of(name) - {"bias", "expert"}))


def in_order(names: Iterable[str]) -> list[str]:
    """As data flows: what precedes the blocks, stack after stack by index, what follows them.

    A file may hold its tensors in any order, often by alphabet, where block 10 precedes block 2.
    """
    every = list(names)
    stacks: dict[str, int] = {}
    for name in every:
        if block := block_of(name):
            stacks.setdefault(block[0], len(stacks))

    def place(name: str) -> tuple[int, int, int]:
        block = block_of(name)
        return (1, stacks[block[0]], block[1]) if block else (2 if after_blocks(name) else 0, 0, 0)

    return sorted(every, key=place)


@dataclass(frozen=True)
class Group:
    """Tensors of one shape and dtype whose names differ in numbers only."""

    pattern: str
    """`model.layers.{0..31}.mlp.up_proj.weight`."""
    info: TensorInfo
    names: tuple[str, ...]


def patterns(tensors: Mapping[str, TensorInfo]) -> list[Group]:
    """Tensors grouped by name pattern, shape and dtype, in the order of the data's flow."""
    found: dict[tuple[str, tuple[int, ...], DType], list[str]] = {}
    for name in in_order(tensors):
        info = tensors[name]
        form = ".".join("{}" if _is_index(p) else p for p in name.split("."))
        found.setdefault((form, info.shape, info.kind), []).append(name)
    return [
        Group(_pattern(names), TensorInfo(shape, dtype), tuple(names))
        for (_, shape, dtype), names in found.items()
    ]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit()


def _pattern(names: Sequence[str]) -> str:
    columns = zip(*(n.split(".") for n in names), strict=True)
    return ".".join(_numbers(c) if _is_index(c[0]) else c[0] for c in map(list, columns))


def _numbers(parts: Sequence[str]) -> str:
    """`{0..31}`, `{0,2..5}`, or the number itself where there is only one."""
    runs: list[list[int]] = []
    for n in sorted({int(p) for p in parts}):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    told = [str(a) if a == b else f"{a},{b}" if b == a + 1 else f"{a}..{b}" for a, b in runs]
    if len(told) > 4:
        told = [*told[:3], "…", told[-1]]
    return told[0] if len(set(parts)) == 1 else "{" + ",".join(told) + "}"
