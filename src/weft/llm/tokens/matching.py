"""Which tokens of one vocabulary another has too, across kinds of tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.rowmap import Ints
from weft.checkpoints.strictjson import parse_json
from weft.llm.tokens.forms import form, forms
from weft.llm.tokens.vocabulary import Vocabulary

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class Matching:
    """For each number of one vocabulary the number of the same token in the other, or −1."""

    row: Ints
    """`[n]`."""
    exact: int
    """Tokens of the same text."""
    by_bytes: int
    """Tokens that stand for the same bytes in another writing."""
    by_role: int
    """Special tokens of the same role (beginning, end, padding …) under another text."""
    plain: Ints
    """`[n]`: 1 for matched tokens that stand for text, which special ones do not."""


def matched(
    theirs: Vocabulary, ours: Vocabulary, roles: Mapping[str, tuple[int, int]] | None = None
) -> Matching:
    """Tokens of `theirs` in `ours`.

    By text where the tokenizers are of one kind (added tokens always), else by the bytes they stand for,
    special ones by their role (role → number in `theirs`, number in `ours`).
    """
    n, alike = theirs.size, theirs.kind == ours.kind
    row, plain = np.full(n, -1, np.int64), np.zeros(n, np.int64)
    bytes_of_ours = forms(ours)
    role_of = dict((roles or {}).values())
    exact = by_bytes = by_role = 0
    for token, i in theirs.ids.items():
        made = None if token in theirs.special else form(token, theirs)
        same = ours.ids.get(token) if alike or token in theirs.added or token in ours.added else None
        if same is not None:
            row[i], exact = same, exact + 1
        elif made is not None and made in bytes_of_ours:
            row[i], by_bytes = bytes_of_ours[made], by_bytes + 1
        elif made is None and i in role_of:
            row[i], by_role = role_of[i], by_role + 1
        plain[i] = made is not None and row[i] >= 0
    return Matching(row, exact, by_bytes, by_role, plain)


def shared_roles(
    theirs: tuple[Checkpoint, Vocabulary], ours: tuple[Checkpoint, Vocabulary]
) -> dict[str, tuple[int, int]]:
    """Roles that both models give a token: role → number in the first, number in the second."""
    one, two = _roles(*theirs), _roles(*ours)
    return {role: (one[role], two[role]) for role in ROLES if role in one and role in two}


def _roles(model: Checkpoint, vocabulary: Vocabulary) -> dict[str, int]:
    """Role → number, as tokenizer_config.json says, else config.json."""
    file = next((a for a in model.assets if a.name == "tokenizer_config.json"), None)
    stated = {} if file is None else parse_json(file.read(), file.name, "config-json", depth=32)
    found = {}
    for role in ROLES:
        value: Any = stated.get(f"{role}_token")
        text = value.get("content") if isinstance(value, dict) else value
        number: Any = vocabulary.ids.get(text) if isinstance(text, str) else None
        if number is None:
            number = (model.config or {}).get(f"{role}_token_id")
        if type(number) is int and 0 <= number < vocabulary.size:
            found[role] = number
    return found


def in_pieces(text: bytes, known: Mapping[bytes, int], longest: int) -> list[int]:
    """Numbers of the tokens that `text` is written in, the longest possible first; unknown bytes are left out."""
    found, at = [], 0
    while at < len(text):
        for end in range(min(len(text), at + longest), at, -1):
            number = known.get(text[at:end])
            if number is not None:
                found.append(number)
                break
        else:
            end = at + 1
        at = end
    return found
