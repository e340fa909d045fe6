"""The YAML a recipe may be written in: plain data, and nothing a stranger's file could do harm with.

No aliases or anchors (a kilobyte of them expands to gigabytes), no tags, no duplicate keys, at most 1 MiB,
bounded depth and number of values. Scalars are read as MergeKit's YAML 1.1 reader reads them, with three
exceptions that surprise people there: `1e-5` is a number, `1:30` and dates are text, and `010` is ten.
The reader walks the parser's events without recursion and remembers on which line each value begins, so
that every later message can say where.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from weft.errors import UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 64
MAX_VALUES = 100_000

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml is ten times faster on a full MiB
_INT = re.compile(r"[-+]?[0-9]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, ".inf": float("inf"), "+.inf": float("inf"),
                          "-.inf": float("-inf"), ".nan": float("nan")}  # fmt: skip
_WORDS |= dict.fromkeys(("true", "yes", "on"), True) | dict.fromkeys(("false", "no", "off"), False)

Path = tuple[str | int, ...]
"""Where a value lies in a document: keys and list positions from the top."""


@dataclass
class Document:
    """One YAML document as data, and the line on which each value begins."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    number: int = 1

    def line(self, path: Path) -> int | None:
        """The line of the value at `path`, or of the nearest thing that contains it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.lines:
                return self.lines[path[:end]]
        return None


def parse(text: str | bytes, origin: str = "recipe") -> list[Document]:
    """Every document in `text` that is not empty.

    Raises UsageError with origin, line and column at the first thing that is not allowed.
    """
    if isinstance(text, bytes):
        text = _decoded(text, origin)
    # a character takes one byte at least, so the cheap test comes first
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise UsageError(f"{origin} is larger than {MAX_BYTES:,} bytes; no recipe is that long")
    if found := _CONTROL.search(text):
        line = text.count("\n", 0, found.start()) + 1
        column = found.start() - text.rfind("\n", 0, found.start())
        raise UsageError(f"{origin}, line {line}, column {column}: {found[0]!r} is not allowed; remove it")
    try:
        documents = list(_documents(text, origin))
    except yaml.YAMLError as error:
        raise UsageError(_explained(error, origin)) from None
    return [d for d in documents if d.data is not None]


def parse_value(text: str, origin: str = "value") -> Any:
    """One value, as `--set key=value` writes it."""
    documents = parse(text, origin)
    if len(documents) > 1:
        raise UsageError(f"{origin}: {text!r} is more than one value")
    return documents[0].data if documents else None


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means."""
    if text.lower() in _WORDS and (text.islower() or text.isupper() or text.istitle() or not text.isalpha()):
        return _WORDS[text.lower()]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


@dataclass
class _Open:
    """A mapping or sequence whose end has not been seen."""

    value: dict[str, Any] | list[Any]
    path: Path
    key: str | None = None


def _documents(text: str, origin: str) -> Iterator[Document]:
    stack: list[_Open] = []
    document = Document(None)
    number = values = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.DocumentStartEvent):
            number += 1
            document, stack = Document(None, {}, number), []
        elif isinstance(event, yaml.DocumentEndEvent):
            yield document
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            stack.pop()
        elif isinstance(event, yaml.NodeEvent):
            values += 1
            _refuse(event, len(stack), values, origin)
            key = stack[-1] if stack and isinstance(stack[-1].value, dict) and stack[-1].key is None else None
            if key is not None:
                key.key = _key(event, key, origin)
                document.lines[(*key.path, key.key)] = _line(event)
                continue
            value: Any = (
                {} if isinstance(event, yaml.MappingStartEvent)
                else [] if isinstance(event, yaml.SequenceStartEvent)
                else _scalar_of(event, origin)
            )  # fmt: skip
            path = _place(value, stack, document)
            document.lines.setdefault(path, _line(event))
            if isinstance(value, dict | list):
                stack.append(_Open(value, path))


def _place(value: Any, stack: list[_Open], document: Document) -> Path:
    """Put a value where it belongs and say where that is."""
    if not stack:
        document.data = value
        return ()
    parent = stack[-1]
    if isinstance(parent.value, list):
        parent.value.append(value)
        return (*parent.path, len(parent.value) - 1)
    key = parent.key
    assert key is not None
    parent.value[key], parent.key = value, None
    return (*parent.path, key)


def _scalar_of(event: yaml.NodeEvent, origin: str) -> Any:
    assert isinstance(event, yaml.ScalarEvent)
    if event.implicit[0]:  # plain, that is neither quoted nor a block of text
        if event.value.lstrip("+-").isdecimal() and len(event.value) > 40:
            raise _error("this number is too long", event.start_mark, origin)
        return scalar(event.value)
    return event.value


def _key(event: yaml.NodeEvent, parent: _Open, origin: str) -> str:
    if not isinstance(event, yaml.ScalarEvent):
        raise _error("a key must be a word, not a list or mapping", event.start_mark, origin)
    assert isinstance(parent.value, dict)
    if event.value in parent.value:
        raise _error(f"the key {event.value[:80]!r} appears twice; remove one", event.start_mark, origin)
    return str(event.value)


def _refuse(event: yaml.NodeEvent, depth: int, values: int, origin: str) -> None:
    mark = event.start_mark
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _error("anchors and aliases (& and *) are not allowed; write the value out, or quote the text",
                     mark, origin)  # fmt: skip
    if (tag := getattr(event, "tag", None)) is not None:
        raise _error(f"tags are not allowed; remove {tag[:80]!r}", mark, origin)
    if depth >= MAX_DEPTH:
        raise _error(f"values are nested more than {MAX_DEPTH} deep", mark, origin)
    if values > MAX_VALUES:
        raise _error(f"there are more than {MAX_VALUES:,} values", mark, origin)


def _line(event: yaml.NodeEvent) -> int:
    mark: Any = event.start_mark
    return int(mark.line) + 1


def _error(message: str, mark: Any, origin: str) -> UsageError:
    return UsageError(f"{origin}, line {mark.line + 1}, column {mark.column + 1}: {message}")


def _explained(error: yaml.YAMLError, origin: str) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or "it is not YAML"
    context = getattr(error, "context", None)
    if "\\t" in said or "'\t'" in said or "cannot start any token" in said:
        said += "; indent with spaces, not tabs, and quote text that begins with @, ` or %"
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{origin}{place}: {said}{f' ({context})' if context else ''}"


def _decoded(data: bytes, origin: str) -> str:
    if len(data) > MAX_BYTES:
        raise UsageError(f"{origin} is larger than {MAX_BYTES:,} bytes; no recipe is that long")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{origin}, line {line}: the text is not UTF-8; save it as UTF-8") from None
