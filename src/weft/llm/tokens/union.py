"""The union of vocabularies, and the tokenizer.json that has it.

The first vocabulary keeps its numbers; what the others add follows in the order listed, each in the order of its
own numbers. In tokenizer.json the new ones become added tokens: found in a text as they stand, before it is
split. Where another tokenizer's merges begin with all of the first one's (it was trained further), its merges are
taken, and its tokens are ordinary ones, as they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from weft.checkpoints.base import Asset
from weft.checkpoints.company import asset
from weft.errors import DataError
from weft.llm.tokens.vocabulary import Vocabulary

STALE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "added_tokens.json")
"""Files that state a vocabulary without the new tokens, and are left out where there are any."""


@dataclass(frozen=True)
class Union:
    """Tokens by number (None: a number without one), and the first tokenizer's files brought up to date."""

    tokens: list[str | None]
    assets: tuple[Asset, ...]

    @cached_property
    def ids(self) -> dict[str, int]:
        return {t: i for i, t in enumerate(self.tokens) if t is not None}


def united(first: Vocabulary, others: Sequence[tuple[Vocabulary, int]], assets: Sequence[Asset]) -> Union:
    """The union of `first` and `others`, each with its model's number of rows: a token without one adds nothing.

    `assets` are the first one's tokenizer files. Raises DataError where tokens are to be added to a tokenizer
    that is no tokenizer.json.
    """
    new: dict[str, Vocabulary] = {}
    for other, rows in others:
        fresh = sorted(other.ids.keys() - first.ids.keys(), key=other.ids.__getitem__)
        new |= {t: other for t in fresh if other.ids[t] < rows and t not in new}
    tokens = [*first.by_id(), *new]
    if not new:
        return Union(tokens, tuple(assets))
    if first.data is None:
        raise DataError(
            f"{first.origin} cannot be extended by {len(new)} tokens of {next(iter(new.values())).origin}: "
            "save the tokenizer with a current version of transformers, so that it has a tokenizer.json"
        )
    number = {t: first.size + i for i, t in enumerate(new)}
    longer = _longest(first, [v for v, _ in others])
    data = _extended(first, number, new, longer)
    _check_numbers(data, first, number)
    made = []
    for file in assets:
        if file.name == "tokenizer.json":
            made.append(Asset(file.name, partial(_text, data)))  # large, so written out when it is asked for
        elif file.name == "tokenizer_config.json":
            made.append(asset(file.name, _decoder(file.read(), data, number)))
        elif file.name not in STALE:
            made.append(file)
    return Union(tokens, tuple(made))


def _longest(first: Vocabulary, others: Sequence[Vocabulary]) -> Vocabulary | None:
    """The BPE with the most merges among those that begin with all of the first one's, if it has more."""
    found, most = None, _merges(first)
    if most is None:
        return None
    for other in others:
        theirs = _merges(other)
        if theirs is not None and len(theirs) > len(most) and all(map(_same_merge, theirs, most)):
            found, most = other, theirs
    return found


def _merges(vocabulary: Vocabulary) -> list[Any] | None:
    """Merges of a BPE as they are written; None for other models."""
    model = (vocabulary.data or {}).get("model") or {}
    merges = model.get("merges")
    return merges if model.get("type") == "BPE" and isinstance(merges, list) else None


def _same_merge(a: str | list[str], b: str | list[str]) -> bool:
    """Merges are written either as "a b" or as ["a", "b"]."""
    return a == b or [a if isinstance(a, list) else a.split(" ", 1)] == [
        b if isinstance(b, list) else b.split(" ", 1)
    ]


def _extended(
    first: Vocabulary, number: Mapping[str, int], new: Mapping[str, Vocabulary], longer: Vocabulary | None
) -> dict[str, Any]:
    """tokenizer.json with the new tokens."""
    assert first.data is not None
    data = {**first.data, "added_tokens": list(first.data.get("added_tokens") or [])}
    ordinary: set[str] = set()
    if longer is not None and longer.data is not None:
        ordinary = {t for t in new if t in longer.ids and t not in longer.added}
        vocab = {**first.data["model"]["vocab"], **{t: number[t] for t in new if t in ordinary}}
        # named among the ordinary ones too, added tokens keep the numbers they have
        vocab |= {t: first.ids[t] for t in first.added} | {t: number[t] for t in new}
        data["model"] = {**first.data["model"], "vocab": vocab, "merges": longer.data["model"]["merges"]}
    for token, origin in new.items():
        if token in ordinary:
            continue
        entry = dict(origin.added.get(token) or _plain(token))
        data["added_tokens"].append({**entry, "id": number[token], "content": token})
    return data


def _plain(token: str) -> dict[str, Any]:
    """An ordinary token of another tokenizer as an added one: found as it stands."""
    return {"id": 0, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": False}  # fmt: skip


def _check_numbers(data: Mapping[str, Any], first: Vocabulary, number: Mapping[str, int]) -> None:
    """The library numbers added tokens itself: those its model lacks go on from the largest. Check that they do."""
    model = data["model"]["vocab"]
    names = {entry[0] for entry in model} if isinstance(model, list) else model.keys()
    largest = -1
    for entry in sorted(data["added_tokens"], key=lambda e: e["id"]):
        if entry["content"] in names:
            largest = max(largest, entry["id"])
            continue
        expected = largest + 1 if largest >= len(names) else len(names)
        if entry["id"] != expected:
            raise DataError(
                f"{first.origin} cannot be extended: it has numbers without a token, so that {entry['content']!r} "
                f"would be read as {expected} instead of {entry['id']}; fill the gaps with added tokens first"
            )
        largest = entry["id"]


def _decoder(file: bytes, data: Mapping[str, Any], number: Mapping[str, int]) -> bytes:
    """tokenizer_config.json with the new tokens where it lists the added ones."""
    config = json.loads(file)
    if isinstance(config, dict) and isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] |= {
            str(e["id"]): {k: v for k, v in e.items() if k != "id"}
            for e in data["added_tokens"] if e["content"] in number
        }  # fmt: skip
    return _text(config)


def _text(data: Any) -> bytes:
    # without indentation, which takes ten times as long to write
    return (json.dumps(data, ensure_ascii=False) + "\n").encode(errors="surrogatepass")
