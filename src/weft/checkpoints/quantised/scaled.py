"""8-bit weights with scales: float8, int8 (with zero points or without), bitsandbytes' LLM.int8 and 4-bit floats.

float8, int8         weight · weight_scale (DeepSeek calls it weight_scale_inv; others scale_weight)
int8, asymmetric     (weight − weight_zero_point) · weight_scale
LLM.int8             weight · SCB / 127, a factor for each row (arXiv 2208.07339)
NVFP4, MXFP4         4-bit floats with a scale for 16 or 32 columns, and for NVFP4 one for the tensor
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.quantised.grid import Float4, Grid, Plain, Scaled, fitted, stated_blocks

_CODES = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "int8")


def find_scaled(
    model: Checkpoint, quantisation: Mapping[str, Any], taken: set[str], problems: list[str]
) -> dict[str, Scaled]:
    """8-bit weights, those `taken` aside, that have a scale; without one, a problem if codes are announced."""
    stated = stated_blocks(quantisation)
    found = {}
    for name, info in model.tensors.items():
        if info.kind.name not in _CODES or not info.numel or not info.shape or name in taken:
            continue
        module, _, last = name.rpartition(".")
        if f"{module}.SCB" in model and last == "weight":
            if (row_scaled := _llm_int8(model, name, f"{module}.SCB", problems)) is not None:
                found[name] = row_scaled
            continue
        names = (f"{name}_scale_inv", f"{name}_scale", f"{module}.scale_{last}", f"{module}.scale")
        scale = next((n for n in names if n in model), None)
        if scale is None:
            if quantisation and last == "weight":
                problems.append(f"{shown(name)} holds {info.dtype} codes and has no scale; fetch it again")
            continue
        grid = fitted(model, info.shape, name, scale, stated, problems)
        zero_name = f"{name}_zero_point"
        zero = None
        if zero_name in model:
            zero = fitted(model, info.shape, name, zero_name, stated, problems)
        if grid is not None:
            found[name] = Scaled(info.shape, Plain(name), (grid,), zero=zero)
    return found


def _llm_int8(model: Checkpoint, name: str, scale: str, problems: list[str]) -> Scaled | None:
    shape = model.info(name).shape
    layout = f"{name.rpartition('.')[0]}.weight_format"
    others = tuple(n for n in (layout,) if n in model)
    if others and (model.info(layout).numel != 1 or int(model.read(layout)[0]) != 0):
        problems.append(f"{shown(name)} is in a layout made for one GPU; save it again from bitsandbytes")
        return None
    floating = model.info(scale).dtype.is_floating_point
    if not floating or len(shape) != 2 or model.info(scale).shape not in ((shape[0],), (shape[0], 1)):
        problems.append(
            f"{shown(scale)} of shape {list(model.info(scale).shape)} does not fit {shown(name)} of shape "
            f"{list(shape)}; fetch the file again"
        )
        return None
    return Scaled(shape, Plain(name), (Grid(scale, shape, (1, shape[1])),), factor=1 / 127, others=others)


def find_float4(model: Checkpoint, problems: list[str]) -> dict[str, Scaled]:
    """NVFP4 and MXFP4 weights, two codes in a byte.

    compressed-tensors: `weight_packed`, `weight_scale`, and for NVFP4 `weight_global_scale`, which divides;
    ModelOpt: `weight`, `weight_scale` and `weight_scale_2`, which multiplies.
    """
    found = {}
    for name, info in model.tensors.items():
        if info.kind.name != "uint8" or len(info.shape) < 2 or not info.numel:
            continue
        plain = name.removesuffix("_packed") if name.endswith("weight_packed") else name
        if not plain.endswith("weight") or (plain == name and f"{plain}_scale_2" not in model):
            continue
        shape = (*info.shape[:-1], 2 * info.shape[-1])
        if f"{plain}_scale" not in model:
            problems.append(f"{shown(name)} has no {shown(plain + '_scale')}; fetch the file again")
            continue
        scale = fitted(model, shape, name, f"{plain}_scale", ((1, 16), (1, 32)), problems)
        globals_ = [n for n in (f"{plain}_scale_2", f"{plain}_global_scale") if n in model]
        whole = [fitted(model, shape, name, n, (), problems) for n in globals_]
        if scale is None or None in whole:
            continue
        kept = tuple(g for g in whole if g is not None)
        divides = bool(globals_) and globals_[0].endswith("_global_scale")
        found[plain] = Scaled(
            shape, Float4(name), (scale, *(() if divides else kept)), divisors=kept if divides else ()
        )
    return found
