"""Llama-shaped checkpoints of random weights for benchmarks: a base and fine-tunes that differ a little.

    python benchmarks/models.py FOLDER [--parameters 0.5e9] [--models 3]

Writes FOLDER/base, FOLDER/ft1 … as bf16 safetensors with a config.json that transformers reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, VOCAB = 1024, 3072, 32000


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        p = f"model.layers.{i}."
        for proj in "qkvo":
            found[f"{p}self_attn.{proj}_proj.weight"] = (HIDDEN, HIDDEN)
        for proj, shape in (
            ("gate", (INTERMEDIATE, HIDDEN)),
            ("up", (INTERMEDIATE, HIDDEN)),
            ("down", (HIDDEN, INTERMEDIATE)),
        ):
            found[f"{p}mlp.{proj}_proj.weight"] = shape
        found[f"{p}input_layernorm.weight"] = found[f"{p}post_attention_layernorm.weight"] = (HIDDEN,)
    found |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    return found


def config(layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 16, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def make(folder: Path, parameters: float = 0.5e9, models: int = 3) -> list[Path]:
    """Paths of base and fine-tunes, made unless they are there."""
    layers = max(1, round((parameters - 2 * VOCAB * HIDDEN) / (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)))
    paths = [folder / name for name in ("base", *(f"ft{i + 1}" for i in range(models)))]
    base: dict[str, torch.Tensor] | None = None
    for seed, path in enumerate(paths):
        if (path / "model.safetensors").exists():
            continue
        if base is None:
            g = torch.Generator().manual_seed(0)
            base = {
                n: (torch.ones(s) if len(s) == 1 else torch.randn(s, generator=g) * 0.02).bfloat16()
                for n, s in shapes(layers).items()
            }
        g = torch.Generator().manual_seed(seed)
        state = base if seed == 0 else {
            n: (t.float() + torch.randn(t.shape, generator=g) * 1e-3).bfloat16() for n, t in base.items()
        }  # fmt: skip
        path.mkdir(parents=True, exist_ok=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text(json.dumps(config(layers), indent=2))
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parameters", type=float, default=0.5e9)
    parser.add_argument("--models", type=int, default=3)
    args = parser.parse_args()
    for path in make(args.folder, args.parameters, args.models):
        print(path, f"{(path / 'model.safetensors').stat().st_size:,} bytes")
