"""Tokenizers in GGUF files: transformers reads them back and encodes as before; SentencePiece by definition."""

import json
import struct
from itertools import pairwise

import pytest
import torch
from gguf_models import fields_of, make

import weft
from weft.errors import DataError
from weft.export.gguf import as_gguf

pytest.importorskip("gguf")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = [
    "The weft goes over and under the warp, 1234 times; it's woven!",
    "  two  spaces\n\nand lines\tand tabs, 3.14159",
    "Größe, naïve café, 東京 и Москва 🙂",
    "if x == 10: return [i for i in range(100)]",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def byte_level(folder, split):
    """A trained byte-level BPE tokenizer with special and plain added tokens, saved as transformers does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    tokenizer.add_tokens(["<think>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    fast.save_pretrained(folder)
    return fast


@pytest.mark.parametrize(("split", "pre"), [(None, "gpt-2"), (LLAMA3, "llama-bpe"),
                                            (LLAMA3.replace("{1,3}", ""), "qwen2")])  # fmt: skip
def test_byte_level_tokens(split, pre, tmp_path):
    fast = byte_level(tmp_path / "m", split)
    make("llama", tmp_path / "m", vocab_size=len(fast) + 5)
    weft.save(weft.load(tmp_path / "m"), tmp_path / "out.gguf")
    fields = fields_of(tmp_path / "out.gguf")
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == pre
    names = ("bos", "eos", "padding")
    assert [fields[f"tokenizer.ggml.{n}_token_id"] for n in names] == [0, 1, 2]
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(fast) + 5
    assert kinds[:3] == [3, 3, 3] and kinds[tokens.index("<think>")] == 4
    assert kinds[-5:] == [5] * 5 and tokens[-1] == f"[PAD{len(fast) + 4}]"
    assert "{{ m.content }}" in fields["tokenizer.chat_template"]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    for text in [*TEXT, "<think>a</s>"]:
        assert again.encode(text, add_special_tokens=False) == fast.encode(text, add_special_tokens=False)


def test_an_unknown_split_needs_a_name(tmp_path):
    fast = byte_level(tmp_path / "m", r"\w+|\W")
    make("llama", tmp_path / "m", vocab_size=len(fast))
    with pytest.raises(DataError, match=r"no name for in llama\.cpp; state the name with --pre"):
        as_gguf(weft.load(tmp_path / "m"))
    weft.save(as_gguf(weft.load(tmp_path / "m"), pre="deepseek-llm"), tmp_path / "out.gguf")
    assert fields_of(tmp_path / "out.gguf")["tokenizer.ggml.pre"] == "deepseek-llm"


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path):
    byte_level(tmp_path / "m", None)
    make("llama", tmp_path / "m")
    with pytest.raises(DataError, match="do not belong together"):
        as_gguf(weft.load(tmp_path / "m"))


def test_a_missing_or_foreign_tokenizer(tmp_path):
    make("llama", tmp_path / "m")
    with pytest.raises(DataError, match=r"has no tokenizer\.json or tokenizer\.model.*--no-tokenizer"):
        as_gguf(weft.load(tmp_path / "m"))
    word = {"model": {"type": "WordPiece", "vocab": {"a": 0}}, "added_tokens": []}
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(word))
    with pytest.raises(DataError, match="of the kind WordPiece"):
        as_gguf(weft.load(tmp_path / "m"))
    (tmp_path / "m" / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        as_gguf(weft.load(tmp_path / "m"))


def varint(n):
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece(pieces, *, model_type=2, prefix=True):
    """A SentencePiece model as bytes, from (text, score, kind)."""
    data = b"".join(
        field(1, field(1, t.encode()) + field(2, s) + (field(3, k) if k != 1 else b"")) for t, s, k in pieces
    )
    trainer = field(1, b"input") + field(3, model_type) + field(4, len(pieces))
    return data + field(2, trainer) + field(3, field(1, b"identity") + field(3, int(prefix)))


PIECES = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), ("<0x0A>", 0.0, 6), ("\u2581the", -1.5, 1),
          ("\u2581", -2.0, 1), ("é", -3.0, 1), ("\u2581\u2581", -4.0, 4), ("gone", -5.0, 5)]  # fmt: skip


def test_a_sentencepiece_model(tmp_path):
    folder = tmp_path / "m"
    make("gemma2", folder)
    (folder / "tokenizer.model").write_bytes(sentencepiece(PIECES, prefix=False))
    added = [{"id": 1, "content": "<s>", "special": True}, {"id": 7, "content": "\u2581\u2581", "special": False},
             {"id": 11, "content": "<turn>", "special": True}]  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "Unigram"}, "added_tokens": added}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "add_bos_token": True}))
    weft.save(weft.load(folder), tmp_path / "out.gguf")
    fields = fields_of(tmp_path / "out.gguf")
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.pre"] == "default"
    assert fields["tokenizer.ggml.tokens"][:12] == [
        *(t for t, _, _ in PIECES[:7]), "  ", "gone", "[PAD9]", "[PAD10]", "<turn>",
    ]  # fmt: skip
    assert fields["tokenizer.ggml.token_type"][:12] == [2, 3, 3, 6, 1, 1, 1, 4, 5, 5, 5, 3]
    assert fields["tokenizer.ggml.scores"][4:9] == [-1.5, -2, -3, -4, -5]
    assert len(fields["tokenizer.ggml.tokens"]) == 96
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.add_space_prefix"] is False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (sentencepiece(PIECES)[:-3], "is no SentencePiece model, or is cut short"),
        (b"\xff" * 40, "is no SentencePiece model"),
        (b"", "is no SentencePiece model"),
        (sentencepiece(PIECES, model_type=1), "that is no BPE"),
        (sentencepiece([("a", 0.0, 9)]), "is no SentencePiece model"),
    ],
)
def test_damaged_sentencepiece_models(data, message, tmp_path):
    make("llama", tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").write_bytes(data)
    with pytest.raises(DataError, match=message):
        as_gguf(weft.load(tmp_path / "m"))


def merged_by_score(text, tokens, scores):
    """SentencePiece's BPE: join the neighbours that make the best-scored token, the leftmost of equals."""
    number = {t: i for i, t in enumerate(tokens)}
    parts = list(text)
    while True:
        best = [(scores[number[a + b]], -i) for i, (a, b) in enumerate(pairwise(parts))
                if a + b in number]  # fmt: skip
        if not best:
            break
        at = -max(best)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    found = []
    for part in parts:
        found += [number[part]] if part in number else [number[f"<0x{b:02X}>"] for b in part.encode()]
    return found


def test_sentencepiece_known_by_its_merges_only(tmp_path):
    """A Llama-2-like tokenizer.json without tokenizer.model: scores must order the merges as their ranks do."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    alphabet = sorted(set("".join(TEXT[:2])))
    trainer = trainers.BpeTrainer(
        vocab_size=420, show_progress=False, special_tokens=special, limit_alphabet=len(alphabet)
    )
    tokenizer.train_from_iterator([t for text in TEXT[:2] for t in text.split()] * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = [t for t in data["added_tokens"] if t["id"] < 3]
    folder = tmp_path / "m"
    make("llama", folder, vocab_size=len(data["model"]["vocab"]))
    (folder / "tokenizer.json").write_text(json.dumps(data))
    weft.save(weft.load(folder), tmp_path / "out.gguf")
    fields = fields_of(tmp_path / "out.gguf")
    tokens, scores = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.scores"]
    kinds = fields["tokenizer.ggml.token_type"]
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    assert kinds[:4] == [2, 3, 3, 6] and kinds.count(6) == 256
    assert len(data["model"]["merges"]) > 40
    plain = Tokenizer.from_str(json.dumps(data))
    for text in [*TEXT, "weftwarpwoven over the 12th, and under"]:
        ids = plain.encode(text, add_special_tokens=False).ids
        assert merged_by_score("\u2581" + text.replace(" ", "\u2581"), tokens, scores) == ids


def test_one_command_from_recipe_to_a_file_with_its_tokenizer(tmp_path, monkeypatch):
    import sys

    from weft.cli.main import main

    fast = byte_level(tmp_path / "m", None)
    make("llama", tmp_path / "m", torch.bfloat16, vocab_size=len(fast))
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - model: {tmp_path / 'm'}\n    parameters: {{weight: 1}}\n"
    )
    monkeypatch.setattr(sys, "argv", ["weft", "merge", str(recipe), str(tmp_path / "out.gguf"), "-q"])
    try:
        main()
    except SystemExit as stopped:
        assert not stopped.code
    again = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert again.encode(TEXT[0], add_special_tokens=False) == fast.encode(TEXT[0], add_special_tokens=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf")
    assert model.config.vocab_size == len(fast)
