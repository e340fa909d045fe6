"""`read`: a recipe file, its text or its data → checked recipes, or every problem at once."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

from weft.errors import DataError, UsageError, did_you_mean
from weft.recipes import schema
from weft.recipes.findings import Findings, raise_problems
from weft.recipes.overrides import override
from weft.recipes.recipe import Named, Recipe, walk
from weft.recipes.resolve import Around, resolve
from weft.recipes.yaml import MAX_BYTES, MAX_DEPTH, Document, parse

Readable = str | bytes | FilePath | Mapping[str, Any]
"""A path, the text itself (a string of several lines), or a recipe as data."""


@dataclass
class Reading:
    """A file as far as it could be understood."""

    origin: str
    recipes: list[Recipe] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(source: Readable, set: Sequence[str] = ()) -> list[Recipe]:
    """The recipes in a file, in its order; `set` holds overrides such as `parameters.density=0.3`.

    Raises Problems with everything that is wrong, UsageError where it is no YAML, DataError where the file
    cannot be read. Nothing but the recipe itself is read.
    """
    reading = understand(source, set)
    raise_problems(reading.origin, reading.problems)
    return reading.recipes


def understand(source: Readable, set: Sequence[str] = ()) -> Reading:
    """What `read` does, but problems are returned with whatever could be understood besides them."""
    origin, documents = _documents(source)
    reading = Reading(origin)
    if not documents:
        raise UsageError(f"{origin} is empty; a recipe needs at least merge_method and models")
    override(documents, set)
    names = _names(documents, reading)
    for document in documents:
        found = Findings(document, _label(document, documents))
        if not isinstance(document.data, Mapping):
            found.problem((), "a recipe is a mapping of keys to values: merge_method, models …")
        elif (raw := schema.validate(document.data, found)) is not None:
            recipe = resolve(raw, found, (), Around(names))
            if recipe is not None:
                reading.recipes.append(replace(recipe, notes=tuple(found.notes)))
        reading.problems += found.problems
        reading.notes += found.notes
    named = {r.name: r for r in reading.recipes if r.name is not None}
    for recipe in reading.recipes:
        for inner in walk(recipe):
            inner.documents.update(named)
    reading.problems += _cycles(named)
    return reading


def _documents(source: Readable) -> tuple[str, list[Document]]:
    if isinstance(source, Mapping):
        return "recipe", [Document(_plain(source))]
    if isinstance(source, bytes):
        return "recipe", parse(source)
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
        return "recipe", parse(source)
    path = FilePath(source)
    return str(path), parse(_bytes(path), str(path))


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of data made in Python, as YAML would have given it."""
    if depth > MAX_DEPTH:  # or it contains itself
        raise UsageError(f"the recipe is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        odd = next((key for key in value if not isinstance(key, str)), None)
        if odd is not None:
            raise UsageError(f"the keys of a recipe are text, not {odd!r}")
        return {key: _plain(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, depth + 1) for inner in value]
    return str(value) if isinstance(value, FilePath) else value


def _bytes(path: FilePath) -> bytes:
    try:
        mode = path.stat().st_mode
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, beside) or "; check the path"
        raise UsageError(f"there is no recipe {path}{hint}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:  # a NUL in the path
        raise UsageError(f"{str(path)!r} is no path ({error})") from None
    if stat.S_ISDIR(mode):
        raise UsageError(f"{path} is a folder; pass the recipe file in it")
    # a pipe would block, a device would never end
    raise DataError(f"{path} is no regular file")


def _label(document: Document, documents: Sequence[Document]) -> str:
    if len(documents) == 1:
        return ""
    name = document.data.get("name") if isinstance(document.data, Mapping) else None
    return f"document {document.number}" + (f" ({name})" if isinstance(name, str) else "")


def _names(documents: Sequence[Document], reading: Reading) -> list[str]:
    names: list[str] = []
    nameless = 0
    for document in documents:
        name = document.data.get("name") if isinstance(document.data, Mapping) else None
        found = Findings(document, _label(document, documents))
        if isinstance(name, str):
            if name in names:
                found.problem(("name",), f"there are two documents named {name!r}")
            names.append(name)
        elif len(documents) > 1 and name is None:
            nameless += 1
            if nameless == 2:
                found.problem((), "only one document may have no name: it is the result; name the others")
        reading.problems += found.problems
    return names


def _cycles(named: Mapping[str, Recipe]) -> Iterator[str]:
    """A message for every circle of documents that name each other."""
    done: set[str] = set()

    def visit(name: str, chain: tuple[str, ...]) -> Iterator[str]:
        if name in chain:
            circle = " → ".join([*chain[chain.index(name) :], name])
            yield f"{name!r} is merged from itself: {circle}"
        elif name not in done and name in named:
            for inner in walk(named[name]):
                for source in inner.references:
                    if isinstance(source, Named):
                        yield from visit(source.name, (*chain, name))
            done.add(name)

    for name in named:
        yield from visit(name, ())
