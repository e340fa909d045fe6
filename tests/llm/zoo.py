"""Tiny models with random weights of the real transformers classes, built offline from their config classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

HIDDEN, VOCAB = 32, 96
TEXT = {"hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
ENCODER = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads",)}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": 16, "patch_size": 8}  # fmt: skip


@dataclass(frozen=True)
class Animal:
    """A class, its config for a number of layers, and something to run it on."""

    config: Callable[[Any, int], Any]
    """(transformers, layers) → config"""
    cls: str
    inputs: Callable[[], Mapping[str, torch.Tensor]]
    layers: int = 3


def tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.arange(3, 11).reshape(2, 4)}


def pixels(size: int = 16) -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * size * size).reshape(1, 3, size, size)


def seen(image: int, count: int) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([[5, *[image] * count, 6, 7]]), "pixel_values": pixels()}


def qwen_seen() -> dict[str, torch.Tensor]:
    # 16×16 pixels in patches of 4: a grid of 4×4, two by two merged to 4 tokens
    return {
        "input_ids": torch.tensor([[5, 90, *[92] * 4, 91, 6]]),
        "pixel_values": torch.linspace(-1, 1, 16 * 3 * 2 * 4 * 4).reshape(16, -1),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 0]]),
    }


def _text(config: str, cls: str, base: dict[str, Any] = TEXT, layers: int = 3, **more: Any) -> Animal:
    def made(hf: Any, n: int) -> Any:
        return getattr(hf, config)(**{**base, "num_hidden_layers": n, **more})

    return Animal(made, cls, tokens, layers)


def _both() -> dict[str, torch.Tensor]:
    return {**tokens(), "decoder_input_ids": torch.arange(3, 9).reshape(2, 3)}


ZOO: dict[str, Animal] = {
    "llama": _text("LlamaConfig", "LlamaForCausalLM", head_dim=8),
    "mistral": _text("MistralConfig", "MistralForCausalLM", head_dim=8, sliding_window=8),
    "mixtral": _text("MixtralConfig", "MixtralForCausalLM", head_dim=8, num_local_experts=3),
    "qwen2": _text("Qwen2Config", "Qwen2ForCausalLM", tie_word_embeddings=True, use_sliding_window=True,
                   sliding_window=8, max_window_layers=2),
    "qwen3": _text("Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    "qwen3_moe": _text("Qwen3MoeConfig", "Qwen3MoeForCausalLM", head_dim=8, num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=16, mlp_only_layers=[1]),
    "gemma2": _text("Gemma2Config", "Gemma2ForCausalLM", head_dim=8, sliding_window=8),
    "gemma3_text": _text("Gemma3TextConfig", "Gemma3ForCausalLM", head_dim=8, sliding_window=8, layers=4,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    "phi3": _text("Phi3Config", "Phi3ForCausalLM"),
    "gpt2": Animal(lambda hf, n: hf.GPT2Config(n_embd=HIDDEN, n_head=4, n_layer=n, vocab_size=VOCAB,
                                               n_positions=64), "GPT2LMHeadModel", tokens),
    "gpt_neox": _text("GPTNeoXConfig", "GPTNeoXForCausalLM", ENCODER),
    "olmo2": _text("Olmo2Config", "Olmo2ForCausalLM"),
    "falcon": Animal(lambda hf, n: hf.FalconConfig(hidden_size=HIDDEN, num_attention_heads=4, num_hidden_layers=n,
                                                   vocab_size=VOCAB, new_decoder_architecture=True,
                                                   num_kv_heads=2), "FalconForCausalLM", tokens),
    "mamba": Animal(lambda hf, n: hf.MambaConfig(hidden_size=HIDDEN, num_hidden_layers=n, vocab_size=VOCAB,
                                                 state_size=4), "MambaForCausalLM", tokens),
    "deepseek_v3": _text("DeepseekV3Config", "DeepseekV3ForCausalLM", ENCODER, num_key_value_heads=4,
                         q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
                         n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
                         moe_intermediate_size=16, first_k_dense_replace=1),
    "gpt_oss": _text("GptOssConfig", "GptOssForCausalLM", head_dim=8, num_local_experts=4,
                     num_experts_per_tok=2, sliding_window=8),
    "bert": _text("BertConfig", "BertForSequenceClassification", ENCODER),
    "roberta": _text("RobertaConfig", "RobertaForMaskedLM", ENCODER),
    "vit": Animal(lambda hf, n: hf.ViTConfig(**{**VISION, "num_hidden_layers": n}), "ViTForImageClassification",
                  lambda: {"pixel_values": pixels()}),
    "t5": Animal(lambda hf, n: hf.T5Config(d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=n, num_decoder_layers=2,
                                           num_heads=4, vocab_size=VOCAB), "T5ForConditionalGeneration", _both, 2),
    "bart": Animal(lambda hf, n: hf.BartConfig(
        d_model=HIDDEN, encoder_layers=n, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCAB, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=2), "BartForConditionalGeneration", _both, 2),
    "whisper": Animal(lambda hf, n: hf.WhisperConfig(
        d_model=HIDDEN, encoder_layers=n, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=VOCAB, num_mel_bins=8, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None), "WhisperForConditionalGeneration",
        lambda: {"input_features": torch.linspace(-1, 1, 128).reshape(1, 8, 16),
                 "decoder_input_ids": torch.tensor([[3, 4]])}, 2),
    "clip": Animal(lambda hf, n: hf.CLIPConfig(text_config={**ENCODER, "num_hidden_layers": n},
                                               vision_config=VISION, projection_dim=16), "CLIPModel",
                   lambda: {**tokens(), "pixel_values": pixels()}, 2),
    "llava": Animal(lambda hf, n: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT, head_dim=8, num_hidden_layers=n),
        vision_config=hf.CLIPVisionConfig(**VISION), image_token_index=95), "LlavaForConditionalGeneration",
        lambda: seen(95, 4)),
    "gemma3": Animal(lambda hf, n: hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=8, num_hidden_layers=n, sliding_window=8),
        vision_config=hf.SiglipVisionConfig(**VISION), mm_tokens_per_image=4, image_token_index=95,
        boi_token_index=93, eoi_token_index=94), "Gemma3ForConditionalGeneration",
        lambda: {**seen(95, 4), "token_type_ids": torch.tensor([[0, 1, 1, 1, 1, 0, 0]])}),
    "qwen2_5_vl": Animal(lambda hf, n: hf.Qwen2_5_VLConfig(
        text_config={**TEXT, "num_hidden_layers": n,
                     "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "depth": 2, "num_heads": 4, "patch_size": 4,
                       "window_size": 16, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [1]},
        image_token_id=92, vision_start_token_id=90, vision_end_token_id=91, video_token_id=89),
        "Qwen2_5_VLForConditionalGeneration", qwen_seen),
}  # fmt: skip
TOWERS = ("clip", "llava", "gemma3", "qwen2_5_vl")
TWO_SIDED = ("t5", "bart", "whisper")
MIXTURES = ("mixtral", "qwen3_moe", "deepseek_v3")


@cache
def transformers() -> Any:
    import transformers as hf

    hf.utils.logging.set_verbosity_error()
    hf.utils.logging.disable_progress_bar()
    return hf


def born(name: str, seed: int, layers: int | None = None) -> nn.Module:
    """A model with weights large enough that every one of them matters."""
    hf, animal = transformers(), ZOO[name]
    config = animal.config(hf, animal.layers if layers is None else layers)
    torch.manual_seed(seed)
    model: nn.Module = getattr(hf, animal.cls)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def housed(model: nn.Module, folder: Path, in_memory_names: bool = False) -> Path:
    """The model in a folder: as save_pretrained writes it, or under the names that transformers 5 has in memory."""
    model.save_pretrained(folder)  # type: ignore[operator]
    if in_memory_names:
        state: dict[str, torch.Tensor] = {}
        stored: set[int] = set()
        for name, tensor in model.state_dict().items():
            if tensor.data_ptr() not in stored:
                stored.add(tensor.data_ptr())
                state[name] = tensor.contiguous()
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def woken(name: str, folder: Path) -> nn.Module:
    """What transformers loads from a folder; no key may be missing, left over or of another shape."""
    model, told = getattr(transformers(), ZOO[name].cls).from_pretrained(folder, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"], told
    return model.eval()  # type: ignore[no-any-return]


@torch.no_grad()
def answer(name: str, model: nn.Module) -> torch.Tensor:
    """The model's output on the fixed input, in float32."""
    out = model(**ZOO[name].inputs())
    logits = out.logits_per_text if name == "clip" else out.logits
    assert logits.isfinite().all()
    return logits.float()  # type: ignore[no-any-return]
