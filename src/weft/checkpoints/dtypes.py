"""Storage dtypes: names, widths and rounding (the safetensors table, as torch and numpy see it).

`DType` is weft's own, so that files can be read, merged by kernels and written without torch; `DType.torch` is
torch's. Where a dtype is asked for, either will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from weft.checkpoints.execution import execution
from weft.errors import UsageError, did_you_mean
from weft.late import Tensor, torch

if TYPE_CHECKING:
    import torch as _torch


@dataclass(frozen=True)
class DType:
    """One storage dtype, under torch's name."""

    name: str
    itemsize: int
    """Bytes of one value."""
    code: str | None = None
    """What safetensors calls it; None for what it does not know."""
    raw: str | None = None
    """numpy's dtype of its bits; None where numpy has none."""
    mergeable: bool = False
    """Whether it is a real floating dtype; integers, bools and complex numbers are carried, never averaged."""

    @staticmethod
    def of(dtype: DType | _torch.dtype | str) -> DType:
        """From torch's, from what a user calls it, or as it is. Raises UsageError for an unknown name."""
        if isinstance(dtype, DType):
            return dtype
        if isinstance(dtype, str):
            return spelled(dtype)
        name = str(dtype).removeprefix("torch.")
        return _BY_NAME.get(name) or DType(name, dtype.itemsize, mergeable=dtype.is_floating_point)

    @cached_property
    def torch(self) -> _torch.dtype:
        found: _torch.dtype = getattr(torch, self.name)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return DType, (self.name, self.itemsize, self.code, self.raw, self.mergeable)

    def __str__(self) -> str:
        return self.name


F64, F32 = DType("float64", 8, "F64", "<f8", True), DType("float32", 4, "F32", "<f4", True)
F16, BF16 = DType("float16", 2, "F16", "<f2", True), DType("bfloat16", 2, "BF16", "<u2", True)

DTYPES: dict[str, DType] = {
    d.code: d
    for d in (
        F64,
        F32,
        F16,
        BF16,
        DType("float8_e4m3fn", 1, "F8_E4M3", "u1", True),
        DType("float8_e5m2", 1, "F8_E5M2", "u1", True),
        DType("float8_e4m3fnuz", 1, "F8_E4M3FNUZ", "u1", True),
        DType("float8_e5m2fnuz", 1, "F8_E5M2FNUZ", "u1", True),
        DType("float8_e8m0fnu", 1, "F8_E8M0", "u1"),
        DType("int64", 8, "I64", "<i8"),
        DType("int32", 4, "I32", "<i4"),
        DType("int16", 2, "I16", "<i2"),
        DType("int8", 1, "I8", "i1"),
        DType("uint64", 8, "U64", "<u8"),
        DType("uint32", 4, "U32", "<u4"),
        DType("uint16", 2, "U16", "<u2"),
        DType("uint8", 1, "U8", "u1"),
        DType("bool", 1, "BOOL", "?"),
        DType("complex64", 8, "C64", "<c8"),
    )
    if d.code is not None
}
"""By the name that safetensors gives them."""
_BY_NAME = {d.name: d for d in DTYPES.values()}

_SPELLINGS = {
    "float64": F64, "f64": F64, "double": F64,
    "float32": F32, "f32": F32, "float": F32, "fp32": F32,
    "float16": F16, "f16": F16, "half": F16, "fp16": F16,
    "bfloat16": BF16, "bf16": BF16,
    "float8_e4m3fn": _BY_NAME["float8_e4m3fn"], "fp8": _BY_NAME["float8_e4m3fn"],
    "float8_e5m2": _BY_NAME["float8_e5m2"],
}  # fmt: skip


def spelled(text: str) -> DType:
    """`"bfloat16"`, `"bf16"`, `"torch.bfloat16"` → BF16. Raises UsageError for others."""
    key = text.strip().lower().removeprefix("torch.")
    if key not in _SPELLINGS:
        raise UsageError(f"unknown dtype {text!r}{did_you_mean(key, _SPELLINGS)}")
    return _SPELLINGS[key]


def floating(dtype: DType | _torch.dtype | str) -> DType:
    """What weights can be stored as. Raises UsageError for integers, bools and complex numbers."""
    found = DType.of(dtype)
    if not found.mergeable:
        raise UsageError(f"cannot store weights as {dtype}: choose a floating dtype")
    return found


def parse_dtype(text: str) -> _torch.dtype:
    """`spelled`, as torch's dtype."""
    return spelled(text).torch


def dtype_name(dtype: DType | _torch.dtype | str) -> str:
    """torch.bfloat16 → `"bfloat16"`."""
    return DType.of(dtype).name


def is_mergeable(dtype: DType | _torch.dtype | str) -> bool:
    """True for the real floating dtypes; integers, bools and complex numbers are carried, never averaged."""
    return DType.of(dtype).mergeable


def round_to(x: Tensor, dtype: _torch.dtype) -> Tensor:
    """Round once, to nearest even, from the working dtype to the storage dtype.

    float64 → 16 or 8 bits must not pass through a nearest-rounded float32 (two roundings differ from one
    when the first lands on a tie), so the step through float32 rounds to odd, which keeps the tie broken. That
    takes torch ten passes; kernels, where there are any, do it in one.
    """
    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    kernels = execution().kernels
    if kernels is not None and x.device.type == "cpu" and not x.requires_grad:
        made: Tensor | None = kernels.rounded(x, dtype)
        if made is not None:
            return made
    near = x.to(torch.float32)
    error = x - near
    bits = near.view(torch.int32)
    inexact = (error != 0) & ((bits & 1) == 0) & near.isfinite()
    # a step of one in the bit pattern is one ulp away from zero; take it when |x| > |near|, else back
    outward = (error > 0) == (near > 0) if near.numel() else inexact
    step = torch.where(near == 0, 0, torch.where(outward, 1, -1)).to(torch.int32)
    return torch.where(inexact, bits + step, bits).view(torch.float32).to(dtype)
