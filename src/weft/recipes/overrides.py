"""`--set key=value`: change a recipe before it is read.

    parameters.density=0.5
    models[1].parameters.weight=0.3
    steps[0].trim.density=0.2
    models[0].model=./another
    [math].parameters.density=0.5        in the document named math of a file with several

The value is YAML. Lists and their items must exist; of mappings, a key must exist or be one that recipes
have at that place, so that a misspelling is an error here and not a key nobody reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import UsageError, did_you_mean
from weft.recipes import schema
from weft.recipes.findings import OVERRIDDEN, show_path
from weft.recipes.yaml import Document, Path, parse_value

_PART = re.compile(r'\.?(?:"(?P<quoted>[^"]+)"|(?P<key>[^.\[\]"=\s]+))|\[(?P<index>\d{1,6})\]')
_DOCUMENT = re.compile(r"\[(?P<name>[^\]]+)\]\.?(?=.)")
_ANY = frozenset({"parameters", "tokens"})
"""Mappings below which any key may be new; what it means is checked when the recipe is."""


_MODELS = frozenset({"model", "lora", "base", "base_model"})


def override(documents: list[Document], sets: Sequence[str]) -> None:
    """Apply `key=value` texts to the documents, in order. Raises UsageError at the first that cannot be."""
    for text in sets:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {text!r}: write it as key=value, such as parameters.density=0.5")
        document, rest = _document(documents, key.strip(), text)
        path = parse_path(rest, text)
        _put(document, path, parse_value(value, f"--set {text}"), text)


def parse_path(text: str, origin: str = "") -> Path:
    """`models[1].parameters.weight` → `("models", 1, "parameters", "weight")`."""
    path: list[str | int] = []
    place = 0
    while place < len(text):
        found = _PART.match(text, place)
        if found is None or _misplaced(found, text, place):
            raise UsageError(
                f"--set {origin or text!r}: {text!r} is no path; write keys and [positions], such as "
                f"models[1].parameters.weight"
            )
        path.append(int(found["index"]) if found["index"] else found["quoted"] or found["key"])
        place = found.end()
    if not path or isinstance(path[0], int):
        raise UsageError(f"--set {origin or text!r}: begin with a key of the recipe, such as parameters")
    return tuple(path)


def _misplaced(found: re.Match[str], text: str, place: int) -> bool:
    """A key begins with a dot, unless it is the first."""
    return found["index"] is None and text.startswith(".", place) == (place == 0)


def _document(documents: list[Document], key: str, text: str) -> tuple[Document, str]:
    """The document meant and the rest of the key: the nameless or last one, unless [name] says which."""
    named = {d.data.get("name"): d for d in documents if isinstance(d.data, Mapping)}
    if found := _DOCUMENT.match(key):
        name = found["name"]
        if name not in named:
            hint = did_you_mean(name, [n for n in named if isinstance(n, str)])
            raise UsageError(f"--set {text!r}: there is no document named {name!r}{hint}")
        return named[name], key[found.end() :]
    return named.get(None, documents[-1]), key


def _put(document: Document, path: Path, value: Any, text: str) -> None:
    here: Any = document.data
    for i, part in enumerate(path):
        done, last = path[:i], i == len(path) - 1
        where = show_path(done) or "the recipe"
        if isinstance(part, int):
            if not isinstance(here, list):
                raise UsageError(f"--set {text!r}: {where} is no list")
            if part >= len(here):
                raise UsageError(f"--set {text!r}: {where} has {len(here)} items, numbered from 0")
            if isinstance(here[part], str) and not last and where.endswith("models"):
                here[part] = {"model": here[part]}  # the short form has no room for parameters
        else:
            if not isinstance(here, dict):
                raise UsageError(f"--set {text!r}: {where} is no mapping")
            if part not in here and not _ANY.intersection(done):
                known = [*here, *_known(done, here)]
                if part not in known:
                    hint = did_you_mean(part, known) or f"; it may have {', '.join(dict.fromkeys(known))}"
                    raise UsageError(f"--set {text!r}: {where} has no {part!r}{hint}")
            if not last and here.get(part) is None:
                here[part] = {}
        if last:
            here[part] = value
        else:
            here = here[part]
    _forget(document, path)


def _known(done: Path, here: Any) -> tuple[str, ...]:
    """The keys a mapping at this place may have."""
    if not done:
        return schema.TOP
    if done[-2:-1] == ("modules",):
        return schema.keys_at(done[-2:-1])
    if isinstance(done[-1], int) or done[-1] in ("tokenizer",):
        keys = schema.keys_at((*done, "<tokenizer>") if done[-1] == "tokenizer" else done)
        return () if "steps" in done else keys
    return schema.keys_at((*done, schema.model_form(here) or "")) if done[-1] in _MODELS else ()


def _forget(document: Document, path: Path) -> None:
    """The lines below a changed value are no more; messages about it point to --set."""
    document.lines = {p: n for p, n in document.lines.items() if p[: len(path)] != path}
    document.lines[path] = OVERRIDDEN
