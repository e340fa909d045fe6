"""Vocabularies read as data equal what the tokenizers library and SentencePiece's own format say."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_models import byte_level, metaspace, unigram, wordpiece

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany, asset
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, WeftError
from weft.llm.tokens.forms import form, forms
from weft.llm.tokens.matching import in_pieces, matched
from weft.llm.tokens.sentencepiece import read_pieces
from weft.llm.tokens.vocabulary import from_sentencepiece, from_tokenizer_json, needed, vocabulary_of


def carrying(**files: bytes) -> Checkpoint:
    return InCompany(
        StateDict({}, "here"), {}, tuple(asset(n.replace("__", "."), d) for n, d in files.items())
    )  # fmt: skip


MADE = {"byte-level": byte_level(280), "sentencepiece": metaspace(330), "wordpiece": wordpiece(110)}


@pytest.mark.parametrize("kind", MADE)
def test_numbers_and_kind_of_tokenizer_json(kind: str) -> None:
    made = MADE[kind]
    made.add_tokens(["extra"])
    found = from_tokenizer_json(made.to_str().encode(), "t")
    assert dict(found.ids) == made.get_vocab(with_added_tokens=True) and found.kind == kind
    assert found.size == made.get_vocab_size() and "extra" in found.added and "extra" not in found.special


def test_unigram() -> None:
    made = unigram(80)
    found = from_tokenizer_json(made.to_str().encode(), "t")
    assert dict(found.ids) == made.get_vocab() and found.kind == "sentencepiece"


def sentencepiece_model(pieces: list[tuple[str, int]], model_type: int = 2) -> bytes:
    from transformers.utils import sentencepiece_model_pb2_new as pb

    proto = pb.ModelProto()
    for i, (piece, kind) in enumerate(pieces):
        proto.pieces.add(piece=piece, score=-float(i), type=kind)
    proto.trainer_spec.model_type = model_type
    proto.normalizer_spec.name = "identity"
    data: bytes = proto.SerializeToString()
    return data


PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x41>", 6), ("▁the", 1), ("é", 1), ("[INST]", 4)]


def test_sentencepiece_model() -> None:
    data = sentencepiece_model(PIECES)
    assert read_pieces(data, "m") == read_pieces(data, "m") and read_pieces(data, "m").model_type == "BPE"
    found = from_sentencepiece(data, "m")
    assert list(found.ids) == [p for p, _ in PIECES] and list(found.ids.values()) == list(range(7))
    assert found.special == {"<unk>", "<s>", "</s>"} and set(found.added) == {*found.special, "[INST]"}
    assert form("<0x41>", found) == b"A" and form("▁the", found) == b" the" and form("<s>", found) is None


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_model_or_an_error(data: bytes) -> None:
    with contextlib.suppress(DataError):
        read_pieces(data, "m")


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_model_that_is_cut_short(cut: int) -> None:
    data = sentencepiece_model(PIECES[:2])
    with pytest.raises(DataError, match=r"cut short|no protocol buffer|no pieces"):
        read_pieces(data[:cut] + b"\x0a\xff\xff\xff\xff\x0f", "m")


def test_which_file_and_added_tokens_beside_it() -> None:
    model = carrying(
        vocab__json=json.dumps({"a": 0, "Ġb": 1}).encode(), merges__txt=b"",
        added_tokens__json=b'{"<pad>": 2}',
        tokenizer_config__json=b'{"added_tokens_decoder": {"3": {"content": "<x>", "special": true}}}',
    )  # fmt: skip
    found = needed(model)
    assert dict(found.ids) == {"a": 0, "Ġb": 1, "<pad>": 2, "<x>": 3} and found.special == {"<x>"}
    assert found.kind == "byte-level"
    text = carrying(vocab__txt=b"[PAD]\n##s\nthe\n")
    assert dict(needed(text).ids) == {"[PAD]": 0, "##s": 1, "the": 2} and needed(text).kind == "wordpiece"
    assert vocabulary_of(carrying()) is None
    with pytest.raises(DataError, match="here has no tokenizer that weft reads"):
        needed(carrying())
    with pytest.raises(DataError, match=r"convert its \.tiktoken"):
        needed(carrying(qwen__tiktoken=b""))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"model": {}}, r"no model\.vocab"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "'a' and 'b' both have the number 0"),
        ({"model": {"vocab": {"a": -1, "b": 1.5, "c": 1 << 40}}}, "'a' has the number -1"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [3]}, "added_tokens holds 3"),
        ({"model": {"vocab": {"a": 0}}, "added_tokens": [{"content": "x"}]}, "'x' has the number None"),
    ],
)
def test_bad_files(data: Any, said: str) -> None:
    with pytest.raises(WeftError, match=said):
        from_tokenizer_json(json.dumps(data).encode(), "bad.json")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_forms_are_what_the_library_decodes(kind: str) -> None:
    """The bytes of a text's tokens, end to end, are the text."""
    made = MADE[kind]
    found = from_tokenizer_json(made.to_str().encode(), "t")
    for text in ("the cat, naïve – Zürich", "42 ☃ words"):
        pieces = [form(t, found) for t in made.encode(text, add_special_tokens=False).tokens]
        whole = b"".join(p for p in pieces if p is not None).decode()
        assert whole == (text if kind == "byte-level" else " " + text)


def test_matching_across_kinds() -> None:
    one = from_tokenizer_json(MADE["byte-level"].to_str().encode(), "one")
    two = from_tokenizer_json(MADE["sentencepiece"].to_str().encode(), "two")
    found = matched(one, two, {"bos": (one.ids["<s>"], two.ids["<s>"])})
    names = two.by_id()
    bytes_of = {t: form(t, two) for t in two.ids}
    for token, i in one.ids.items():
        made = form(token, one)
        if found.row[i] >= 0 and found.plain[i]:
            assert bytes_of[str(names[found.row[i]])] == made
        elif made is not None:
            assert made not in bytes_of.values()
    assert found.row[one.ids["<s>"]] == two.ids["<s>"] and found.by_bytes > 40
    # a byte token is second choice where a letter of its own exists
    assert names[forms(two)[b"t"]] == "t"


def test_same_kind_matches_by_text_only() -> None:
    one = from_tokenizer_json(byte_level(300).to_str().encode(), "one")
    found = matched(one, from_tokenizer_json(byte_level(280).to_str().encode(), "two"))
    assert found.exact == 280 and found.by_bytes == 0 and (found.row < 0).sum() == 20


@given(st.binary(max_size=12))
def test_pieces_write_the_text(text: bytes) -> None:
    known = {bytes([b]): b for b in range(256)} | {b"ab": 300, b"abc": 301, b"bcd": 302}
    names = {i: b for b, i in known.items()}
    assert b"".join(names[i] for i in in_pieces(text, known, 3)) == text
    assert in_pieces(b"abcd", known, 3) == [301, ord("d")]
    assert in_pieces(b"xay", {b"a": 1}, 1) == [1]
