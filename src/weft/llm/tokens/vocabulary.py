"""`Vocabulary`: which number each token has, read from a checkpoint's files as data.

tokenizer.json (BPE, WordPiece, WordLevel, Unigram), else tokenizer.model (SentencePiece), else vocab.json, else
vocab.txt. No tokenizer library is needed, nothing in the files is executed, and a file from a stranger is held to
the same rules as a header.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.strictjson import parse_json
from weft.errors import DataError, DataProblems
from weft.llm.tokens.sentencepiece import BYTE, CONTROL, UNKNOWN, USER_DEFINED, read_pieces

Kind = Literal["byte-level", "sentencepiece", "wordpiece", "words"]
"""How a token's text stands for bytes: letters for bytes (GPT-2), ▁ for a space, ## inside a word, as it is."""

SOURCES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
MOST = 1 << 24
"""The largest number of a token that is believed."""


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokens of one tokenizer."""

    origin: str
    """The file, for messages."""
    ids: Mapping[str, int]
    """Token → number, added tokens included."""
    kind: Kind
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Added tokens, which are found in a text before it is split: content → its entry in tokenizer.json."""
    data: Mapping[str, Any] | None = None
    """tokenizer.json, where there is one."""
    bytes_fallback: frozenset[str] = frozenset()
    """Tokens such as `<0x0A>` that stand for one byte."""

    @cached_property
    def size(self) -> int:
        """One more than the largest number."""
        return max(self.ids.values(), default=-1) + 1

    def __len__(self) -> int:
        return len(self.ids)

    def by_id(self) -> list[str | None]:
        """The token of each number; None where there is none."""
        names: list[str | None] = [None] * self.size
        for token, i in self.ids.items():
            names[i] = token
        return names

    @cached_property
    def special(self) -> frozenset[str]:
        return frozenset(t for t, entry in self.added.items() if entry.get("special"))

    def same_as(self, other: Vocabulary) -> bool:
        """True where every token has the same number."""
        return self is other or self.ids == other.ids


def vocabulary_of(model: Checkpoint) -> Vocabulary | None:
    """The vocabulary among the files that travel with a checkpoint, or None if there is none."""
    files = {a.name: a for a in model.assets}
    name = next((n for n in SOURCES if n in files), None)
    if name is None:
        return None
    where = f"{model.origin}/{name}"
    read = {"tokenizer.json": from_tokenizer_json, "tokenizer.model": from_sentencepiece,
            "vocab.json": _from_vocab_json, "vocab.txt": _from_vocab_txt}[name]  # fmt: skip
    made = read(files[name].read(), where)
    return made if name == "tokenizer.json" else _with_added(made, files, model.origin)


def needed(model: Checkpoint) -> Vocabulary:
    """As `vocabulary_of`, but a missing tokenizer is an error."""
    found = vocabulary_of(model)
    if found is None:
        tiktoken = any(a.name.endswith(".tiktoken") for a in model.assets)
        raise DataError(
            f"{model.origin} has no tokenizer that weft reads ({', '.join(SOURCES)})"
            + (
                "; convert its .tiktoken file to tokenizer.json"
                if tiktoken
                else "; put its files beside the weights"
            )
        )
    return found


def from_tokenizer_json(data: bytes, where: str) -> Vocabulary:
    """The vocabulary in a tokenizer.json. Raises UnsafeFile or DataError if there is none in it."""
    parsed = parse_json(data, where, "config-json", depth=32)
    model = parsed.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # Unigram: [piece, score], numbered as listed
        vocab = {
            entry[0]: i for i, entry in enumerate(vocab)
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
        }  # fmt: skip
    if not isinstance(vocab, dict) or not isinstance(model, dict):
        raise DataError(f"{where} has no model.vocab; write it with a current version of tokenizers")
    added = {}
    for entry in parsed.get("added_tokens") or []:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise DataError(f"{where}: added_tokens holds {shown(entry)}, which is no token; write it again")
        added[entry["content"]] = entry
    ids = _checked({**vocab, **{t: e.get("id") for t, e in added.items()}}, where)
    fallback = frozenset(t for t in ids if _is_byte(t)) if model.get("byte_fallback") else frozenset()
    return Vocabulary(where, ids, _kind(parsed, model, ids), added, parsed, fallback)


