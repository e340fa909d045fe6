"""Checkpoints of any size that take no room: safetensors files whose values are holes."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

WIDTH = {"BF16": 2, "F32": 4}


def hollow(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, config: Mapping[str, Any]
) -> Path:
    """A model folder of zeros."""
    folder.mkdir()
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = prod(shape) * WIDTH[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def billion(layers: int = 16) -> dict[str, tuple[int, ...]]:
    """The shapes of Llama 3.2 1B."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128256, 2048),
        "model.norm.weight": (2048,),
    }
    for i in range(layers):
        for part, shape in (
            ("self_attn.q_proj", (2048, 2048)), ("self_attn.k_proj", (512, 2048)),
            ("self_attn.v_proj", (512, 2048)), ("self_attn.o_proj", (2048, 2048)),
            ("mlp.gate_proj", (8192, 2048)), ("mlp.up_proj", (8192, 2048)), ("mlp.down_proj", (2048, 8192)),
            ("input_layernorm", (2048,)), ("post_attention_layernorm", (2048,)),
        ):  # fmt: skip
            shapes[f"model.layers.{i}.{part}.weight"] = shape
    return shapes


def grams(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Their Gram matrices, as `weft measure` keeps them."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        embed = "embed" in name
        size = (shape[0],) if embed else (shape[-1],) if len(shape) == 1 else (shape[-1], shape[-1])
        found[f"gram/{name}"] = size
    return found
