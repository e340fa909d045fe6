"""Weights whose codes are stored transposed, `[in, out]`: GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978).

    w[o, i] = (code[i, o] − zero[g(i), o]) · scale[g(i), o]

GPTQ packs `qweight` along `in` and `qzeros` along `out`, in 32-bit words, 2, 3, 4 or 8 bits a code; `g_idx`
states the group of each input where columns were taken in order of their activations. AWQ ("gemm") packs
both along `out`, 4 bits, the eight of a word in the order 0 2 4 6 1 3 5 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.orientation import CONV1D_MODELS
from weft.checkpoints.quantised.grid import column_groups
from weft.checkpoints.quantised.node import Part
from weft.checkpoints.quantised.packing import unpack_words, word_count
from weft.errors import DataError
from weft.late import Tensor, torch

_AWQ_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the code of each of eight columns lies: the inverse of the order they are packed in."""


@dataclass(frozen=True, slots=True)
class Columns:
    """One linear layer of GPTQ or AWQ."""

    module: str
    size: tuple[int, int]
    """(out, in)."""
    groups: int
    group_size: int
    bits: int
    awq: bool = False
    v1: bool = False
    """Zero points are stored less one."""
    symmetric: bool = False
    g_idx: bool = False
    transposed: bool = False
    """The values are shown as `[in, out]`."""

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size[1], self.size[0]) if self.transposed else self.size

    @property
    def parts(self) -> tuple[str, ...]:
        ends = ("qweight", "qzeros", "scales", *(("g_idx",) if self.g_idx else ()))
        return tuple(f"{self.module}.{end}" for end in ends)

    @property
    def grain(self) -> int:
        return self.size[0] * self.size[1] if self.transposed else 1

    @property
    def scattered(self) -> bool:
        return True

    def values(self, part: Part, start: int, stop: int) -> Tensor:
        out, inner = self.size
        if self.transposed:
            return self._rows(part, 0, out).T.reshape(-1)
        first, last = start // inner, -(-stop // inner)
        rows = self._rows(part, first, last).reshape(-1)
        return rows[start - first * inner : stop - first * inner]

    def _rows(self, part: Part, first: int, last: int) -> Tensor:
        """Rows `[first, last)` of the weight `[out, in]`."""
        out, inner = self.size
        packed = part(f"{self.module}.qweight", 0, None)
        if self.awq:
            codes = self._along_out(packed, inner, first, last).T
        else:
            words = packed.reshape(-1, out)[:, first:last].T.contiguous()
            codes = unpack_words(words, self.bits)[:, :inner]
        zeros = self._zeros(part, first, last)
        scales = part(f"{self.module}.scales", 0, None).reshape(self.groups, out)[:, first:last].double()
        if self.g_idx:
            group = column_groups(part, f"{self.module}.g_idx", inner, self.groups)
        else:
            group = torch.arange(inner) // self.group_size
        return (codes - zeros.T[:, group]) * scales.T[:, group]

    def _zeros(self, part: Part, first: int, last: int) -> Tensor:
        zeros = self._along_out(part(f"{self.module}.qzeros", 0, None), self.groups, first, last)
        half = 1 << self.bits - 1
        if self.symmetric:
            # writers disagree whether a symmetric zero point is stored less one, but not on what it is
            if not bool(((zeros == half) | (zeros == half - 1)).all()):
                raise DataError(
                    f"{shown(self.module + '.qzeros')}: config.json says symmetric (sym), but the zero points are "
                    f"not all {half}; correct quantization_config"
                )
            return torch.full_like(zeros, half)
        # a zero point of 0 is stored as −1, that is with all bits set
        return zeros + 1 & ((1 << self.bits) - 1) if self.v1 else zeros

    def _along_out(self, packed: Tensor, rows: int, first: int, last: int) -> Tensor:
        """Codes packed along `out`: columns `[first, last)` of `rows` rows."""
        table = packed.reshape(rows, -1)
        top = first // 32 * 32  # 32 codes fill a whole number of words
        begin = top * self.bits // 32
        codes = unpack_words(table[:, begin : word_count(last, self.bits) or None], self.bits)
        if self.awq:
            codes = codes.reshape(rows, -1, 8)[:, :, _AWQ_PLACES].reshape(rows, -1)
        return codes[:, first - top : last - top]


