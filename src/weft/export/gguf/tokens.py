"""The tokenizer of a GGUF file, from the files that travel with a checkpoint.

Byte-level BPE (GPT-2's kind) becomes GGUF's `gpt2` with its merges; SentencePiece BPE becomes `llama`
with a score a token. What a tokenizer does before its merges has only a name in GGUF (`pre`), found here from
the pattern that tokenizer.json splits by.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataError
from weft.export.gguf.sentencepiece import Pieces, read_pieces

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of token, numbered alike by SentencePiece and GGUF."""

_JSON_BYTES = 256 << 20
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_SPLITS = {
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_CASED}|\p{{N}}|{_REST}".replace("]+[\\r\\n]*|", "]+[\\r\\n/]*|"): "tekken",
}
"""The pattern that text is split by → llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer."""

    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    special: Any
    """A gguf.SpecialVocab: merges, special tokens, chat template."""
    scores: Sequence[float] | None = None
    add_space_prefix: bool | None = None


def vocabulary_of(checkpoint: Checkpoint, rows: int, pre: str | None) -> Vocabulary:
    """The vocabulary in the checkpoint's files. Raises DataError if there is none, or none that GGUF knows."""
    import gguf

    assets = {a.name: a for a in checkpoint.assets}
    if not {"tokenizer.json", "tokenizer.model"} & assets.keys():
        raise DataError(
            f"{checkpoint.origin} has no tokenizer.json or tokenizer.model; put its tokenizer beside the weights, "
            "or say --no-tokenizer for a file without one"
        )
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json"):
            if name in assets:
                (Path(folder) / name).write_bytes(assets[name].read())
        (Path(folder) / "config.json").write_text(json.dumps(dict(checkpoint.config or {})), encoding="utf-8")
        data = _json(Path(folder) / "tokenizer.json", checkpoint.origin)
        byte_level = _is_byte_level(data)
        try:
            special = gguf.SpecialVocab(folder, load_merges=byte_level, n_vocab=rows)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise DataError(f"{checkpoint.origin}: its tokenizer files are not understood: {error}") from None
    if byte_level:
        found = _from_byte_level(data, special, pre or _pre(data, checkpoint.origin))
    elif "tokenizer.model" in assets:
        pieces = read_pieces(assets["tokenizer.model"].read(), f"{checkpoint.origin}/tokenizer.model")
        found = _from_pieces(pieces, data, special, pre)
    elif data.get("model", {}).get("type") == "BPE" and data["model"].get("byte_fallback"):
        found = _from_merges(data, special, pre)
    else:
        kind = str(data.get("model", {}).get("type"))
        raise DataError(
            f"{checkpoint.origin}: its tokenizer is of the kind {kind}, and weft can write BPE (byte-level or "
            "SentencePiece); say --no-tokenizer for a file without one"
        )
    if len(found.tokens) > rows:
        raise DataError(
            f"{checkpoint.origin}: its tokenizer has {len(found.tokens)} tokens, its embedding {rows} rows; they "
            "do not belong together"
        )
    return found


def add_vocabulary(writer: Any, vocabulary: Vocabulary, rows: int) -> None:
    """Tokenizer metadata. Rows of the embedding beyond the vocabulary are unused tokens."""
    missing = range(len(vocabulary.tokens), rows)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    # a name for every row, in bytes, since a token may not be valid text
    writer.add_token_list([t.encode("utf-8", "surrogateescape") for t in vocabulary.tokens]
                          + [f"[PAD{i}]".encode() for i in missing])  # fmt: skip
    if vocabulary.scores is not None:
        writer.add_token_scores([*vocabulary.scores, *(-1000.0 for _ in missing)])
    writer.add_token_types([*vocabulary.kinds, *(UNUSED for _ in missing)])
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    vocabulary.special.add_to_gguf(writer, quiet=True)


def _json(path: Path, origin: str) -> dict[str, Any]:
    if not path.exists():
        return {}
    data = path.read_bytes()
    if len(data) > _JSON_BYTES:
        raise DataError(f"{origin}/tokenizer.json has {len(data):,} bytes, which no tokenizer has")
    return parse_json(data, f"{origin}/tokenizer.json", "config-json", depth=64)


def _parts(step: Any, inner: str) -> list[Mapping[str, Any]]:
    """A step of a tokenizer, or the steps of a sequence of them."""
    if not isinstance(step, Mapping):
        return []
    return [s for s in step.get(inner, [step]) if isinstance(s, Mapping)]


