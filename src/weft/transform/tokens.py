"""Two tokenizers side by side: which token of one is which of the other, in a text and in the vocabularies.

In a text, positions are aligned by dynamic time warping with the edit distance of the tokens' texts as cost; in the
vocabularies a token goes to the one of least edit distance (MinED), itself where both have it (arXiv:2401.10491).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from weft.errors import UsageError

MARKS = ("▁", "Ġ", "##")
"""How tokenizers mark the beginning (or the inside) of a word; texts of tokens are compared without."""


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it."""

    def encode(self, text: str, **how: Any) -> list[int]: ...

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...

    def get_vocab(self) -> Mapping[str, int]: ...


def checked(tokenizer: Any, whose: str) -> Tokenizer:
    """The tokenizer; UsageError where it is missing or is none."""
    wanted = ("encode", "convert_ids_to_tokens", "get_vocab")
    lost = [n for n in wanted if not callable(getattr(tokenizer, n, None))]
    if lost:
        what = (
            "no tokenizer" if tokenizer is None else f"a {type(tokenizer).__name__} without {', '.join(lost)}"
        )
        raise UsageError(
            f"{whose} has {what}: give (model, tokenizer), the tokenizer as those of transformers are"
        )
    return tokenizer  # type: ignore[no-any-return]


def encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token numbers of a text, without special tokens around it."""
    return list(tokenizer.encode(text, add_special_tokens=False))


def plain(token: str) -> str:
    """A token's text without the mark of its word; a lone mark is a space."""
    for mark in MARKS:
        token = token.removeprefix(mark)
    return token or " "


def edit_distance(a: str, b: str) -> int:
    """How many characters must be put in, taken out or exchanged to make a into b (Levenshtein)."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        now = [i]
        for j, y in enumerate(b, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (x != y)))
        before = now
    return before[-1]


def aligned(target: Sequence[str], source: Sequence[str]) -> list[tuple[int, ...]]:
    """For every token of `target` the positions in `source` that dynamic time warping puts beside it, in order.

    The path of least Σ edit distance from both beginnings to both ends, by steps in one or both; ties go to both.
    """
    n, m = len(target), len(source)
    if not n or not m:
        return [()] * n
    cost = _costs(target, source)
    total = np.full((n + 1, m + 1), np.inf)
    total[0, 0] = 0
    for i in range(1, n + 1):
        row, above = total[i], total[i - 1]
        for j in range(1, m + 1):
            row[j] = cost[i - 1, j - 1] + min(above[j - 1], above[j], row[j - 1])
    found: list[list[int]] = [[] for _ in range(n)]
    i, j = n, m
    while i and j:
        found[i - 1].append(j - 1)
        best = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        if total[i - 1, j - 1] == best:
            i, j = i - 1, j - 1
        elif total[i - 1, j] == best:
            i -= 1
        else:
            j -= 1
    return [tuple(reversed(f)) for f in found]


def _costs(target: Sequence[str], source: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Edit distances [n, m]; each pair of texts is compared once."""
    mine, at = np.unique([plain(t) for t in target], return_inverse=True)
    theirs, to = np.unique([plain(t) for t in source], return_inverse=True)
    table = np.array([[edit_distance(a, b) for b in theirs] for a in mine], dtype=np.float64)
    return table[np.ix_(at, to)]


class Nearest:
    """Token of another vocabulary → number of the nearest token of this one, found when it is asked for."""

    def __init__(self, vocabulary: Mapping[str, int]) -> None:
        if not vocabulary:
            raise UsageError("a tokenizer with an empty vocabulary maps to nothing")
        self._exact = dict(vocabulary)
        self._plain: dict[str, int] = {}
        for token, i in sorted(vocabulary.items(), key=lambda kv: kv[1]):
            self._plain.setdefault(plain(token), i)
        self._by_length: dict[int, list[str]] = {}
        for text in self._plain:
            self._by_length.setdefault(len(text), []).append(text)
        self._known: dict[str, int] = {}

    def __call__(self, token: str) -> int:
        """Itself, or the same text under another mark, or the least edit distance (the lowest number of equals)."""
        if token not in self._known:
            self._known[token] = self._find(token)
        return self._known[token]

    def _find(self, token: str) -> int:
        if token in self._exact:
            return self._exact[token]
        text = plain(token)
        if text in self._plain:
            return self._plain[text]
        best: tuple[int, int] = (1 << 30, 0)
        for length in sorted(self._by_length, key=lambda n: abs(n - len(text))):
            if abs(length - len(text)) > best[0]:
                break  # the difference in length is a lower bound
            for other in self._by_length[length]:
                best = min(best, (edit_distance(text, other), self._plain[other]))
        return best[1]


def pieces(texts: Iterable[str], length: int) -> list[str]:
    """Texts cut at spaces into pieces of at most `length` characters, so of at most as many tokens each."""
    if length < 2:
        raise UsageError(f"length must be at least 2 characters, not {length}")
    found = []
    for text in texts:
        while len(text) > length:
            cut = text.rfind(" ", 1, length + 1)
            cut = length if cut <= 0 else cut
            found.append(text[:cut])
            text = text[cut:]
        found.append(text)
    return [f for f in found if f.strip()]
