"""Tiny models and recipes that MergeKit and weft both run, and what of their outputs is kept to compare.

`benchmarks/parity.py` runs both and compares whole tensors; it can write `goldens.npz`, three projections of every
tensor that MergeKit 0.1.5 wrote, which `test_goldens.py` holds weft against where MergeKit is not installed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import weft
from weft.checkpoints.base import Checkpoint

HIDDEN, INNER, VOCAB, LAYERS, HEADS, KV = 16, 24, 32, 4, 4, 2
WORDS = ["<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCAB - 3))]


def _draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers that depend on seed and name alone, whatever torch is there."""
    key = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key)).standard_normal(shape)


def shapes(vocab: int = VOCAB, layers: int = LAYERS) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, HIDDEN)}
    narrow = HIDDEN // HEADS * KV
    for i in range(layers):
        p = f"model.layers.{i}."
        for proj, rows in (("q", HIDDEN), ("k", narrow), ("v", narrow), ("o", HIDDEN)):
            found[f"{p}self_attn.{proj}_proj.weight"] = (rows, HIDDEN)
        found |= {f"{p}mlp.{x}_proj.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        found[f"{p}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{p}{x}_layernorm.weight": (HIDDEN,) for x in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (vocab, HIDDEN)}


def config(vocab: int = VOCAB, layers: int = LAYERS) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": KV, "head_dim": HIDDEN // HEADS, "vocab_size": vocab, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "max_position_embeddings": 64, "tie_word_embeddings": False, "dtype": "float32",
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def weights(seed: int, size: float, vocab: int = VOCAB) -> dict[str, Tensor]:
    """A base (seed 0), or the base and a difference of that relative size."""
    found = {}
    for name, shape in shapes(vocab).items():
        own = shape if len(shape) == 1 else (max(shape[0], vocab), *shape[1:]) if shape[0] == vocab else shape
        start = 1 + 0.1 * _draw(0, name, own) if len(shape) == 1 else 0.3 * _draw(0, name, own)
        if seed:
            start = start + size * 0.3 * _draw(seed, name, own)
        found[name] = torch.from_numpy(start[: shape[0]].astype(np.float32))
    return found


def tokenizer(words: list[str]) -> str:
    extra = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": words[i], **extra} for i in range(3)],
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<unk>"},
    })  # fmt: skip


def write(folder: Path, state: Mapping[str, Tensor], words: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config(len(words))))
    (folder / "tokenizer.json").write_text(tokenizer(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
    }))  # fmt: skip


def seq2seq(folder: Path, seed: int) -> None:
    """A T5 of two blocks a side."""
    stacks = {"encoder": ("SelfAttention",), "decoder": ("SelfAttention", "EncDecAttention")}
    found: dict[str, tuple[int, ...]] = {"shared.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    for stack, attentions in stacks.items():
        for i in range(2):
            for j, kind in enumerate(attentions):
                p = f"{stack}.block.{i}.layer.{j}."
                found |= {f"{p}{kind}.{x}.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
                found[f"{p}layer_norm.weight"] = (HIDDEN,)
            p = f"{stack}.block.{i}.layer.{len(attentions)}."
            found |= {f"{p}DenseReluDense.{x}.weight": (INNER, HIDDEN) for x in ("wi_0", "wi_1")}
            found[f"{p}DenseReluDense.wo.weight"] = (HIDDEN, INNER)
            found[f"{p}layer_norm.weight"] = (HIDDEN,)
        found[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (8, HEADS)
        found[f"{stack}.final_layer_norm.weight"] = (HIDDEN,)
    state = {n: torch.from_numpy(_draw(seed, n, s).astype(np.float32)) for n, s in found.items()}
    write(folder, state, WORDS)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": HIDDEN, "d_ff": INNER,
        "d_kv": HIDDEN // HEADS, "num_heads": HEADS, "num_layers": 2, "num_decoder_layers": 2,
        "relative_attention_num_buckets": 8, "vocab_size": VOCAB, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "decoder_start_token_id": 0, "dtype": "float32",
    }))  # fmt: skip


