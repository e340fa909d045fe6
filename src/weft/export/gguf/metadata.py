"""GGUF's metadata from config.json: sizes, norms, rotary embeddings, experts."""

from __future__ import annotations

from collections.abc import Mapping
from math import log, pi, sqrt
from typing import Any

import torch
from torch import Tensor

from weft.errors import DataError
from weft.export.gguf.architectures import Architecture


class Sizes:
    """The numbers of a config under one name each; DataError for one that is missing."""

    def __init__(self, config: Mapping[str, Any], origin: str) -> None:
        self.config, self.origin = config, origin
        self.hidden = self.whole("hidden_size", "n_embd")
        self.blocks = self.whole("num_hidden_layers", "n_layer")
        self.heads = self.whole("num_attention_heads", "n_head")
        self.kv_heads = self.optional("num_key_value_heads") or self.heads
        self.head = self.optional("head_dim") or self.hidden // self.heads
        self.context = self.whole("max_position_embeddings", "n_positions", "n_ctx")
        self.feed_forward = self.optional("intermediate_size", "n_inner") or 4 * self.hidden

    def optional(self, *keys: str) -> int | None:
        """The first of the keys that is stated; DataError unless it is a whole number."""
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                if type(value) is not int or value < 1:
                    raise DataError(f"{self.origin}: config.json has no usable {key}: {value!r}; correct it")
                return value
        return None

    def whole(self, *keys: str) -> int:
        found = self.optional(*keys)
        if found is None:
            raise DataError(f"{self.origin}: config.json states no {keys[0]}; add it")
        return found

    def number(self, *keys: str) -> float | None:
        value = next((self.config[k] for k in keys if self.config.get(k) is not None), None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise DataError(f"{self.origin}: config.json has no usable {keys[0]}: {value!r}; correct it")
        return None if value is None else float(value)

    def rope(self, kind: str = "full_attention") -> Mapping[str, Any]:
        """Rotary settings in the newer form (rope_type, rope_theta …), whichever form config.json has."""
        found = self.config.get("rope_parameters")
        if isinstance(found, Mapping):
            inner = found.get(kind, found.get("full_attention"))
            return inner if isinstance(inner, Mapping) else found
        scaling = self.config.get("rope_scaling")
        scaling = scaling if isinstance(scaling, Mapping) else {}
        kept = {"rope_type": scaling.get("type", "default"), **scaling}
        for key in ("rope_theta", "partial_rotary_factor"):
            if self.config.get(key) is not None:
                kept[key] = self.config[key]
        return kept

    @property
    def rotary(self) -> int:
        """Dimensions of a head that rotate."""
        part = self.rope().get("partial_rotary_factor") or self.number("partial_rotary_factor") or 1.0
        return int(self.head * float(part))

    @property
    def experts(self) -> int | None:
        return self.optional("num_local_experts", "num_experts")


def add_metadata(writer: Any, known: Architecture, sizes: Sizes) -> None:
    """Everything but the tokenizer. `writer` is a gguf.GGUFWriter."""
    writer.add_context_length(sizes.context)
    writer.add_embedding_length(sizes.hidden)
    writer.add_block_count(sizes.blocks)
    writer.add_feed_forward_length(sizes.feed_forward)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.kv_heads)
    if known.head_size and sizes.optional("head_dim"):
        writer.add_key_length(sizes.head)
        writer.add_value_length(sizes.head)
    epsilon = sizes.number("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")
    if epsilon is None:
        raise DataError(f"{sizes.origin}: config.json states no epsilon for the norms (rms_norm_eps); add it")
    (writer.add_layer_norm_eps if known.layer_norm else writer.add_layer_norm_rms_eps)(epsilon)
    if known.rotary:
        _add_rope(writer, known, sizes)
    if sizes.experts:
        _add_experts(writer, sizes)
    for key, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (cap := sizes.number(key)) is not None:
            add(cap)
    if known.arch in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(int(sizes.number("sliding_window") or 0))


def _add_experts(writer: Any, sizes: Sizes) -> None:
    writer.add_expert_count(sizes.experts)
    writer.add_expert_used_count(sizes.whole("num_experts_per_tok"))
    if (each := sizes.optional("moe_intermediate_size")) is not None:
        writer.add_expert_feed_forward_length(each)
    if (shared := sizes.optional("shared_expert_intermediate_size")) is not None:
        writer.add_expert_shared_feed_forward_length(shared)


def _add_rope(writer: Any, known: Architecture, sizes: Sizes) -> None:
    import gguf

    rope = sizes.rope()
    writer.add_rope_dimension_count(sizes.rotary)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))
    if known.arch == "gemma3":
        local = (
            sizes.rope("sliding_attention").get("rope_theta") if "rope_parameters" in sizes.config else None
        )
        writer.add_rope_freq_base_swa(float(local or sizes.number("rope_local_base_freq") or 10000.0))
    kind = str(rope.get("rope_type", "default"))
    if kind in ("default", "llama3"):
        return  # llama3's scaling is a tensor, see `rope_tensors`
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope.get("original_max_position_embeddings", sizes.context)))
    elif kind in ("longrope", "su") and known.arch == "phi3":
        original = _original_context(sizes)
        writer.add_rope_scaling_orig_ctx_len(original)
        if (stretch := sizes.context / original) > 1:
            writer.add_rope_scaling_attn_factors(sqrt(1 + log(stretch) / log(original)))
    else:
        raise DataError(f"{sizes.origin}: GGUF's {known.arch} has no rotary scaling of type {kind!r}")


def _original_context(sizes: Sizes) -> int:
    stated = sizes.rope().get("original_max_position_embeddings")
    return int(stated) if stated else sizes.whole("original_max_position_embeddings")


def rope_tensors(known: Architecture, sizes: Sizes) -> dict[str, Tensor]:
    """Scalings of rotary frequencies that GGUF keeps as tensors, float32: llama3's and longrope's."""
    rope = sizes.rope() if known.rotary else {}
    kind = rope.get("rope_type")
    if kind == "llama3":
        return {"rope_freqs.weight": llama3_factors(sizes, rope)}
    if kind in ("longrope", "su"):
        return {
            f"rope_factors_{which}.weight": torch.tensor(rope[f"{which}_factor"], dtype=torch.float32)
            for which in ("long", "short")
        }
    return {}


def llama3_factors(sizes: Sizes, rope: Mapping[str, Any]) -> Tensor:
    """What each frequency is divided by, `[head / 2]`, float32.

    With λ the wavelength of a frequency and C the original context: 1 where λ < C / high_freq_factor, `factor`
    where λ > C / low_freq_factor, and between them 1 / ((1 − s) / factor + s) with
    s = (C / λ − low_freq_factor) / (high_freq_factor − low_freq_factor).
    """
    theta, factor = float(rope.get("rope_theta") or 10000.0), float(rope["factor"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    original = float(rope["original_max_position_embeddings"])
    length = 2 * pi * theta ** (torch.arange(0, sizes.rotary, 2, dtype=torch.float64) / sizes.rotary)
    smooth = (original / length - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(length < original / high, 1.0, torch.where(length > original / low, factor, between))
    return found.float()
