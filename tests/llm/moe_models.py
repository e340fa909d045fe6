"""Tiny dense models and mixtures of the real classes, as checkpoints in memory."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
import transformers
from hf_models import tiny
from torch import Tensor

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.llm.hf import to_transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}  # fmt: skip
MLA = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
       "first_k_dense_replace": 2, "num_key_value_heads": 4}  # fmt: skip
IDS = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(0))


def checkpoint(module: Any, origin: str = "model", assets: tuple[Asset, ...] = ()) -> Checkpoint:
    config = json.loads(module.config.to_json_string(use_diff=False))
    return Model(
        StateDict(dict(module.state_dict())), config | {"architectures": [type(module).__name__]}, assets,
        origin,
    )  # fmt: skip


def dense(kind: str, seed: int = 0, /, **config: Any) -> Any:
    """A random dense model whose weights are large enough that mistakes show."""
    made = tiny(kind, seed, **(SIZES | config))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return made


@cache
def mixture(kind: str = "MixtralForCausalLM", seed: int = 0, experts: int = 4) -> Any:
    """A random mixture with routers that choose."""
    counts = {"num_local_experts": experts, "num_experts": experts, "n_routed_experts": experts}
    known = getattr(transformers, kind).config_class
    given = {k: v for k, v in counts.items() if k in known.__dataclass_fields__} or {"num_experts": experts}
    extra = {"num_experts_per_tok": 2} | given
    if kind == "DeepseekV3ForCausalLM":
        extra |= MLA | {
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 24,
        }
    elif kind == "DeepseekV2ForCausalLM":
        extra |= MLA | {"first_k_dense_replace": 0, "moe_intermediate_size": 24}
    elif kind not in ("MixtralForCausalLM", "OlmoeForCausalLM"):
        extra |= {"moe_intermediate_size": 24, "n_shared_experts": 1, "first_k_dense_replace": 0}
    made = dense(kind, seed, **extra)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for name, p in [*made.named_parameters(), *made.named_buffers()]:
            if ".mlp.gate." in name:
                p.add_(torch.randn(p.shape, generator=generator) * (0.05 if "bias" in name else 1.0))
    return made


def logits(model: Checkpoint | Any, ids: Tensor = IDS) -> Tensor:
    module = to_transformers(model, dtype=torch.float32) if isinstance(model, Checkpoint) else model
    with torch.no_grad():
        return module(input_ids=ids).logits


def on_disk(module: Any, tmp_path: Any) -> Checkpoint:
    """The mixture in the layout that its own save_pretrained writes: one tensor an expert."""
    import weft

    module.save_pretrained(tmp_path)
    return weft.load(tmp_path)


def word_tokenizer() -> tuple[Asset, ...]:
    """A tokenizer of whole words over the tiny vocabulary, as the file that travels with a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "sum", "add", "code", "python", "poem", "rose", "love", "proof", "loop"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    text = made.to_str().encode()
    config = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}).encode()
    return (Asset("tokenizer.json", lambda: text), Asset("tokenizer_config.json", lambda: config))