def adapter(folder: Path, base: Path) -> None:
    """A LoRA of rank 3 on the queries and the gates."""
    state = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes().items() if "q_proj" in n or "gate_proj" in n):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = _draw(7, f"{name}.a", (3, columns)), _draw(7, f"{name}.b", (rows, 3))
        state[f"{stem}.lora_A.weight"] = torch.from_numpy(0.2 * a.astype(np.float32))
        state[f"{stem}.lora_B.weight"] = torch.from_numpy(0.2 * b.astype(np.float32))
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 3,
        "lora_alpha": 6, "target_modules": ["q_proj", "gate_proj"], "lora_dropout": 0.0, "bias": "none",
    }))  # fmt: skip


def models(folder: Path) -> dict[str, Path]:
    """`base`, fine-tunes `a b c`, one close by, one far off, two with other words, an adapter, three T5."""
    paths = {n: folder / n for n in ("base", "a", "b", "c", "near", "far", "moved", "more", "lora")}
    for seed, name in enumerate(("t5", "t5a", "t5b")):
        paths[name] = folder / name
        seq2seq(paths[name], 20 + seed)
    for seed, (name, size) in enumerate((("base", 0), ("a", 0.3), ("b", 0.3), ("c", 0.3), ("near", 0.01))):
        write(paths[name], weights(seed, size), WORDS)
    for seed, name, size in ((9, "hair", 1e-3), (10, "hair2", 3e-3)):
        write(paths.setdefault(name, folder / name), weights(seed, size), WORDS)
    write(paths["far"], {n: -t if t.ndim > 1 else t for n, t in weights(8, 1.5).items()}, WORDS)
    write(paths["moved"], weights(5, 0.3), [*WORDS[:3], *reversed(WORDS[3:])])
    write(paths["more"], weights(6, 0.3, VOCAB + 2), [*WORDS, "new1", "new2"])
    adapter(paths["lora"], paths["base"])
    return paths


@dataclass(frozen=True)
class Case:
    """One recipe; @names@ are the models' folders. `differs` says why weft gives something else, and what."""

    name: str
    recipe: str
    differs: str = ""
    command: str = "yaml"
    """yaml, multi or moe."""
    compat: bool = True
    """weft runs it with `compat: mergekit`."""
    tolerance: float = 2e-6
    """Of any value, relative to the largest in its tensor. MergeKit runs a mixture's base in bfloat16."""


THREE = """models:
  - {model: @a@, parameters: {weight: 1.0, density: 0.5}}
  - {model: @b@, parameters: {weight: 0.5, density: 0.5}}
  - {model: @c@, parameters: {weight: 0.25, density: 0.5}}
"""
BARE = "models:\n  - model: @a@\n  - model: @b@\n  - model: @c@\n"
TWO = "models:\n  - model: @a@\n  - model: @b@\n"
BASED = "base_model: @base@\n"
FULL = THREE.replace("density: 0.5", "density: 1.0")
MIXTURE = """base_model: @base@
dtype: float32
architecture: mixtral
experts:
  - {source_model: @a@, positive_prompts: [w1 w2 w3], negative_prompts: [w9 w8]}
  - {source_model: @b@, positive_prompts: [w4 w5 w6, w7 w8 w10]}
"""

