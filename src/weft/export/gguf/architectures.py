"""What llama.cpp assumes of each architecture: how its tensors are laid out and what its config may say.

Names come from the gguf package's own table; this one holds only what no table there tells. An architecture
belongs here when its graph in llama.cpp is known to compute what transformers computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, DataProblems, did_you_mean


@dataclass(frozen=True, slots=True)
class Architecture:
    """One `model_type` of transformers."""

    arch: str
    """`general.architecture`."""
    permuted: bool = False
    """Rows of the query and key projections are reordered, since rotary pairs lie side by side there."""
    norm_offset: bool = False
    """Norms multiply by 1 + w in transformers; GGUF stores 1 + w."""
    transposed: tuple[str, ...] = ()
    """GGUF names of weights that transformers stores as `[in, out]`."""
    always_tied: bool = False
    """There is no place for a head of its own."""
    layer_norm: bool = False
    """Layer norms with a mean, not RMS norms."""
    rotary: bool = True
    head_size: bool = True
    """States the size of a head where config.json does."""
    full_every: int = 1
    """Every so many layers attend to everything, those between to a window."""
    activations: tuple[str, ...] = ("silu",)
    assumes: Mapping[str, Any] = field(default_factory=dict)
    """Config keys that, where present, must have this value: the graph computes nothing else."""


_GEMMA = ("gelu", "gelu_pytorch_tanh")
_QWEN_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False}

ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "mixtral": Architecture("llama", permuted=True),
    "qwen2": Architecture("qwen2", assumes={"use_sliding_window": False}),
    "qwen3": Architecture("qwen3", assumes={"use_sliding_window": False, "attention_bias": False}),
    "qwen2_moe": Architecture("qwen2moe", assumes={**_QWEN_MOE, "norm_topk_prob": False}),
    "qwen3_moe": Architecture("qwen3moe", assumes={**_QWEN_MOE, "norm_topk_prob": True}),
    "gemma": Architecture("gemma", norm_offset=True, always_tied=True, activations=_GEMMA),
    "gemma2": Architecture("gemma2", norm_offset=True, always_tied=True, full_every=2, activations=_GEMMA),
    "gemma3_text": Architecture(
        "gemma3", norm_offset=True, always_tied=True, full_every=6, activations=_GEMMA
    ),
    "phi3": Architecture("phi3", head_size=False),
    "phi": Architecture(
        "phi2", layer_norm=True, head_size=False, activations=("gelu_new",), assumes={"qk_layernorm": False}
    ),
    "olmo2": Architecture("olmo2"),
    "starcoder2": Architecture(
        "starcoder2", layer_norm=True, activations=_GEMMA, assumes={"norm_type": "layer_norm"}
    ),
    "gpt2": Architecture(
        "gpt2",
        layer_norm=True,
        rotary=False,
        activations=("gelu_new",),
        transposed=("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight"),
        assumes={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
}
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "activation_function")


def architecture_of(checkpoint: Checkpoint) -> tuple[Architecture, Mapping[str, Any]]:
    """The architecture and the config; DataError where GGUF cannot hold the model."""
    config = checkpoint.config
    if config is None:
        raise DataError(
            f"{checkpoint.origin} has no config.json, from which GGUF's metadata are made; add the model's own"
        )
    kind = str(config.get("model_type", ""))
    if kind not in ARCHITECTURES:
        parts = ", which is several models in one; export its text model" if "text_config" in config else ""
        raise DataError(
            f"{checkpoint.origin}: weft cannot write the architecture {kind or 'without model_type'!r} as GGUF"
            f"{parts}{did_you_mean(kind, ARCHITECTURES)}; it can write {', '.join(ARCHITECTURES)}. Save it as "
            "safetensors and convert it with llama.cpp's convert_hf_to_gguf.py"
        )
    known = ARCHITECTURES[kind]
    problems = [
        f"{key} is {config[key]!r}, but llama.cpp computes as if it were {value!r}"
        for key, value in known.assumes.items()
        if key in config and config[key] != value
    ]
    stated = next((config[k] for k in _ACTIVATION_KEYS if config.get(k)), known.activations[0])
    if stated not in known.activations:
        problems.append(f"the activation is {stated!r}, but llama.cpp computes {known.activations[-1]!r}")
    problems += _attention_problems(known, config)
    if problems:
        raise DataProblems(f"{checkpoint.origin} would compute something else as GGUF", problems)
    return known, config


def _attention_problems(known: Architecture, config: Mapping[str, Any]) -> list[str]:
    """Windows in other layers than llama.cpp takes them to be in, and scores scaled otherwise."""
    problems = []
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        every = known.full_every
        expected = ["full" if (i + 1) % every == 0 else "sliding" for i in range(len(kinds))]
        if kinds != [f"{kind}_attention" for kind in expected]:
            told = f"one layer in {every} has" if every > 1 else "all layers have"
            problems.append(f"layer_types are others than llama.cpp's: there {told} full attention")
    scale = config.get("query_pre_attn_scalar")
    if scale is not None:
        heads, hidden = config.get("num_attention_heads") or 1, config.get("hidden_size") or 0
        # the 27B models are known by their number of layers, and only they differ
        large = {"gemma2": 46, "gemma3": 62}.get(known.arch) == config.get("num_hidden_layers")
        wanted = hidden // heads if large else config.get("head_dim", scale)
        if scale != wanted:
            problems.append(f"query_pre_attn_scalar is {scale!r}, but llama.cpp computes with {wanted!r}")
    return problems


def window_note(known: Architecture, config: Mapping[str, Any]) -> list[str]:
    """What to tell where a window of attention is stated that llama.cpp's graph does not have."""
    window = config.get("sliding_window")
    if not window or known.arch in ("gemma2", "gemma3", "phi3") or config.get("use_sliding_window") is False:
        return []
    return [f"config.json states a window of {window} tokens; llama.cpp attends to all, which is the same up to "
            f"{window} tokens"]  # fmt: skip
