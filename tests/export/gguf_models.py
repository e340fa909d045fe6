"""Tiny random models of real classes, saved as folders, and GGUF files read back."""

from __future__ import annotations

import torch

CONFIGS = {
    "llama": {"rope_theta": 5000.0},
    "mistral": {"head_dim": 24, "sliding_window": None},
    "mixtral": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                  "shared_expert_intermediate_size": 64, "norm_topk_prob": False, "mlp_only_layers": []},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
                  "norm_topk_prob": True, "mlp_only_layers": []},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64, "query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
    "phi": {},
    "olmo2": {},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_ctx": 64},
}  # fmt: skip
"""What the smallest model of each kind needs beside the sizes they share."""

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 96,
}  # fmt: skip


def make(kind, folder, dtype=torch.float32, **more):
    """A model of this kind with every parameter random, biases and norms too; saved in `folder`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 96} if kind == "gpt2" else SIZES
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **{**sizes, **ids, **CONFIGS[kind], **more})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    return model


def tensors_of(path):
    """name → values as float, in the shape torch would have."""
    import gguf

    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        found[tensor.name] = torch.from_numpy(values.copy()).reshape(*reversed(tensor.shape.tolist()))
    return found


def fields_of(path):
    import gguf

    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
