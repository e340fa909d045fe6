"""8-bit checkpoints seen as the 16-bit ones they stand for.

Merging codes instead of values is meaningless, so a weight with a companion scale (one for the tensor, one
a row, or one a block) shows its product with it, computed for the elements that are read. Formats that
pack several values into one number are refused with what to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.base import Asset, Checkpoint, TensorInfo, WeightFile
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.limits import shown
from weft.checkpoints.ranges import element_range
from weft.errors import DataError

_CODES = (
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8,
)  # fmt: skip
_PACKED = (
    ".qweight", ".qzeros", ".weight_packed", ".absmax", ".quant_map", ".SCB", ".weight_zero_point",
    ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", "_proj_blocks", ".weight_scale_2",
)  # fmt: skip
_PACKED_METHODS = {
    "gptq", "awq", "bitsandbytes", "mxfp4", "hqq", "aqlm", "quip", "vptq", "higgs", "spqr", "eetq",
    "bitnet", "auto-round", "torchao", "quanto",
}  # fmt: skip
_DEFAULT_BLOCK = (128, 128)


@dataclass(frozen=True, slots=True)
class Scale:
    """The tensor of factors for one weight, and the block of the last two dimensions each is for."""

    name: str
    block: tuple[int, int]


def dequantised(model: Checkpoint) -> Checkpoint:
    """`model` itself if it is not quantised, else its values. DataError for a packed format."""
    config = model.config or {}
    quantisation = config.get("quantization_config")
    quantisation = quantisation if isinstance(quantisation, Mapping) else {}
    method = str(quantisation.get("quant_method", ""))
    packed = next((n for n in model.tensors if n.endswith(_PACKED)), None)
    if packed or method in _PACKED_METHODS or quantisation.get("load_in_4bit"):
        raise DataError(
            f"{model.origin} is quantised ({method or 'packed'}: {shown(packed or 'config.json')}), and "
            "codes cannot be merged; use the model it was made from, or dequantise it and save it as bfloat16"
        )
    scales = _scales(model, quantisation)
    return Dequantised(model, scales) if scales else model


class Dequantised(Checkpoint):
    """A checkpoint whose coded weights are shown multiplied by their scales, which are hidden."""

    def __init__(self, model: Checkpoint, scales: Mapping[str, Scale]) -> None:
        self.origin = model.origin
        self._model, self._scales = model, scales
        self.skipped = sorted({s.name for s in scales.values()} | _activation_scales(model, scales))
        """Tensors that mean nothing once the weights are values: the scales."""
        dtype = _dtype_of(model.config or {})
        self._tensors = {
            name: TensorInfo(info.shape, dtype) if name in scales else info
            for name, info in model.tensors.items()
            if name not in set(self.skipped)
        }

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(
        self, name: str, start: int = 0, stop: int | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        info = self.info(name)
        if name not in self._scales:
            return self._model.read(name, start, stop, dtype=dtype)
        start, stop = element_range(name, info, start, stop, self.grain(name))
        # a code has at most 8 bits and a scale 24, so float64 holds the product exactly
        working = torch.float32 if dtype is None else torch.float64
        codes = self._model.read(name, start, stop).to(working)
        values = codes * self._factors(name, info.shape, start, stop).to(working)
        return values if dtype is None else round_to(values, dtype)

    def grain(self, name: str) -> int:
        return self._model.grain(name)

    def prefetch(self, name: str, start: int = 0, stop: int | None = None) -> None:
        self._model.prefetch(name, start, stop)

    def _factors(self, name: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """The scale of each element in `[start, stop)`, reading only the rows of scales they need."""
        scale = self._scales[name]
        if start == stop or self._model.info(scale.name).numel == 1:
            return self._model.read(scale.name)[:1].to(torch.float32).expand(stop - start)
        height, width = scale.block
        columns = shape[-1] if len(shape) > 1 else 1
        rows = shape[-2] if len(shape) > 1 else shape[0]
        blocks_down, blocks_across = -(-rows // height), -(-columns // width)
        first, last = start // columns, -(-stop // columns)
        row = torch.arange(first, last)
        block_row = (row // rows) * blocks_down + (row % rows) // height
        low, high = int(block_row[0]), int(block_row[-1]) + 1
        table = self._model.read(scale.name, low * blocks_across, high * blocks_across)
        table = table.to(torch.float32).reshape(high - low, blocks_across)
        across = table.repeat_interleave(width, dim=1)[:, :columns]
        return across[block_row - low].reshape(-1)[start - first * columns : stop - first * columns]

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._model.aliases

    @property
    def config(self) -> Mapping[str, Any] | None:
        config = self._model.config
        return config and {k: v for k, v in config.items() if k != "quantization_config"}

    @property
    def assets(self) -> tuple[Asset, ...]:
        return self._model.assets

    @property
    def files(self) -> tuple[WeightFile, ...]:
        return self._model.files


def _scales(model: Checkpoint, quantisation: Mapping[str, Any]) -> dict[str, Scale]:
    found = {}
    for name, info in model.tensors.items():
        if info.dtype not in _CODES or not info.numel or not info.shape:
            continue
        module, _, last = name.rpartition(".")
        names = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale_{last}", f"{module}.scale")
        companion = next((n for n in names if n in model), None)
        if companion:
            found[name] = Scale(companion, _block(model, name, companion, quantisation))
    return found


def _block(model: Checkpoint, name: str, companion: str, quantisation: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns that one factor is for, such that the blocks cover the weight exactly."""
    weight, scale = model.info(name).shape, model.info(companion).shape
    columns = weight[-1] if len(weight) > 1 else 1
    rows = weight[-2] if len(weight) > 1 else weight[0]
    stated = quantisation.get("weight_block_size")
    choices = [(rows, columns), (1, columns), _DEFAULT_BLOCK]
    if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n > 0 for n in stated):
        choices.insert(0, (stated[0], stated[1]))
    if prod(scale) == 1:
        return rows, columns
    for height, width in choices:
        grid = (*weight[:-2], -(-rows // height), -(-columns // width))
        if scale == grid or (width >= columns and scale == grid[:-1]):
            return height, width
    raise DataError(
        f"{model.origin}: scale {shown(companion)} of shape {list(scale)} does not fit {shown(name)} of "
        f"shape {list(weight)}; state quantization_config.weight_block_size in config.json"
    )


def _activation_scales(model: Checkpoint, scales: Mapping[str, Scale]) -> set[str]:
    modules = {name.rpartition(".")[0] for name in scales}
    endings = ("input_scale", "activation_scale", "scale_input", "output_scale", "scaled_fp8")
    names = {f"{module}.{ending}" for module in modules for ending in endings} | {"scaled_fp8"}
    return {n for n in names if n in model}


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    named = str(config.get("dtype", config.get("torch_dtype", "bfloat16"))).removeprefix("torch.")
    known = {"float16": torch.float16, "float32": torch.float32}
    return known.get(named, torch.bfloat16)
