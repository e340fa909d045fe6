"""Where every row of a common vocabulary comes from, for each of the models.

A model that has a token gives its own row. One that lacks it is given the base's row if the base has it, else the
mean of the rows of those that do (the only holder's, where there is one). What a recipe says of a token goes
before that: only for models that lack it, or for all with `force`. A number without a token (padding) is a
model's own row of that number where it has one without a token too, else the base's; rows beyond all of them
are the mean of the rows before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.rowmap import Ints, RowMap
from weft.checkpoints.rows import Mapped, Rows
from weft.errors import DataProblems
from weft.llm.tokens.tables import Tables
from weft.llm.tokens.vocabulary import Vocabulary

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class TokenRule:
    """Where the row of one token comes from: a row of a model, or zero."""

    model: int | None = None
    """Which of the models; None for zero."""
    token: str | int | None = None
    """Which token of it, by text or number; the token itself by default."""
    force: bool = False
    """Also for models that have the token."""
    given: bool = True
    """False where only `force` is said, and the source is the usual one."""


@dataclass(frozen=True)
class Holder:
    """A model with its vocabulary and its tables."""

    model: Checkpoint
    vocabulary: Vocabulary
    tables: Tables


def own_rows(holder: Holder, tokens: Sequence[str | None], nameless: Bools) -> Ints:
    """`[n]`: the holder's row of each token of the common vocabulary; −1 where it has none.

    A number without a token (`nameless`) is the same number of the holder, if that has no token there either.
    """
    ids, rows = holder.vocabulary.ids, holder.tables.rows
    found = np.array([-1 if t is None else ids.get(t, -1) for t in tokens], np.int64)
    found[found >= rows] = -1
    if not nameless.any():
        return found
    taken = np.zeros(max(rows, len(tokens)), np.bool_)
    named = np.fromiter(ids.values(), np.int64, len(ids))
    taken[named[named < len(taken)]] = True
    number = np.arange(len(tokens))
    return np.where(nameless & (number < rows) & ~taken[: len(tokens)], number, found)


def spelled(
    holders: Sequence[Holder],
    tokens: Sequence[str | None],
    *,
    base: int | None = None,
    rules: Mapping[str, TokenRule] | None = None,
    averaged: int | None = None,
) -> list[Rows]:
    """Each model with its rows in the order of `tokens` (None: a number without a token).

    `base` is the index of the holder that goes first where a model lacks a token. `rules` say otherwise for
    single tokens. Rows from `averaged` on are each model's mean of those before. Raises DataProblems for
    rules that cannot be followed and for models whose rows have different widths.
    """
    rules = rules or {}
    number = {t: i for i, t in enumerate(tokens) if t in rules}
    nameless = np.array([t is None for t in tokens], np.bool_)
    own = [own_rows(h, tokens, nameless) for h in holders]
    problems = [f"{t!r} is not in the result's vocabulary" for t in rules if t not in number]
    names = {n: h.tables.width(n) for h in holders for n in h.tables.names}
    maps: list[dict[str, Mapped]] = [{} for _ in holders]
    for name in names:
        keys = [h.tables.stored(name) for h in holders]
        sources = tuple((h.model, key) for h, key in zip(holders, keys, strict=True) if key is not None)
        number_of = {j: k for k, j in enumerate(j for j, key in enumerate(keys) if key is not None)}
        widths = {h.tables.width(key) for h, key in zip(holders, keys, strict=True) if key is not None}
        if len(widths) > 1:
            told = ", ".join(f"{list(h.tables.width(k))} in {h.model.origin}"
                             for h, k in zip(holders, keys, strict=True) if k is not None)  # fmt: skip
            problems.append(f"{name}: a token's row has shape {told}")
            continue
        usual = _usual([own[j] for j in number_of], None if base is None else number_of.get(base))
        special, forced = _ruled(rules, number, holders, number_of, own, usual, problems)
        for j, holder in enumerate(holders):
            if keys[j] != name:  # tied to another of its tensors, or not there
                continue
            mine = RowMap.pick(number_of[j], own[j])
            choice = np.where((own[j] >= 0) & ~forced, 0, 1)
            rows = RowMap.chosen([mine, special], choice)
            maps[j][name] = Mapped(rows, sources, holder.tables.width(name), holder.tables.lead(name))
    if problems:
        raise DataProblems("the models cannot be brought to one vocabulary", list(dict.fromkeys(problems)))
    made = [Rows(h.model, m) for h, m in zip(holders, maps, strict=True)]
    return made if averaged is None else [with_mean(m, averaged) for m in made]


def with_mean(model: Rows, first: int) -> Rows:
    """Rows from `first` on are the mean of those before, in every mapped tensor."""
    single, double = {}, {}
    for name, mapped in model.maps.items():
        n = len(mapped.rows)
        terms = np.arange(first, dtype=np.int64)
        mean = RowMap.mean(1, np.zeros(first, np.int64), np.zeros(first, np.int64), terms)
        single[name] = Mapped(mean, ((model, name),), mapped.width, mapped.lead)
    average = Rows(model, single)  # one row a tensor, which all the rows of padding share
    for name, mapped in model.maps.items():
        n = len(mapped.rows)
        padding = np.arange(n) >= first
        rows = RowMap.pick(padding.astype(np.int64), np.where(padding, 0, np.arange(n)))
        double[name] = Mapped(rows, ((model, name), (average, name)), mapped.width, mapped.lead)
    return Rows(model, double)


def _usual(own: Sequence[Ints], base: int | None) -> RowMap:
    """What a model that lacks a token is given: the base's row, else the mean of the holders'."""
    n = len(own[0])
    out = [np.flatnonzero(rows >= 0) for rows in own]
    if base is not None:
        lacking = own[base] < 0
        out = [ids if j == base else ids[lacking[ids]] for j, ids in enumerate(out)]
    return RowMap.mean(
        n,
        np.concatenate(out),
        np.concatenate([np.full(len(ids), j, np.int64) for j, ids in enumerate(out)]),
        np.concatenate([own[j][ids] for j, ids in enumerate(out)]),
    )


def _ruled(
    rules: Mapping[str, TokenRule],
    number: Mapping[str | None, int],
    holders: Sequence[Holder],
    number_of: Mapping[int, int],
    own: Sequence[Ints],
    usual: RowMap,
    problems: list[str],
) -> tuple[RowMap, Bools]:
    """The usual map with what `rules` say of single tokens, and which tokens are forced."""
    n = len(usual)
    forced, ruled = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    source, row = np.zeros(n, np.int64), np.full(n, -1, np.int64)
    for token, rule in rules.items():
        i = number.get(token)
        if i is None:
            continue
        forced[i], ruled[i] = rule.force, rule.given
        if rule.model is None or not rule.given:
            continue
        if rule.model not in number_of:
            problems.append(
                f"{token!r}: {holders[rule.model].model.origin} has no such tensor to take it from"
            )
            continue
        source[i] = number_of[rule.model]
        row[i] = _row_of(rule, token, i, holders[rule.model], own[rule.model], problems)
    return RowMap.chosen([usual, RowMap.pick(source, row)], ruled.astype(np.int64)), forced


def _row_of(rule: TokenRule, token: str, i: int, holder: Holder, own: Ints, problems: list[str]) -> int:
    """The row that a rule names, −1 after reporting that there is none."""
    if rule.token is None:
        found = int(own[i])
    elif isinstance(rule.token, int):
        found = rule.token
    else:
        found = holder.vocabulary.ids.get(rule.token, -1)
    if not 0 <= found < holder.tables.rows:
        wanted = token if rule.token is None else rule.token
        problems.append(f"{token!r}: {holder.model.origin} has no row for the token {wanted!r}")
        return -1
    return found
