"""Candidates: a recipe with some of its keys set, as a lazy checkpoint and as YAML that `weft merge` runs.

A key is set exactly as `--set` does it, so the same paths work, with the same checks, and a candidate is what
the written recipe gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError
from weft.recipes.build import build
from weft.recipes.overrides import override, parse_path
from weft.recipes.read import read
from weft.recipes.yaml import Document, parse, scalar
from weft.search.space import Settings

Make = Callable[[Mapping[str, Any]], Checkpoint]
"""From values to a checkpoint: what may stand in place of a recipe."""
Loader = Callable[[Any], Checkpoint]

_POSITION = re.compile(r"\.(\d{1,6})(?=[.\[]|$)")
EVERY = "[*]"


class RecipeSource:
    """The recipe a search varies, read once. `sets` are applied to it first, as by `--set`."""

    def __init__(self, source: str | bytes | Path | Mapping[str, Any], sets: Sequence[str] = ()) -> None:
        self.origin = "recipe"
        if isinstance(source, Mapping):
            self.text = as_yaml(source).encode()
        elif isinstance(source, bytes):
            self.text = source
        elif isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{")):
            self.text = source.encode()
        else:
            read(source)  # says what is wrong with the file as it stands
            self.origin, self.text = str(source), Path(source).read_bytes()
        self.sets = tuple(sets)

    def documents(self, settings: Settings) -> list[Document]:
        """The recipe's documents with keys set. Raises UsageError for a key that recipes do not have there."""
        documents = parse(self.text, self.origin)
        if not documents:
            raise UsageError(f"{self.origin} is empty; a search needs a recipe to vary")
        override(documents, [*self.sets, *(f"{k}={json.dumps(v)}" for k, v in settings.items())])
        return documents

    def yaml(self, settings: Settings, comment: str = "") -> str:
        """The candidate's recipe, under a comment."""
        head = "".join(f"# {line}\n" for line in comment.splitlines())
        return head + "---\n".join(as_yaml(d.data) for d in self.documents(settings))

    def build(self, settings: Settings, loader: Loader | None = None) -> Checkpoint:
        """The candidate, unread. Raises UsageError and DataError as `weft merge` would."""
        return build(read(self.yaml(settings).encode()), loader=loader)

    def expand(self, path: str) -> list[str]:
        """`models[*].parameters.weight` → one path a model; `models.0` → `models[0]`."""
        path = _POSITION.sub(r"[\1]", path)
        if EVERY not in path:
            return [path]
        head, _, tail = path.partition(EVERY)
        prefix = re.match(r"\[[^\]\d][^\]]*\]\.?", head)
        documents = self.documents({})
        named = {d.data.get("name"): d for d in documents if isinstance(d.data, Mapping)}
        document = named.get(None, documents[-1])
        if prefix is not None:
            document = named.get(prefix[0].strip("[]."), document)
        here: Any = document.data
        for part in parse_path(head[prefix.end() if prefix else 0 :], path):
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                here = None
        if not isinstance(here, list):
            raise UsageError(f"{path}: {head} is no list in the recipe")
        return [p for i in range(len(here)) for p in self.expand(f"{head}[{i}]{tail}")]


class CallableSource:
    """A function from values to a checkpoint. It has no YAML."""

    text = b""
    origin = "a function"

    def __init__(self, make: Make) -> None:
        self.make = make
        self.origin = f"{make.__module__}:{getattr(make, '__qualname__', type(make).__name__)}"

    def build(self, settings: Settings, loader: Loader | None = None) -> Checkpoint:
        made = self.make(settings)
        if not isinstance(made, Checkpoint):
            raise UsageError(f"{self.origin} returned a {type(made).__name__}, not a checkpoint")
        return made

    def expand(self, path: str) -> list[str]:
        if EVERY in path:
            raise UsageError(f"{path}: [*] needs a recipe whose lists can be counted")
        return [path]


Source = RecipeSource | CallableSource


class _Dumper(yaml.SafeDumper):
    """YAML that weft's reader reads back as it was: no anchors, and quotes where a word could be a number."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    plain = "\n" not in value and scalar(value) == value
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


_Dumper.add_representer(str, _text)


def as_yaml(data: Any) -> str:
    """Plain data as one YAML document."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
