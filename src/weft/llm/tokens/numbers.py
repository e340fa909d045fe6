"""What a config says of the vocabulary: its size, and the numbers of special tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weft.checkpoints.base import Asset
from weft.checkpoints.company import asset
from weft.checkpoints.strictjson import parse_json
from weft.llm.tokens.vocabulary import Vocabulary

_NUMBER = re.compile(r"\w*token_(id|index|ids)")
_OF_THE_TOKENIZER = re.compile(r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id")
GENERATION = "generation_config.json"

Renumber = Callable[[tuple[str, ...], Any], Any]


def renumbered(
    config: Mapping[str, Any] | None,
    was: Vocabulary | None,
    now: Mapping[str, int],
    lead: Mapping[str, Any] | None,
    sizes: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """The config for a vocabulary `now`, where that of the model `was` another.

    A token keeps its meaning: the field's number becomes that of the same text. Beginning, end and padding
    are the tokenizer's business, so they come from `lead`, the config that belongs to it, where it has them.
    A token that is not there any more becomes null. `sizes`: `vocab_size` of the first becomes the second.
    """
    if config is None:
        return None
    names = was.by_id() if was is not None else []

    def number(path: tuple[str, ...], value: Any) -> Any:
        theirs = _at(lead, path)
        if _OF_THE_TOKENIZER.fullmatch(path[-1]) and theirs is not None:
            return theirs
        if isinstance(value, list):
            return [number(path, v) for v in value]
        if type(value) is not int or not 0 <= value < len(names) or names[value] is None:
            return value
        return now.get(str(names[value]))

    return _walked(config, (), number, sizes)


def renumbered_files(
    assets: Sequence[Asset], was: Vocabulary | None, now: Mapping[str, int], lead: Sequence[Asset]
) -> tuple[Asset, ...]:
    """The files with generation_config.json renumbered as the config is."""
    theirs = next((_json(a) for a in lead if a.name == GENERATION), None)
    return tuple(
        asset(a.name, _text(renumbered(_json(a), was, now, theirs))) if a.name == GENERATION else a
        for a in assets
    )


def _walked(
    config: Mapping[str, Any], path: tuple[str, ...], number: Renumber, sizes: tuple[int, int] | None
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for key, value in config.items():
        here = (*path, key)
        if isinstance(value, Mapping):
            made[key] = _walked(value, here, number, sizes)
        elif sizes is not None and key == "vocab_size" and value == sizes[0]:
            made[key] = sizes[1]
        elif _NUMBER.fullmatch(key) and isinstance(value, int | list) and not isinstance(value, bool):
            made[key] = number(here, value)
        else:
            made[key] = value
    return made


def _at(config: Mapping[str, Any] | None, path: tuple[str, ...]) -> Any:
    found: Any = config
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _json(file: Asset) -> dict[str, Any]:
    return parse_json(file.read(), file.name, "config-json", depth=64)


def _text(config: Mapping[str, Any] | None) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
