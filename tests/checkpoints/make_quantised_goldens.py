"""Makes quantised_goldens.zlib: small tensors as bitsandbytes and compressed-tensors store and decode them.

Run by hand where both are installed (made with bitsandbytes 0.50.2 and compressed-tensors 0.20.0); the tests
read only the file: compressed, a line of JSON (case, name, dtype, shape of each tensor), then their bytes. A
name that begins with `=` is the library's own values.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import torch

GOLDENS = Path(__file__).with_name("quantised_goldens.zlib")
CASES: dict[str, dict[str, torch.Tensor]] = {}


def weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns) * (0.1 + torch.rand(rows, 1))


def bitsandbytes_cases() -> None:
    import bitsandbytes.functional as F

    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            w = weight(3, 150)
            codes, state = F.quantize_4bit(w, blocksize=64, quant_type=kind, compress_statistics=nested)
            stored = {f"a.weight.{k}": v for k, v in state.as_dict(packed=True).items()}
            case = CASES[f"bnb_{kind}{'_nested' if nested else ''}"] = {"a.weight": codes, **stored}
            case["=a.weight"] = F.dequantize_4bit(codes, state)
    codes, scale, _ = F.int8_vectorwise_quant(weight(4, 20).half())
    CASES["bnb_int8"] = {
        "a.weight": codes, "a.SCB": scale, "a.weight_format": torch.zeros((), dtype=torch.uint8),
        "=a.weight": F.int8_vectorwise_dequant(codes, scale),
    }  # fmt: skip


def compressed_cases() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def case(called: str, form: str, scale: torch.Tensor, zero: torch.Tensor | None = None,
             more: dict[str, torch.Tensor] | None = None, shape: tuple[int, int] = (3, 64), **how: object
             ) -> None:  # fmt: skip
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**how))
        state = {"weight": weight(*shape), "weight_scale": scale, **(more or {})}
        if zero is not None:
            state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(state, scheme)
        values = compressor.decompress(dict(stored), scheme)["weight"]
        CASES[called] = {f"a.{k}": v for k, v in stored.items()} | {"=a.weight": values}

    group = {"strategy": "group", "group_size": 16}
    scale = torch.rand(3, 4) * 0.1 + 0.02
    tall, zero = torch.rand(10, 2) * 0.1 + 0.02, torch.randint(-5, 5, (10, 2), dtype=torch.int8)
    for bits in (2, 3, 4, 8):
        case(f"ct_pack{bits}", "pack-quantized", scale, num_bits=bits, symmetric=True, **group)
    case("ct_pack4_zero", "pack-quantized", tall, zero, shape=(10, 32), num_bits=4, symmetric=False, **group)
    case("ct_pack4_channel", "pack-quantized", tall[:, :1], zero[:, :1], shape=(10, 32), num_bits=4,
         symmetric=False, strategy="channel")  # fmt: skip
    case("ct_int8_zero", "int-quantized", tall[:, :1], zero[:, :1], shape=(10, 32), num_bits=8,
         symmetric=False, strategy="channel")  # fmt: skip
    case("ct_int8_group", "int-quantized", scale, num_bits=8, symmetric=True, **group)
    case("ct_float8", "float-quantized", scale[:, :1], num_bits=8, type="float", symmetric=True,
         strategy="channel")  # fmt: skip
    case("ct_nvfp4", "nvfp4-pack-quantized", (torch.rand(3, 4) + 0.5).to(torch.float8_e4m3fn).float(),
         more={"weight_global_scale": torch.tensor([3.7])}, num_bits=4, type="float", symmetric=True,
         strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn)  # fmt: skip
    case("ct_mxfp4", "mxfp4-pack-quantized", 2.0 ** torch.randint(-4, 3, (3, 2)), num_bits=4, type="float",
         symmetric=True, strategy="group", group_size=32, scale_dtype=torch.uint8)  # fmt: skip


def main() -> None:
    torch.manual_seed(0)
    bitsandbytes_cases()
    compressed_cases()
    index, data = [], b""
    for case, tensors in CASES.items():
        for name, tensor in tensors.items():
            raw = tensor.detach().contiguous()
            index.append([case, name, str(raw.dtype).removeprefix("torch."), list(raw.shape)])
            data += raw.reshape(-1).view(torch.uint8).numpy().tobytes()
    GOLDENS.write_bytes(zlib.compress(json.dumps(index).encode() + b"\n" + data, 9))


if __name__ == "__main__":
    main()
