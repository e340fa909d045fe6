"""The kinds of mixture that dense models can become: a small table of names and config fields.

    family        from                       shared expert   router
    ------        ----                       -------------   ------
    mixtral       llama, mistral             none            softmax over the chosen
    qwen2_moe     qwen2                      one, gated      softmax, normalised
    qwen3_moe     qwen3                      none            softmax, normalised
    glm4_moe      llama, mistral, qwen2/3    one             sigmoid, normalised (as DeepSeek-V3's)
    deepseek      llama, mistral             none or one     softmax, normalised; not in transformers
    deepseek_v3   deepseek_v3 without moe    one             sigmoid, normalised
    deepseek_v2   deepseek_v2 without moe    one             softmax, not normalised by transformers

Where the router normalises, k identical experts with no shared one compute what one of them computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from weft.errors import UsageError, did_you_mean

PARTS = ("gate_proj", "up_proj", "down_proj")
"""The three matrices of a gated MLP, as the dense models call them: down(act(gate x) · up x)."""

_QKVO = frozenset(f"self_attn.{p}_proj.weight" for p in "qkvo")
_QKV_BIAS = frozenset(f"self_attn.{p}_proj.bias" for p in "qkv")
_QK_NORM = frozenset({"self_attn.q_norm.weight", "self_attn.k_norm.weight"})
_NORMS = frozenset({"input_layernorm.weight", "post_attention_layernorm.weight"})


@dataclass(frozen=True)
class Family:
    """One kind of mixture. Config values in braces are filled in: see `fill`."""

    name: str
    """Its `model_type`."""
    title: str
    """What MergeKit calls it."""
    architecture: str
    dense: tuple[str, ...]
    """Types of dense model whose attention it has."""
    fields: Mapping[str, Any]
    block: str = "mlp"
    """Where the mixture lies in a layer, with one tensor an expert."""
    parts: tuple[str, str, str] = PARTS
    """What it calls gate, up and down."""
    correction: str | None = None
    """A bias of the choice of experts, which starts at zero."""
    shared: str | None = None
    shared_gate: str | None = None
    shared_required: bool = False
    fuses: bool = True
    """Whether transformers 5 has the class, so that a fused layout exists."""
    window: Literal["none", "all", "layers"] = "none"
    """Which sliding windows it can have: none, the same in all layers, or one by layer."""
    required: frozenset[str] = frozenset()
    """Tensors of a layer's attention that the dense model must have beside the usual ones."""
    optional: frozenset[str] = frozenset()
    any_attention: bool = False
    normalises: bool = True


