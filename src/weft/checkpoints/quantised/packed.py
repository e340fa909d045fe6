"""Integers of 1 to 8 bits packed along the rows: compressed-tensors' `pack-quantized`.

    w[i, j] = (code[i, j] − zero[i, g(j)]) · scale[i, g(j)]

`weight_packed` holds the codes row by row in 32-bit words, offset so that they are not negative;
`weight_scale` has one entry a row and group, `weight_zero_point` (asymmetric) is packed along the rows of
the scales, `weight_shape` states the shape, and `weight_g_idx` the group of each column where columns were
reordered by their activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.quantised.grid import Grid, Scaled, Words, fitted, stated_blocks
from weft.checkpoints.quantised.packing import word_count
from weft.late import torch

_ENDING = "weight_packed"


def find_packed(model: Checkpoint, quantisation: Mapping[str, Any], problems: list[str]) -> dict[str, Scaled]:
    """Every weight with a `weight_packed` of 32-bit words."""
    names = [
        n for n, i in model.tensors.items() if n.endswith(_ENDING) and i.dtype == torch.int32 and i.numel
    ]
    plain = {n: n.removesuffix("_packed") for n in names}
    whole = [n for n in names if f"{plain[n]}_shape" in model and f"{plain[n]}_scale" in model]
    for name in names:
        problems += [
            f"{shown(name)} has no {shown(plain[name] + end)}; fetch the file again"
            for end in ("_shape", "_scale")
            if plain[name] + end not in model
        ]
    with ThreadPoolExecutor(8) as pool:  # a few bytes each, but each a request where the file is remote
        shapes = list(pool.map(lambda n: _stated_shape(model, f"{plain[n]}_shape"), whole))
    found = {}
    for name, shape in zip(whole, shapes, strict=True):
        weight = _packed(model, name, plain[name], shape, quantisation, problems)
        if weight is not None:
            found[plain[name]] = weight
    return found


def _stated_shape(model: Checkpoint, name: str) -> tuple[int, ...]:
    """What `weight_shape` says; nothing if it is no shape."""
    info = model.info(name)
    whole = info.dtype in (torch.int32, torch.int64) and info.numel <= 8
    return tuple(int(n) for n in model.read(name).tolist()) if whole else ()


def _packed(
    model: Checkpoint,
    name: str,
    plain: str,
    shape: tuple[int, ...],
    quantisation: Mapping[str, Any],
    problems: list[str],
) -> Scaled | None:
    words = model.info(name).shape
    fits = len(shape) == len(words) >= 2 and shape[:-1] == words[:-1] and shape[-1] > 0
    widths = [b for b in range(1, 9) if fits and word_count(shape[-1], b) == words[-1]]
    bits = next((b for b in (4, 8, 2) if b in widths), widths[0] if widths else 0)
    if len(widths) > 1:  # a narrow matrix fits several; then config.json decides
        bits = next((b for b in stated_bits(quantisation) if b in widths), bits)
    if not bits:
        problems.append(
            f"{shown(name)} of shape {list(words)} does not hold a weight of shape {list(shape)} in 1 to 8 "
            "bits; fetch the file again"
        )
        return None
    stated = stated_blocks(quantisation)
    index = f"{plain}_g_idx" if f"{plain}_g_idx" in model else None
    grid = fitted(model, shape, name, f"{plain}_scale", stated, problems)
    if grid is None:
        return None
    if index and model.info(index).shape != shape[-1:]:
        problems.append(f"{shown(index)} must have an entry for each of the {shape[-1]} columns")
        return None
    scale = Grid(grid.name, shape, grid.block, index)
    zero = None
    if f"{plain}_zero_point" in model:
        zero = _zero(model, f"{plain}_zero_point", scale, bits, problems)
        if zero is None:
            return None
    return Scaled(shape, Words(name, bits, shape[-1]), (scale,), zero=zero, others=(f"{plain}_shape",))


def _zero(model: Checkpoint, name: str, scale: Grid, bits: int, problems: list[str]) -> Grid | None:
    """Zero points as int8 like the scales, or packed along the rows."""
    entries, info = model.info(scale.name).shape, model.info(name)
    if info.dtype == torch.int8 and info.shape == entries:
        return Grid(name, scale.shape, scale.block, scale.index)
    packed = (word_count(entries[0], bits) if entries else 0, *entries[1:])
    if info.dtype == torch.int32 and len(scale.shape) == 2 and prod(info.shape) == prod(packed):
        return Grid(name, scale.shape, scale.block, scale.index, bits)
    problems.append(
        f"{shown(name)} ({info.dtype}, {list(info.shape)}) does not fit the scales of shape {list(entries)}; "
        "fetch the file again"
    )
    return None


def stated_bits(quantisation: Mapping[str, Any]) -> list[int]:
    """The widths of codes that config.json speaks of."""
    groups = quantisation.get("config_groups")
    found = [quantisation.get("bits"), quantisation.get("w_bit")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        found.append(weights.get("num_bits") if isinstance(weights, Mapping) else None)
    return [b for b in found if type(b) is int]