def _is_byte_level(data: Mapping[str, Any]) -> bool:
    steps = _parts(data.get("pre_tokenizer"), "pretokenizers") + _parts(data.get("decoder"), "decoders")
    model = data.get("model")
    bpe = isinstance(model, Mapping) and model.get("type", "BPE") == "BPE" and "merges" in model
    return bpe and any(s.get("type") == "ByteLevel" for s in steps)


def _pre(data: Mapping[str, Any], origin: str) -> str:
    """llama.cpp's name for how text is split before the merges."""
    steps = _parts(data.get("pre_tokenizer"), "pretokenizers")
    splits = [s["pattern"].get("Regex") for s in steps if s.get("type") == "Split" and "pattern" in s]
    digits = [s for s in steps if s.get("type") == "Digits" and s.get("individual_digits")]
    regex = any(s.get("type") == "ByteLevel" and s.get("use_regex", True) for s in steps)
    if len(splits) == 1 and splits[0] in _SPLITS and not digits:
        return _SPLITS[splits[0]]
    if regex and not splits:
        return "starcoder" if digits else "gpt-2"
    raise DataError(
        f"{origin}: tokenizer.json splits text in a way that weft has no name for in llama.cpp; state the name "
        "with --pre (for instance llama-bpe, qwen2, deepseek-llm)"
    )


def _added(data: Mapping[str, Any]) -> dict[int, tuple[str, int]]:
    """Added tokens: id → text and kind."""
    entries = data.get("added_tokens")
    return {
        e["id"]: (str(e["content"]), CONTROL if e.get("special") else USER_DEFINED)
        for e in (entries if isinstance(entries, list) else [])
        if isinstance(e, Mapping) and type(e.get("id")) is int and "content" in e
    }


def _by_id(
    vocabulary: Mapping[str, Any], added: Mapping[int, tuple[str, int]]
) -> tuple[list[str], list[int]]:
    """Tokens and kinds in the order of their numbers; a number nobody uses is an unused token."""
    texts = {i: t for t, i in vocabulary.items() if type(i) is int and i >= 0}
    count = max([*texts, *added], default=-1) + 1
    if count > 2 * (len(texts) + len(added)) + 1024:
        raise DataError(f"tokenizer.json numbers {len(texts) + len(added)} tokens up to {count}; correct it")
    tokens = [added[i][0] if i in added else texts.get(i, f"[PAD{i}]") for i in range(count)]
    kinds = [added[i][1] if i in added else NORMAL if i in texts else UNUSED for i in range(count)]
    return tokens, kinds


def _from_byte_level(data: Mapping[str, Any], special: Any, pre: str) -> Vocabulary:
    tokens, kinds = _by_id(data["model"]["vocab"], _added(data))
    return Vocabulary("gpt2", pre, tokens, kinds, special)


def _from_merges(data: Mapping[str, Any], special: Any, pre: str | None) -> Vocabulary:
    """SentencePiece BPE known by its merges only: a token made by an earlier merge scores higher."""
    model = data["model"]
    tokens, kinds = _by_id(model["vocab"], _added(data))
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model.get("merges", [])):
        text = "".join(merge) if isinstance(merge, list) else str(merge).replace(" ", "", 1)
        ranks.setdefault(text, rank)
    scores = [-float(ranks.get(t, len(ranks))) for t in tokens]
    kinds = [BYTE if _BYTE.fullmatch(t) else UNKNOWN if t == model.get("unk_token") else k
             for t, k in zip(tokens, kinds, strict=True)]  # fmt: skip
    steps = _parts(data.get("normalizer"), "normalizers") + _parts(data.get("pre_tokenizer"), "pretokenizers")
    prefix = any(
        s.get("type") == "Prepend" or (s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never")
        for s in steps
    )
    return Vocabulary("llama", pre or "default", tokens, kinds, special, scores, prefix)


def _from_pieces(pieces: Pieces, data: Mapping[str, Any], special: Any, pre: str | None) -> Vocabulary:
    """A SentencePiece model, with the tokens that were added to it since."""
    tokens, kinds, scores = list(pieces.texts), list(pieces.kinds), list(pieces.scores)
    for number, (text, kind) in sorted(_added(data).items()):
        if number > len(tokens) + 4096:
            raise DataError(f"tokenizer.json adds a token numbered {number} to {len(tokens)}; correct it")
        while number >= len(tokens):
            tokens.append(f"[PAD{len(tokens)}]")
            kinds.append(UNUSED)
            scores.append(-1000.0)
        if kinds[number] != UNKNOWN:
            # added tokens are matched in plain text, where a space is a space
            tokens[number] = text if kind == CONTROL else text.replace("\u2581", " ")
            kinds[number] = kind
    return Vocabulary("llama", pre or "default", tokens, kinds, special, scores, pieces.add_dummy_prefix)