_DEEPSEEK = {
    "n_routed_experts": "{experts}", "num_experts_per_tok": "{top_k}", "moe_intermediate_size": "{size}",
    "n_shared_experts": "{shared_count}", "norm_topk_prob": True, "first_k_dense_replace": 0,
    "routed_scaling_factor": 1.0,
}  # fmt: skip
_ONE_GROUP = {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
_QWEN = {
    "num_experts": "{experts}", "num_experts_per_tok": "{top_k}", "moe_intermediate_size": "{size}",
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
_BIAS = "gate.e_score_correction_bias"

FAMILIES = (
    Family("mixtral", "Mixtral", "MixtralForCausalLM", ("llama", "mistral"),
           {"num_local_experts": "{experts}", "num_experts_per_tok": "{top_k}",
            "intermediate_size": "{size}"},
           block="block_sparse_moe", parts=("w1", "w3", "w2"), window="all"),
    Family("qwen2_moe", "Qwen MoE", "Qwen2MoeForCausalLM", ("qwen2",),
           _QWEN | {"shared_expert_intermediate_size": "{shared_size}", "qkv_bias": True},
           shared="shared_expert", shared_gate="shared_expert_gate.weight", shared_required=True,
           window="layers", required=_QKV_BIAS),
    Family("qwen3_moe", "Qwen3 MoE", "Qwen3MoeForCausalLM", ("qwen3",), _QWEN, window="all",
           required=_QK_NORM),
    Family("glm4_moe", "GLM-4 MoE", "Glm4MoeForCausalLM", ("llama", "mistral", "qwen2", "qwen3"),
           _DEEPSEEK | _ONE_GROUP | {"use_qk_norm": "{qk_norm}", "attention_bias": "{qkv_bias}",
                                     "partial_rotary_factor": 1.0},
           correction=_BIAS, shared="shared_experts", shared_required=True, optional=_QKV_BIAS | _QK_NORM),
    Family("deepseek", "DeepSeek MoE", "DeepseekForCausalLM", ("llama", "mistral"),
           _DEEPSEEK | {"moe_layer_freq": 1, "scoring_func": "softmax"}, shared="shared_experts",
           fuses=False),
    Family("deepseek_v3", "DeepSeek-V3", "DeepseekV3ForCausalLM", ("deepseek_v3",),
           _DEEPSEEK | _ONE_GROUP, correction=_BIAS, shared="shared_experts", shared_required=True,
           any_attention=True),
    Family("deepseek_v2", "DeepSeek-V2", "DeepseekV2ForCausalLM", ("deepseek_v2",),
           _DEEPSEEK | {"norm_topk_prob": False, "topk_method": "greedy", "n_group": None,
                        "topk_group": None},
           shared="shared_experts", shared_required=True, any_attention=True, normalises=False),
)  # fmt: skip

_USUAL = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0,
    "head_dim": None,
}  # fmt: skip
DENSE_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _USUAL | {"max_position_embeddings": 2048, "num_key_value_heads": None, "bos_token_id": 1,
                       "eos_token_id": 2},
    "mistral": _USUAL | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1,
                         "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": _USUAL | {"max_position_embeddings": 32768, "num_key_value_heads": 32,
                       "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": _USUAL | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
                       "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28},
}  # fmt: skip
"""What a dense model's class assumes where its config is silent; the mixture's class assumes otherwise."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of one mixture."""

    experts: int
    top_k: int
    size: int
    """Width of a routed expert's MLP."""
    shared_size: int = 0
    attention: frozenset[str] = field(default=frozenset())
    """What the attention of a layer consists of, as names within the layer."""


def choose(dense: str, wanted: str | None, shared: bool, attention: frozenset[str]) -> Family:
    """The family for a dense model of type `dense`: the one asked for, or the first that can hold it.

    `shared` tells whether there is a shared expert, `attention` what a layer has beside its MLP. Raises
    UsageError saying what keeps each family from it.
    """
    candidates = list(FAMILIES)
    if wanted is not None:
        key = wanted.lower()
        candidates = [f for f in FAMILIES if key == f.name] or [
            f for f in FAMILIES if f.title.lower().startswith(key)
        ][:1]
        if not candidates:
            known = [f.name for f in FAMILIES]
            raise UsageError(
                f"architecture: there is no mixture {wanted!r}{did_you_mean(key, known)}; "
                f"known are {', '.join(known)}"
            )
    reasons = []
    for family in candidates:
        reason = _obstacle(family, dense, shared, attention)
        if reason is None:
            return family
        if wanted is not None or dense in family.dense:
            reasons.append(f"{family.name}: {reason}")
    if not reasons:
        known = sorted({d for f in FAMILIES for d in f.dense})
        raise UsageError(
            f"base_model is of type {dense!r}; mixtures can be made of {', '.join(known)} models"
        )
    raise UsageError("no mixture can be made of these models: " + "; ".join(reasons))


def _obstacle(family: Family, dense: str, shared: bool, attention: frozenset[str]) -> str | None:
    """Why a family cannot hold the model, or None."""
    if dense not in family.dense:
        return f"its attention is that of {', '.join(family.dense)}, not of {dense}"
    if shared and family.shared is None:
        return "it has no shared expert"
    if not shared and family.shared_required:
        return (
            "it needs a shared expert: add one model under shared_experts (residual_scale: 0 makes it silent)"
        )
    if family.any_attention:
        return None
    needed = _QKVO | _NORMS | family.required
    if missing := sorted(needed - attention):
        return f"the layers lack {', '.join(missing)}"
    if extra := sorted(attention - needed - family.optional):
        return f"it has no place for {', '.join(extra)}"
    partial = [p for p in (_QKV_BIAS, _QK_NORM) if attention & p and not p <= attention]
    return f"the layers have only some of {', '.join(sorted(partial[0]))}" if partial else None


def mixture_config(family: Family, dense: Mapping[str, Any], layers: int, sizes: Sizes) -> dict[str, Any]:
    """config.json of the mixture: the dense model's, with the family's fields and what was left implicit.

    Raises UsageError where the dense model has sliding windows that the family cannot have.
    """
    kind = str(dense.get("model_type"))
    config = DENSE_DEFAULTS.get(kind, {}) | {k: v for k, v in dense.items() if k != "auto_map"}
    if config.get("num_key_value_heads") is None and "num_attention_heads" in config:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim", 0) is None:
        del config["head_dim"]
    _rope(config, dense)
    windows = _windows(kind, config, layers)
    if any(windows) and (family.window == "none" or (family.window == "all" and not all(windows))):
        which = "in all layers" if all(windows) else "in some layers"
        raise UsageError(f"base_model has a sliding window {which}, which a {family.name} cannot have")
    if family.window == "layers" and any(windows):
        config["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    if kind == "llama" or not any(windows):
        config["sliding_window"] = None
    config |= {k: fill(v, sizes) for k, v in family.fields.items()}
    if config.get("partial_rotary_factor") == 1.0 and isinstance(config.get("rope_parameters"), Mapping):
        config["rope_parameters"] = {**config["rope_parameters"], "partial_rotary_factor": 1.0}
    return {**config, "architectures": [family.architecture], "model_type": family.name}


def fill(value: Any, sizes: Sizes) -> Any:
    """`"{experts}"` → how many there are, and so on; any other value as it is."""
    known = {
        "{experts}": sizes.experts,
        "{top_k}": sizes.top_k,
        "{size}": sizes.size,
        "{shared_size}": sizes.shared_size,
        "{shared_count}": sizes.shared_size // sizes.size or None,
        "{qk_norm}": sizes.attention >= _QK_NORM,
        "{qkv_bias}": sizes.attention >= _QKV_BIAS,
    }
    return known.get(value, value) if isinstance(value, str) else value


def _rope(config: dict[str, Any], dense: Mapping[str, Any]) -> None:
    """rope_theta as transformers 4 reads it beside rope_parameters, which 5 writes."""
    given = dense.get("rope_parameters")
    if isinstance(given, Mapping) and "rope_theta" in given:
        config["rope_theta"] = given["rope_theta"]
    elif isinstance(given, Mapping):
        config["rope_parameters"] = {**given, "rope_theta": config.get("rope_theta", 10000.0)}


def _windows(kind: str, config: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers of the dense model attend within a sliding window."""
    if kind == "mistral":
        return [config.get("sliding_window") is not None] * layers
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return [False] * layers
    types = config.get("layer_types")
    if isinstance(types, list) and len(types) == layers:
        return [t == "sliding_attention" for t in types]
    return [i >= int(config.get("max_window_layers") or 0) for i in range(layers)]
