"""`share_vocabulary`: models brought to one vocabulary, each a lazy checkpoint whose rows mean the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.limits import shown
from weft.checkpoints.rows import Rows
from weft.errors import DataError, DataProblems, UsageError
from weft.llm.tokens.numbers import renumbered, renumbered_files
from weft.llm.tokens.sources import Holder, TokenRule, spelled
from weft.llm.tokens.tables import differing, tables
from weft.llm.tokens.union import Union, united
from weft.llm.tokens.vocabulary import needed, vocabulary_of

TOKENIZER_FILES = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece",
    "additional_chat_templates",
)  # fmt: skip
"""How the names of files begin that belong to the tokenizer."""


def share_vocabulary(
    models: Sequence[Checkpoint],
    source: int | Literal["union"] = "union",
    *,
    base: int | None = None,
    tokens: Mapping[str, TokenRule] | None = None,
    pad_to_multiple_of: int | None = None,
    keep_padding: bool = True,
    force: bool = False,
) -> list[Checkpoint]:
    """Every model in one vocabulary, in the order given; rows are matched by token, never by number.

    `source` is the index of the model whose vocabulary all get, or "union": the numbers of the base (or the
    first model), then the tokens of the others in order. A model that lacks a token gets the base's row, else
    the mean of the holders'; `tokens` says otherwise (see `sources.TokenRule`). The result has as many rows
    as the source's embedding, padding included, or more for new tokens; with `pad_to_multiple_of` as many as
    the tokens take, rounded up, the rest being the mean row. `keep_padding=False` drops padding, as MergeKit does.

    Raises UsageError for tokenizers of different kinds (unless `force`), DataError where a model has none.
    """
    if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
        raise UsageError(f"pad_to_multiple_of must be at least 1, not {pad_to_multiple_of}")
    holders = _holders(models)
    lead = (base or 0) if source == "union" else source
    if not force:
        _one_kind(holders, lead)
    first = holders[lead]
    union = _vocabulary(holders, lead, source == "union")
    rows, averaged = _rows(union, first, pad_to_multiple_of, keep_padding)
    names = (union.tokens + [None] * rows)[:rows]
    made = spelled(holders, names, base=base, rules=tokens, averaged=averaged)
    return [_dressed(r, h, first, union, rows) for r, h in zip(made, holders, strict=True)]


def _holders(models: Sequence[Checkpoint]) -> list[Holder]:
    """The models with their vocabularies; files that are the same are read once."""
    found: list[Holder] = []
    for model in models:
        alike = next((h for h in found if _same_file(h.model, model)), None)
        vocabulary = needed(model) if alike is None else replace(alike.vocabulary, origin=model.origin)
        found.append(Holder(model, vocabulary, tables(model)))
    return found


def _vocabulary(holders: Sequence[Holder], lead: int, union: bool) -> Union:
    first = holders[lead]
    files = tuple(a for a in first.model.assets if of_tokenizer(a))
    if not union:
        return Union(first.vocabulary.by_id(), files)
    others = [(h.vocabulary, h.tables.rows) for j, h in enumerate(holders) if j != lead]
    return united(first.vocabulary, others, files)


def _rows(union: Union, first: Holder, multiple: int | None, keep: bool) -> tuple[int, int | None]:
    """How many rows the result has, and from which on they are the mean of those before."""
    held = len(union.tokens)
    if union.tokens == first.vocabulary.by_id():
        held = min(held, first.tables.rows)  # a token without a row stays without one
    if multiple is None:
        return (max(held, first.tables.rows) if keep else held), None
    rows = -(-held // multiple) * multiple
    return rows, held if rows > held else None


def _dressed(made: Rows, holder: Holder, first: Holder, union: Union, rows: int) -> Rows:
    """The model with the config and the tokenizer files of the common vocabulary."""
    same = holder.vocabulary.same_as(first.vocabulary)
    was, lead = holder.vocabulary, None if same else first.model.config
    ids = union.ids
    config = renumbered(holder.model.config, was, ids, lead, (holder.tables.rows, rows))
    others = [a for a in holder.model.assets if not of_tokenizer(a)]
    if not same:
        others = list(renumbered_files(others, was, ids, first.model.assets))
    return Rows(holder.model, made.maps, config=config, assets=(*others, *union.assets))


def _one_kind(holders: Sequence[Holder], lead: int) -> None:
    """Tokens of different kinds of tokenizers have different texts for the same bytes, so few would match."""
    first = holders[lead].vocabulary
    problems = [
        f"{h.model.origin} has a {h.vocabulary.kind} tokenizer, {holders[lead].model.origin} a {first.kind} one"
        for h in holders if h.vocabulary.kind != first.kind
    ]  # fmt: skip
    if problems:
        text = "\n".join(f"  - {p}" for p in problems)
        raise UsageError(
            "tokenizers of different kinds have few tokens in common, and the merge would be garbled "
            f"(`weft tokens transplant` one first, or set tokenizer: {{force: true}}):\n{text}"
        )


def of_tokenizer(file: Asset) -> bool:
    """True for a file that belongs to the tokenizer."""
    return file.name.startswith(TOKENIZER_FILES) or file.name.endswith((".tiktoken", ".spm", ".model"))


def check_same(models: Sequence[Checkpoint]) -> None:
    """Refuse to merge rows by number where that would mix different tokens.

    DataProblems where embeddings have different numbers of rows, or where the tokenizers give one number to
    different ordinary tokens. Added tokens may differ (a fine-tune that renames a reserved one).
    """
    labels = {f"{m.origin}" if k == 0 else f"{m.origin} (model {k + 1})": m for k, m in enumerate(models)}
    heading = "the models' vocabularies differ"
    remedy = "set tokenizer_source: base | union | one of the models"
    different = differing(labels)
    if different:
        counts = {n: ", ".join(f"{r} rows in {m}" for m, r in rows.items()) for n, rows in different.items()}
        raise DataProblems(heading, [f"{n}: {told}: {remedy}" for n, told in counts.items()])
    first, problems = models[0], []
    for other in models[1:]:
        if other is not first and not _same_file(first, other):
            problems += [f"{p}: {remedy}" for p in _conflicts(first, other)]
    if problems:
        raise DataProblems(heading, problems)


def _same_file(a: Checkpoint, b: Checkpoint) -> bool:
    one, two = (next((f for f in m.assets if f.name == "tokenizer.json"), None) for m in (a, b))
    return one is not None and two is not None and one.read() == two.read()


def _conflicts(a: Checkpoint, b: Checkpoint) -> list[str]:
    try:
        one, two = vocabulary_of(a), vocabulary_of(b)
    except DataError:
        return []  # a damaged tokenizer is its owner's trouble: no weights depend on it here
    if one is None or two is None or one.same_as(two):
        return []
    names = one.by_id()
    for token, i in sorted(two.ids.items(), key=lambda item: item[1]):
        other = names[i] if i < len(names) else None
        if other not in (None, token) and token not in two.added and other not in one.added:
            return [f"token {i} is {shown(other)} in {a.origin} and {shown(token)} in {b.origin}"]
    return []
