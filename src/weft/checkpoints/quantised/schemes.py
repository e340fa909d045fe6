"""Which scheme a checkpoint is quantised by: told by the tensors it holds, with config.json's help.

Whatever looks like codes must be decoded or named in an error that says what to do; nothing that may be
codes is passed on as values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.orientation import CONV1D_MODELS
from weft.checkpoints.quantised.bitsandbytes import find_blocks4
from weft.checkpoints.quantised.columns import find_columns
from weft.checkpoints.quantised.experts import find_experts
from weft.checkpoints.quantised.node import CONFIG_KEYS, Coded, Dequantised, stated_dtype
from weft.checkpoints.quantised.packed import find_packed
from weft.checkpoints.quantised.scaled import find_float4, find_scaled
from weft.errors import DataError, DataProblems
from weft.late import torch

_PACKED = (
    ".qweight", ".qzeros", "weight_packed", ".absmax", ".quant_map", ".SCB", "weight_zero_point", "_blocks",
    "weight_scale_2", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4", "weight_g_idx",
)  # fmt: skip
"""Endings that only codes' company has; left over, they mean a weight that was not understood."""

_ACTIVATIONS = {
    "input_scale", "activation_scale", "scale_input", "output_scale", "input_zero_point", "output_zero_point",
    "input_global_scale", "scaled_fp8", "k_scale", "v_scale", "q_scale",
}  # fmt: skip
"""What scales activations or the cache of keys and values, beside quantised weights: not their business."""

_READ = {"fp8", "fbgemm_fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4", "modelopt"}
_ELSEWHERE = {
    "hqq": "hqq", "aqlm": "aqlm", "quip": "quip#", "vptq": "vptq", "higgs": "transformers",
    "spqr": "spqr_quant", "eetq": "eetq", "bitnet": "transformers", "torchao": "torchao",
    "quanto": "optimum-quanto", "auto-round": "auto-round", "quark": "quark", "fp_quant": "fp_quant",
    "sinq": "sinq",
}  # fmt: skip
"""quant_method → the library that decodes it."""


def dequantised(model: Checkpoint) -> Checkpoint:
    """`model` itself if it is not quantised, else its values.

    Raises DataProblems listing every weight whose codes are incomplete or misshapen, and DataError for a
    scheme that weft does not decode, with the way to decode it.
    """
    config = model.config or {}
    quantisation = _account(config)
    method = str(quantisation.get("quant_method", ""))
    _refuse_unknown(model, method, quantisation)
    problems: list[str] = []
    coded = _find(model, quantisation, problems)
    parts = {part for weight in coded.values() for part in weight.parts}
    if method == "bitsandbytes" and config.get("model_type") in CONV1D_MODELS:
        problems.append(
            f"bitsandbytes stores {config['model_type']}'s weights transposed, which weft does not undo"
        )
    problems += [
        f"{shown(n)} scales a layer's input and belongs to its weight, which weft does not undo"
        for n in model.tensors
        if n.endswith(".pre_quant_scale")
    ]
    if not problems:
        left = [n for n in model.tensors if n.endswith(_PACKED) and n not in parts and _is_code(model, n)]
        problems += [f"{shown(n)} belongs to no weight that weft can decode" for n in left]
        problems += [
            f"{shown(n)} is there both as codes and as values" for n in coded if _twice(model, n, parts)
        ]
    if problems:
        raise DataProblems(
            f"{model.origin} is quantised{f' by {method}' if method else ''} and cannot be read as values (the "
            "model it was made from can be merged instead)",
            problems,
        )
    if not coded:
        if method in _READ - {"fp8", "fbgemm_fp8"} or quantisation.get("load_in_4bit"):
            raise DataError(
                f"{model.origin}: config.json says quantised by {method or 'bitsandbytes'}, but no tensor holds "
                "codes that weft knows; if they are values, remove quantization_config from config.json"
            )
        return model
    hidden = [n for n in model.tensors if n.rpartition(".")[2] in _ACTIVATIONS and n not in parts]
    scales = [model.info(p).dtype for p in parts if p.endswith(("scales", "scale"))]
    otherwise = scales[0] if scales and all(s == scales[0] for s in scales) else torch.bfloat16
    return Dequantised(model, coded, hidden, stated_dtype(config, otherwise))


def _account(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of the quantisation, for the model or for its language part."""
    for part in (config, config.get("text_config")):
        for key in CONFIG_KEYS:
            if isinstance(part, Mapping) and isinstance(part.get(key), Mapping):
                return dict(part[key])
    return {}


def _refuse_unknown(model: Checkpoint, method: str, quantisation: Mapping[str, Any]) -> None:
    packing = str(quantisation.get("packing_format", ""))
    if method == "auto-round" and packing.endswith(("auto_gptq", "auto_awq")):
        return  # in the tensors of GPTQ or AWQ
    if method in _ELSEWHERE:
        raise DataError(
            f"{model.origin} is quantised by {method}, whose codes weft does not decode, and codes cannot be "
            f"merged; load it with {_ELSEWHERE[method]}, write its dequantised weights as bfloat16 safetensors "
            "and merge those, or use the model it was made from"
        )
    if quantisation.get("transform_config"):
        raise DataError(
            f"{model.origin} holds rotated weights (transform_config), which mean nothing beside others; use the "
            "model it was made from"
        )
    sparsity = quantisation.get("sparsity_config")
    version = str(quantisation.get("version", "gemm")).lower()
    layout = str(quantisation.get("format", quantisation.get("checkpoint_format", "")))
    sparse = str(sparsity.get("format", "")) if isinstance(sparsity, Mapping) else ""
    if (method == "awq" and version != "gemm") or any(
        f.startswith(("marlin", "sparse")) for f in (layout, sparse)
    ):
        told = version if method == "awq" else sparse or layout
        raise DataError(
            f"{model.origin} is quantised by {method} in the layout {shown(told)}, which is made for one kernel; "
            "save it again in the common layout (gemm, gptq, pack-quantized), or use the model it was made from"
        )


def _find(model: Checkpoint, quantisation: Mapping[str, Any], problems: list[str]) -> dict[str, Coded]:
    """Every weight that is stored as codes, by its plain name."""
    coded: dict[str, Coded] = {}
    coded.update(find_columns(model, quantisation, problems))
    coded.update(find_blocks4(model, problems))
    coded.update(find_packed(model, quantisation, problems))
    coded.update(find_float4(model, problems))
    coded.update(find_experts(model, problems))
    taken = {part for weight in coded.values() for part in weight.parts}
    coded.update(find_scaled(model, quantisation, taken, problems))
    return coded


def _is_code(model: Checkpoint, name: str) -> bool:
    """`x_blocks` and the like may be names of ordinary tensors, if they hold real numbers."""
    info = model.info(name)
    return not name.endswith("_blocks") or info.dtype == torch.uint8


def _twice(model: Checkpoint, name: str, parts: set[str]) -> bool:
    return name in model and name not in parts