def find_columns(
    model: Checkpoint, quantisation: Mapping[str, Any], problems: list[str]
) -> dict[str, Columns]:
    """Every linear layer with a `qweight`; whether GPTQ or AWQ, its shapes tell."""
    transposed = (model.config or {}).get("model_type") in CONV1D_MODELS
    found = {}
    for name in model.tensors:
        module = name.removesuffix(".qweight")
        if module == name:
            continue
        missing = [e for e in ("qzeros", "scales") if f"{module}.{e}" not in model]
        if missing:
            problems.append(
                f"{shown(name)} has no {' and no '.join(missing)} beside it; fetch the file again"
            )
            continue
        layer = _layer(model, module, quantisation, transposed)
        if isinstance(layer, str):
            problems.append(f"{shown(module)}: {layer}")
        else:
            found[f"{module}.weight"] = layer
    return found


def _layer(
    model: Checkpoint, module: str, quantisation: Mapping[str, Any], transposed: bool
) -> Columns | str:
    """The layer, or what is wrong with it."""
    weight, zeros, scales = (model.info(f"{module}.{e}") for e in ("qweight", "qzeros", "scales"))
    if weight.dtype != torch.int32 or zeros.dtype != torch.int32 or not scales.dtype.is_floating_point:
        return f"qweight and qzeros must be int32, scales floating, not {weight.dtype}, {scales.dtype}"
    if any(len(i.shape) != 2 or not i.numel for i in (weight, zeros, scales)):
        return "qweight, qzeros and scales must be matrices that are not empty; fetch the file again"
    groups, out = scales.shape
    bits = 32 * zeros.shape[1] // out
    if zeros.shape[0] != groups or bits not in (2, 3, 4, 8) or word_count(out, bits) != zeros.shape[1]:
        return f"qzeros {list(zeros.shape)} do not fit scales {list(scales.shape)}; fetch the file again"
    awq = weight.shape[1] == zeros.shape[1] != out
    if awq and bits != 4:
        return f"AWQ with {bits} bits is not known to weft; use the model it was made from"
    if not awq and weight.shape[1] != out:
        return (
            f"qweight {list(weight.shape)} does not fit scales {list(scales.shape)}: weft reads GPTQ and "
            'AWQ\'s "gemm" order; convert the checkpoint to one of them'
        )
    inner = weight.shape[0] if awq else 32 * weight.shape[0] // bits
    index = not awq and f"{module}.g_idx" in model
    if index and model.info(f"{module}.g_idx").shape != (inner,):
        return f"g_idx must have an entry for each of the {inner} inputs; fetch the file again"
    size = _group_size(quantisation, inner, groups)
    if size is None and not index:
        return f"{groups} groups do not make {inner} inputs; state group_size in quantization_config"
    version = str(quantisation.get("checkpoint_format", "gptq"))
    return Columns(
        module, (out, inner), groups, size or inner, bits, awq=awq,
        v1=not awq and version != "gptq_v2", symmetric=not awq and quantisation.get("sym") is True,
        g_idx=index, transposed=transposed,
    )  # fmt: skip


def _group_size(quantisation: Mapping[str, Any], inner: int, groups: int) -> int | None:
    """Inputs of a group: as stated, where that makes so many groups; else equal shares, where there are."""
    stated = quantisation.get("group_size", quantisation.get("q_group_size"))
    if type(stated) is int and stated > 0 and -(-inner // stated) == groups:
        return stated
    return inner // groups if inner % groups == 0 else None