CASES = [
    Case("linear", f"merge_method: linear\n{THREE}"),
    Case("linear, not normalised", f"merge_method: linear\n{THREE}parameters: {{normalize: false}}\n"),
    Case("linear, filters", "merge_method: linear\nmodels:\n  - model: @a@\n    parameters:\n      weight:\n"
         "        - {filter: mlp, value: 0.9}\n        - {filter: q_proj, value: 0.1}\n        - value: 0.4\n"
         "  - {model: @b@, parameters: {weight: 0.5}}\n"),
    Case("linear, gradient",
         "merge_method: linear\nmodels:\n  - {model: @a@, parameters: {weight: [0.1, 0.9, 0.3]}}\n"
         "  - {model: @b@, parameters: {weight: 0.5}}\n"),
    Case("slerp", f"merge_method: slerp\nbase_model: @a@\n{TWO}parameters: {{t: 0.3}}\n"),
    Case("slerp, close models", "merge_method: slerp\nbase_model: @base@\nmodels:\n  - model: @base@\n"
         "  - model: @near@\nparameters: {t: 0.3}\n"),
    Case("slerp, filters and curves", f"merge_method: slerp\nbase_model: @a@\n{TWO}parameters:\n  t:\n"
         "    - {filter: self_attn, value: [0, 0.5, 1]}\n    - {filter: mlp, value: [1, 0.2]}\n    - value: 0.5\n"),
    Case("nuslerp", f"merge_method: nuslerp\n{THREE.rsplit(chr(10), 2)[0]}\n"),
    Case("nuslerp, with a base", f"merge_method: nuslerp\n{BASED}{THREE.rsplit(chr(10), 2)[0]}\n"),
    Case("nuslerp, by rows", f"merge_method: nuslerp\n{THREE.rsplit(chr(10), 2)[0]}\n"
         "parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}\n"),
    Case("nuslerp, by columns", f"merge_method: nuslerp\n{THREE.rsplit(chr(10), 2)[0]}\n"
         "parameters: {nuslerp_flatten: false, nuslerp_row_wise: false}\n"),
    Case("multislerp", f"merge_method: multislerp\n{THREE}"),
    Case("multislerp, with a base", f"merge_method: multislerp\n{BASED}{THREE}"),
    Case("karcher", f"merge_method: karcher\n{BARE}"),
    Case("task_arithmetic", f"merge_method: task_arithmetic\n{BASED}{THREE}parameters: {{lambda: 0.7}}\n"),
    Case("task_arithmetic, normalised",
         f"merge_method: task_arithmetic\n{BASED}{THREE}parameters: {{normalize: true}}\n"),
    Case("ties", f"merge_method: ties\n{BASED}{THREE}"),
    Case("ties, not normalised",
         f"merge_method: ties\n{BASED}{THREE}parameters: {{normalize: false, lambda: 0.5}}\n"),
    Case("ties, rescaled", f"merge_method: ties\n{BASED}{THREE}parameters: {{rescale: true}}\n",
         differs="`rescale` restores the L1 norm of trimmed task vectors in MergeKit; TIES does not rescale, "
         "so weft ignores it here, and says so"),
    Case("breadcrumbs", f"merge_method: breadcrumbs\n{BASED}{THREE}parameters: {{gamma: 0.1}}\n"),
    Case("breadcrumbs, small tensors", f"merge_method: breadcrumbs\n{BASED}{THREE}"),
    Case("model_stock, tiny differences", "merge_method: model_stock\nbase_model: @base@\nmodels:\n"
         "  - model: @hair@\n  - model: @hair2@\n"),
    Case("sce, tiny differences", "merge_method: sce\nbase_model: @base@\nmodels:\n  - model: @hair@\n"
         "  - model: @hair2@\nparameters: {select_topk: 1.0}\n",
         differs="the weights follow the squares of the task vectors however small; MergeKit's are equal below a "
         "mean square of 1e-6"),
    Case("breadcrumbs_ties", f"merge_method: breadcrumbs_ties\n{BASED}{THREE}parameters: {{gamma: 0.1}}\n"),
    Case("dare_linear, nothing dropped", f"merge_method: dare_linear\n{BASED}{FULL}"),
    Case("dare_ties, nothing dropped", f"merge_method: dare_ties\n{BASED}{FULL}"),
    Case("dare_ties", f"merge_method: dare_ties\n{BASED}{THREE}",
         differs="another random draw: weft's masks depend on seed, model, tensor name and position alone"),
    Case("della", f"merge_method: della\n{BASED}{THREE}", differs="another random draw, as for dare_ties"),
    Case("sce", f"merge_method: sce\n{BASED}{BARE}parameters: {{select_topk: 0.5}}\n"),
    Case("sce, small differences",
         "merge_method: sce\nbase_model: @base@\nmodels:\n  - model: @near@\n  - model: @a@\n"
         "parameters: {select_topk: 1.0}\n"),
    Case("ram", f"merge_method: ram\n{BASED}{BARE}"),
    Case("ramplus_tl", f"merge_method: ramplus_tl\n{BASED}{BARE}"),
    Case("model_stock", f"merge_method: model_stock\n{BASED}{BARE}"),
    Case("model_stock, filter-wise",
         f"merge_method: model_stock\n{BASED}{BARE}parameters: {{filter_wise: true}}\n"),
    Case("nearswap", "merge_method: nearswap\nbase_model: @base@\nmodels:\n  - model: @base@\n  - model: @a@\n"
         "parameters: {t: 0.05}\n"),
    Case("arcee_fusion",
         "merge_method: arcee_fusion\nbase_model: @base@\nmodels:\n  - model: @base@\n  - model: @a@\n"),
    Case("passthrough, scaled",
         "merge_method: passthrough\nmodels:\n  - model: @a@\n    parameters:\n      scale:\n"
         "        - {filter: o_proj, value: 0.0}\n        - {filter: down_proj, value: 0.5}\n"
         "        - value: 1.0\n"),
    Case("slices, passthrough",
         "merge_method: passthrough\nslices:\n  - sources: [{model: @a@, layer_range: [0, 3]}]\n"
         "  - sources: [{model: @b@, layer_range: [1, 4]}]\n"),
    Case("slices, merged", "merge_method: linear\nslices:\n  - sources:\n"
         "      - {model: @a@, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}\n"
         "      - {model: @b@, layer_range: [0, 2], parameters: {weight: 0.5}}\n  - sources:\n"
         "      - {model: @a@, layer_range: [2, 4], parameters: {weight: 0.7}}\n"
         "      - {model: @c@, layer_range: [1, 3], parameters: {weight: 0.3}}\n"),
    Case("slices, one model and two", "merge_method: linear\nslices:\n  - sources:\n"
         "      - {model: @a@, layer_range: [0, 2], parameters: {weight: 1.0}}\n  - sources:\n"
         "      - {model: @a@, layer_range: [2, 4], parameters: {weight: 0.7}}\n"
         "      - {model: @c@, layer_range: [2, 4], parameters: {weight: 0.3}}\n",
         differs="the final norm and the head are those of the last slice; MergeKit leaves out models that the "
         "first slice does not have"),
    Case("tokenizer base", "merge_method: linear\nbase_model: @base@\nmodels:\n"
         "  - {model: @base@, parameters: {weight: 0.5}}\n  - {model: @moved@, parameters: {weight: 0.5}}\n"
         "tokenizer: {source: base}\n"),
    Case("other vocabularies, no policy", "merge_method: linear\nmodels:\n"
         "  - {model: @base@, parameters: {weight: 0.5}}\n  - {model: @more@, parameters: {weight: 0.5}}\n",
         differs="both refuse; weft says what to set"),
    Case("tokenizer union", "merge_method: linear\nbase_model: @base@\nmodels:\n"
         "  - {model: @base@, parameters: {weight: 0.5}}\n  - {model: @more@, parameters: {weight: 0.25}}\n"
         "  - {model: @moved@, parameters: {weight: 0.25}}\ntokenizer: {source: union}\n",
         differs="new tokens get numbers in the order listed; MergeKit's order is that of a hash table. The rows "
         "of every token are the same"),
    Case("tokenizer, rows by name", "merge_method: linear\nbase_model: @base@\nmodels:\n"
         "  - {model: @base@, parameters: {weight: 0.5}}\n  - {model: @more@, parameters: {weight: 0.5}}\n"
         "tokenizer:\n  source: union\n  tokens:\n    new1: {source: @more@, force: true}\n"
         "    w5: {source: {kind: model_token, model: @more@, token: w6}, force: true}\n"
         "    new2: {source: {kind: zero}}\n",
         differs="new tokens get numbers in the order listed, as above"),
    Case("model+lora", "merge_method: linear\nmodels:\n  - {model: @base@+@lora@, parameters: {weight: 0.5}}\n"
         "  - {model: @b@, parameters: {weight: 0.5}}\n"),
    Case("out_dtype", f"merge_method: linear\n{THREE}out_dtype: float16\n", tolerance=6e-4),
    Case("linear, bfloat16", f"merge_method: linear\n{THREE}dtype: bfloat16\n", tolerance=4e-3,
         differs="MergeKit rounds inputs, weights and sums to bfloat16; weft rounds the exact result once"),
    Case("karcher, base not listed", f"merge_method: karcher\n{BASED}{BARE}",
         differs="MergeKit adds base_model to the models; weft merges what is listed"),
    Case("linear, base not listed", f"merge_method: linear\n{BASED}{THREE}",
         differs="MergeKit fails, as the base has no weight; weft merges what is listed"),
    Case("linear, a model twice", "merge_method: linear\nmodels:\n  - {model: @a@, parameters: {weight: 1}}\n"
         "  - {model: @a@, parameters: {weight: 1}}\n  - {model: @b@, parameters: {weight: 1}}\n",
         differs="a model that is listed twice counts twice; MergeKit refuses it"),
    Case("chat template", f"merge_method: linear\n{THREE}chat_template: chatml\n"),
    Case("modules", "merge_method: task_arithmetic\nbase_model: @t5@\nmodules:\n  encoder:\n    models:\n"
         "      - {model: @t5a@, parameters: {weight: 0.5}}\n      - {model: @t5b@, parameters: {weight: 0.2}}\n"
         "  decoder:\n    models:\n      - {model: @t5a@, parameters: {weight: 0.1}}\n"
         "      - {model: @t5b@, parameters: {weight: 0.9}}\n",
         differs="MergeKit leaves out embedding and head, which no module names; here they go with "
         "the encoder and the decoder"),
    Case("moe, cheap_embed", f"{MIXTURE}gate_mode: cheap_embed\n", command="moe"),
    Case("moe, hidden", f"{MIXTURE}gate_mode: hidden\n", command="moe", tolerance=3e-2,
         differs="MergeKit runs the base in bfloat16, weft in float32: the router's rows differ by its rounding"),
    Case("moe, hidden_avg", f"{MIXTURE}gate_mode: hidden_avg\n", command="moe", tolerance=3e-2,
         differs="the router's rows, as above"),
    Case("nested documents",
         "name: first\nmerge_method: linear\nmodels:\n  - {model: @a@, parameters: {weight: 0.5}}\n"
         "  - {model: @b@, parameters: {weight: 0.5}}\n---\nmerge_method: slerp\nbase_model: first\n"
         "models:\n  - model: first\n  - model: @c@\nparameters: {t: 0.4}\n", command="multi"),
]  # fmt: skip


def projections(state: Mapping[str, Tensor]) -> np.ndarray:
    """Three inner products of every tensor, by name, with fixed random directions; [tensors, 3].

    Each has about the tensor's norm as its standard deviation, so a difference in any entry shows.
    """
    return np.array([
        [float(flat @ _draw(100 + i, name, flat.shape)) for i in range(3)]
        for name, values in sorted(state.items()) for flat in [values.double().reshape(-1).numpy()]
    ])  # fmt: skip


def filled(case: Case, paths: Mapping[str, Path]) -> str:
    """The recipe with the models' folders in it; float32 unless it says something."""
    text = case.recipe
    for name, path in paths.items():
        text = text.replace(f"@{name}@", str(path))
    if "dtype:" not in text:
        text = "---\n".join(f"{d}dtype: float32\n" for d in text.split("---\n"))
    return text


def ours(case: Case, text: str) -> Checkpoint:
    """What weft makes of the recipe, unread."""
    if not case.compat:
        return weft.build(text)
    text = "---\n".join(f"compat: mergekit\n{d}" for d in text.split("---\n"))
    if case.command == "moe":
        return weft.build_moe(f"layout: fused\n{text}").checkpoint  # as MergeKit writes it
    return weft.build(text)
