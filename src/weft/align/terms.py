"""What stands along an axis, as a small term: a group, a run of fixed length, a product, a chain.

term  = part ("|" part)*          one after the other
part  = factor ("*" factor)*      for each unit of the first one of the second, and so on: slow to fast
factor = group name | number | "(" term ")"
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

from weft.errors import DataError

_TOKEN = re.compile(r"\s*(?:(?P<number>\d+)(?![\w.])|(?P<name>[\w.\-/\[\]]+)|(?P<sign>[*|()]))")


@dataclass(frozen=True, slots=True)
class Product:
    """For each unit of the first factor one of the next: slow to fast."""

    factors: tuple[Term, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """One part after the other."""

    parts: tuple[Term, ...]


Term: TypeAlias = str | int | Product | Chain


def product(factors: list[Term]) -> Term:
    """A product in its plainest form: nested ones opened, fixed runs joined, ones left out."""
    flat: list[Term] = []
    for f in factors:
        for g in f.factors if isinstance(f, Product) else (f,):
            if isinstance(g, int) and flat and isinstance(flat[-1], int):
                flat[-1] *= g
            elif g != 1:
                flat.append(g)
    return flat[0] if len(flat) == 1 else Product(tuple(flat)) if flat else 1


def chain(parts: list[Term]) -> Term:
    """A chain in its plainest form: nested ones opened, fixed runs joined."""
    flat: list[Term] = []
    for p in parts:
        for q in p.parts if isinstance(p, Chain) else (p,):
            if isinstance(q, int) and flat and isinstance(flat[-1], int):
                flat[-1] += q
            else:
                flat.append(q)
    return flat[0] if len(flat) == 1 else Chain(tuple(flat))


def groups_in(term: Term | None) -> Iterator[str]:
    """Every group of a term once, in order."""
    yield from dict.fromkeys(_groups(term))


def _groups(term: Term | None) -> Iterator[str]:
    if isinstance(term, str):
        yield term
    elif isinstance(term, Product | Chain):
        for part in term.factors if isinstance(term, Product) else term.parts:
            yield from _groups(part)


def size_of(term: Term | None, sizes: Mapping[str, int]) -> int | None:
    """How many positions a term has; None for an axis of any length."""
    if term is None or isinstance(term, int):
        return term
    if isinstance(term, str):
        return sizes[term]
    inner = [size_of(t, sizes) or 0 for t in (term.factors if isinstance(term, Product) else term.parts)]
    return prod(inner) if isinstance(term, Product) else sum(inner)


def written(term: Term | None) -> str | None:
    """A term as text, which `parsed` reads."""
    if term is None:
        return None
    if isinstance(term, Product):
        return "*".join(f"({written(f)})" if isinstance(f, Chain) else str(written(f)) for f in term.factors)
    if isinstance(term, Chain):
        return "|".join(str(written(p)) for p in term.parts)
    return str(term)


def parsed(text: str) -> Term:
    """A term from text. DataError saying where it cannot be read."""
    if text.count("(") > 32:
        raise DataError(f"axis {text[:40]!r}… has more than 32 parentheses")
    tokens: list[str] = []
    at = 0
    while text[at:].strip():
        match = _TOKEN.match(text, at)
        if match is None:
            raise DataError(f"axis {text!r} cannot be read from {text[at:].strip()[:20]!r} on: it may hold group "
                            "names, numbers, * | and parentheses")  # fmt: skip
        tokens.append(match[0].strip())
        at = match.end()
    tokens.append("")
    term, rest = _chain(tokens, 0, text)
    if tokens[rest]:
        raise DataError(f"axis {text!r} has a {tokens[rest]!r} too many")
    return term


def _chain(tokens: list[str], at: int, text: str) -> tuple[Term, int]:
    parts: list[Term] = []
    while True:
        part, at = _product(tokens, at, text)
        parts.append(part)
        if tokens[at] != "|":
            return chain(parts), at
        at += 1


def _product(tokens: list[str], at: int, text: str) -> tuple[Term, int]:
    factors: list[Term] = []
    while True:
        token = tokens[at]
        if token in ("", "*", "|", ")"):
            raise DataError(f"axis {text!r} lacks a group or a number before {token or 'its end'!r}")
        if token == "(":
            inner, at = _chain(tokens, at + 1, text)
            if tokens[at] != ")":
                raise DataError(f"axis {text!r} lacks a closing parenthesis")
            factors.append(inner)
        else:
            factors.append(int(token) if token.isdigit() else token)
        at += 1
        if tokens[at] != "*":
            return product(factors), at
        at += 1
