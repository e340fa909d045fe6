"""Names, widths and rounding of the storage dtypes (the safetensors table, as torch sees it)."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.errors import UsageError, did_you_mean

SAFETENSORS_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}

_SPELLINGS = {
    "float64": torch.float64, "f64": torch.float64, "double": torch.float64,
    "float32": torch.float32, "f32": torch.float32, "float": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "f16": torch.float16, "half": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn, "fp8": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def parse_dtype(text: str) -> torch.dtype:
    """`"bfloat16"`, `"bf16"`, `"torch.bfloat16"` → torch.bfloat16. Raises UsageError for others."""
    key = text.strip().lower().removeprefix("torch.")
    if key not in _SPELLINGS:
        raise UsageError(f"unknown dtype {text!r}{did_you_mean(key, _SPELLINGS)}")
    return _SPELLINGS[key]


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 → `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def is_mergeable(dtype: torch.dtype) -> bool:
    """True for the real floating dtypes; integers, bools and complex numbers are carried, never averaged."""
    return dtype.is_floating_point and dtype != torch.float8_e8m0fnu


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round once, to nearest even, from the working dtype to the storage dtype.

    float64 → 16 or 8 bits must not pass through a nearest-rounded float32 (two roundings differ from one
    when the first lands on a tie), so the step through float32 rounds to odd, which keeps the tie broken.
    """
    if x.dtype != torch.float64 or dtype in (torch.float64, torch.float32):
        return x.to(dtype)
    near = x.to(torch.float32)
    error = x - near
    bits = near.view(torch.int32)
    inexact = (error != 0) & ((bits & 1) == 0) & near.isfinite()
    # a step of one in the bit pattern is one ulp away from zero; take it when |x| > |near|, else back
    outward = (error > 0) == (near > 0) if near.numel() else inexact
    step = torch.where(near == 0, 0, torch.where(outward, 1, -1)).to(torch.int32)
    return torch.where(inexact, bits + step, bits).view(torch.float32).to(dtype)