def from_sentencepiece(data: bytes, where: str) -> Vocabulary:
    """The vocabulary in a SentencePiece model. Raises DataError if it is none."""
    found = read_pieces(data, where).pieces
    ids = {piece: i for i, (piece, _) in enumerate(found)}
    added = {
        piece: _entry(piece, i, special=kind in (UNKNOWN, CONTROL))
        for i, (piece, kind) in enumerate(found) if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }  # fmt: skip
    fallback = frozenset(piece for piece, kind in found if kind == BYTE)
    return Vocabulary(where, ids, "sentencepiece", added, bytes_fallback=fallback)


def _from_vocab_json(data: bytes, where: str) -> Vocabulary:
    ids = _checked(parse_json(data, where, "config-json", depth=2), where)
    return Vocabulary(where, ids, "byte-level" if _looks_byte_level(ids) else "words")


def _from_vocab_txt(data: bytes, where: str) -> Vocabulary:
    try:
        lines = data.decode().splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{where} is not UTF-8 text; fetch the file again") from None
    ids = {line: i for i, line in enumerate(lines)}
    return Vocabulary(where, ids, "wordpiece" if any(t.startswith("##") for t in ids) else "words")


def _with_added(made: Vocabulary, files: Mapping[str, Asset], origin: str) -> Vocabulary:
    """The vocabulary with the tokens that added_tokens.json and tokenizer_config.json put on top."""
    added: dict[str, Mapping[str, Any]] = dict(made.added)
    if "added_tokens.json" in files:
        where = f"{origin}/added_tokens.json"
        found = _checked(parse_json(files["added_tokens.json"].read(), where, "config-json", depth=2), where)
        added |= {t: _entry(t, i, special=False) for t, i in found.items()}
    if "tokenizer_config.json" in files:
        where = f"{origin}/tokenizer_config.json"
        parsed = parse_json(files["tokenizer_config.json"].read(), where, "config-json", depth=32)
        decoder = parsed.get("added_tokens_decoder")
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("content"), str)
                and number.isascii()
                and number.isdigit()
            ):
                added[entry["content"]] = {**entry, "id": int(number)}
    ids = _checked({**made.ids, **{t: e["id"] for t, e in added.items()}}, made.origin)
    return Vocabulary(made.origin, ids, made.kind, added, None, made.bytes_fallback)


def _checked(ids: Mapping[str, Any], where: str) -> dict[str, int]:
    """The numbers, each a natural number and each one token's; DataProblems otherwise."""
    if all(type(i) is int and 0 <= i < MOST for i in ids.values()) and len(set(ids.values())) == len(ids):
        return dict(ids)
    problems = [
        f"{shown(t)} has the number {shown(i)}"
        for t, i in ids.items()
        if type(i) is not int or not 0 <= i < MOST
    ]
    first: dict[Any, str] = {}
    for token, i in ids.items():
        if type(i) is int and first.setdefault(i, token) != token:
            problems.append(f"{shown(first[i])} and {shown(token)} both have the number {i}")
    raise DataProblems(f"{where} numbers its tokens wrongly", problems[:20])


def _entry(content: str, number: int, special: bool) -> dict[str, Any]:
    """An added token as tokenizer.json writes it."""
    return {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}  # fmt: skip


def _kind(parsed: Mapping[str, Any], model: Mapping[str, Any], ids: Mapping[str, int]) -> Kind:
    """What the tokens' texts stand for, from the parts that turn text into them and back."""
    if model.get("type") == "WordPiece":
        return "wordpiece"
    parts = json.dumps([parsed.get(k) for k in ("pre_tokenizer", "decoder", "normalizer")])
    if '"ByteLevel"' in parts:
        return "byte-level"
    if model.get("type") == "Unigram" or '"Metaspace"' in parts or "\\u2581" in parts:
        return "sentencepiece"
    if model.get("type") == "BPE":
        return "byte-level" if _looks_byte_level(ids) else "sentencepiece" if _many(ids, "▁") else "words"
    return "words"


def _looks_byte_level(ids: Mapping[str, int]) -> bool:
    return _many(ids, "Ġ")


def _many(ids: Mapping[str, int], mark: str) -> bool:
    return sum(t.startswith(mark) for t in ids) * 50 > len(ids)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
