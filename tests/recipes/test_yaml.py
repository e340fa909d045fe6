"""The strict YAML reader: what it reads, and what it must refuse."""

from __future__ import annotations

import math
import time

import pytest

from weft.errors import UsageError
from weft.recipes.yaml import MAX_BYTES, MAX_DEPTH, parse, parse_value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5), ("1E5", 1e5), ("-.5", -0.5), ("5.", 5.0), ("+3", 3), ("010", 10), ("0", 0),
        ("true", True), ("Yes", True), ("OFF", False), ("null", None), ("~", None), ("", None),
        ("'1e-5'", "1e-5"), ('"no"', "no"), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"),
        (".inf", math.inf), ("a+b@c", "a+b@c"), ("tRue", "tRue"), ("0x10", "0x10"), ("1_000", "1_000"),
        ("org/name", "org/name"), ("[1, 0.5]", [1, 0.5]), ("{a: {b: [1]}}", {"a": {"b": [1]}}),
    ],
)  # fmt: skip
def test_scalars(text: str, value: object) -> None:
    assert parse(f"key: {text}")[0].data == {"key": value}


def test_lines_are_remembered() -> None:
    document = parse("a: 1\nb:\n  - x\n  - y: 2\n    z: [3,\n      4]\n")[0]
    assert document.line(("a",)) == 1
    assert document.line(("b", 0)) == 3
    assert document.line(("b", 1, "z", 1)) == 6
    assert document.line(("b", 1, "nothing")) == 4


def test_documents() -> None:
    found = parse("name: a\n---\n---\nname: b\n...\n")
    assert [d.data["name"] for d in found] == ["a", "b"]
    assert [d.number for d in found] == [1, 3]
    assert parse("# nothing\n") == []


BILLION = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BILLION, "anchors and aliases"),
        ("a: &a 1", "anchors and aliases"),
        ("a: *a", "anchors and aliases"),
        ("<<: *x", "anchors and aliases"),
        ("a: 1\nb: 2\na: 3", "line 3, column 1: the key 'a' appears twice"),
        ("a: {b: 1, 'b': 2}", "appears twice"),
        ("a:\n\t- b", "spaces, not tabs"),
        ("!!python/object/apply:os.system ['echo']", "tags are not allowed"),
        ("a: !!python/name:os.system", "tags are not allowed"),
        ("a: !include /etc/passwd", "tags are not allowed"),
        ("!!binary aGk=", "tags are not allowed"),
        ("[1, 2]: x", "a key must be a word"),
        ("? {a: 1}\n: x", "a key must be a word"),
        ("a: [1, 2", "line"),
        ("a: 'open", "line"),
        ("a: 1\n b: 2", "line 2"),
        ("a: @b", "quote text"),
        ("a: " + "9" * 5000, "too long"),
        ("[" * 5000, "nest"),
        ("- " * (MAX_DEPTH + 1) + "x", "nested"),
        ("x: [" + "0," * 120_000 + "]", "values"),
        ("a: \x00", "line"),
    ],
)
def test_refused(text: str, said: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UsageError, match=r"mine\.yml") as error:
        parse(text, "mine.yml")
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begun < 2


def test_size() -> None:
    with pytest.raises(UsageError, match="larger than"):
        parse("#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        parse(b"#" * (MAX_BYTES + 1))
    with pytest.raises(UsageError, match="larger than"):
        parse("é" * (MAX_BYTES // 2 + 1))
    assert parse("#" * (MAX_BYTES - 1) + "\n") == []


def test_bytes() -> None:
    assert parse(b"\xef\xbb\xbfa: \xc3\xa9")[0].data == {"a": "é"}
    with pytest.raises(UsageError, match="line 2: the text is not UTF-8"):
        parse(b"a: 1\nb: \xff")


def test_deep_but_allowed() -> None:
    depth = MAX_DEPTH - 1
    value = parse("[" * depth + "]" * depth)[0].data
    for _ in range(depth - 1):
        (value,) = value
    assert value == []


def test_no_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_SECRET", "seen")
    assert parse("a: $WEFT_SECRET ${WEFT_SECRET} ~/x")[0].data == {"a": "$WEFT_SECRET ${WEFT_SECRET} ~/x"}


def test_value() -> None:
    assert parse_value("[0, 1e-3]") == [0, 1e-3]
    assert parse_value("") is None
    with pytest.raises(UsageError, match="more than one"):
        parse_value("1\n---\n2")
