"""Tiny tokenizers trained offline, and tiny Llamas that go with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TEXT = [
    "the cat sat on the mat and the dog sat on the log", "a model of the world is a model of the word",
    "merging weights of models trained on words of the world", "the sun is a star and the moon is not",
    "café naïve Zürich – 12 + 30 = 42, don't panic!", "les mots du monde sont le sel de la terre",
    "der Hund und die Katze sitzen auf der Matte", "thinking about things that think about things",
]  # fmt: skip
MORE = ["quantum chromodynamics of gluons and quarks", "photosynthesis in chloroplasts of plants",
        "gluons quarks plants chloroplasts photosynthesis chromodynamics quantum"]  # fmt: skip


def byte_level(size: int, texts: list[str] = TEXT, special: tuple[str, ...] = ("<s>", "</s>")) -> Any:
    """A byte-level BPE such as Llama 3's or GPT-2's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator(texts, trainer)
    return made


def metaspace(size: int, texts: list[str] = TEXT) -> Any:
    """A BPE over ▁ with byte fallback, such as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    made.train_from_iterator([t.replace(" ", "▁") for t in texts], trainer)
    data = json.loads(made.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(json.dumps(data))


def unigram(size: int, texts: list[str] = TEXT) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def wordpiece(size: int, texts: list[str] = TEXT) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def permuted(tokenizer: Any, seed: int = 0, keep: int = 0) -> Any:
    """The same tokenizer with its numbers shuffled, all but the first `keep`."""
    from tokenizers import Tokenizer

    data = json.loads(tokenizer.to_str())
    n = len(data["model"]["vocab"])
    order = [
        *range(keep),
        *(keep + torch.randperm(n - keep, generator=torch.Generator().manual_seed(seed))).tolist(),
    ]
    data["model"]["vocab"] = {t: order[i] for t, i in data["model"]["vocab"].items()}
    for entry in data["added_tokens"]:
        entry["id"] = data["model"]["vocab"][entry["content"]]
    data["added_tokens"].sort(key=lambda e: e["id"])
    return Tokenizer.from_str(json.dumps(data))


def llama(rows: int, seed: int = 0, *, tied: bool = False, like: Any = None, **config: Any) -> Any:
    """A tiny Llama; with `like`, that one with a little noise wherever the shapes agree."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=rows, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=tied,
        **{"bos_token_id": 0, "eos_token_id": 1, **config},
    ))  # fmt: skip
    if like is not None:
        theirs = like.state_dict()
        with torch.no_grad():
            for name, p in made.named_parameters():
                if theirs[name].shape == p.shape:
                    p.copy_(theirs[name] + 0.05 * p)
    return made.eval()


def write(folder: Path, tokenizer: Any, model: Any, **files: Any) -> str:
    """A model folder as transformers writes it; `files`: name (dot as __) → JSON or text."""
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return str(folder)


def logits(folder: Any, ids: list[int]) -> torch.Tensor:
    """`[len(ids), vocabulary]` of the model in a folder, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]
