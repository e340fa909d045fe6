"""The tokenizer of a recipe: what its keys mean, and the models brought to one vocabulary.

    tokenizer_source: base | union | MODEL
    tokenizer: {source, tokens: {TOKEN: {source, force}}, pad_to_multiple_of, force}

MergeKit's keys with its meaning; `force` for the tokenizer as a whole is weft's. The work is done in
`weft.llm.tokens`, which is imported when a recipe is built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from weft.checkpoints.base import Checkpoint
from weft.recipes import schema
from weft.recipes.findings import Findings
from weft.recipes.recipe import Recipe, Source, TokenizerChoice, TokenRow
from weft.recipes.yaml import Path

if TYPE_CHECKING:
    from weft.llm.tokens.sources import TokenRule

Resolve = Callable[[Any, Path], Source | None]


def choice(
    raw: schema.Recipe, found: Findings, path: Path, base: Source | None, source_of: Resolve
) -> TokenizerChoice | None:
    """What the recipe says of its tokenizer, or None where it says nothing (or something wrong, reported)."""
    if raw.tokenizer is not None and raw.tokenizer_source is not None:
        found.problem((*path, "tokenizer_source"), "tokenizer and tokenizer_source exclude each other")
    if raw.tokenizer is None and raw.tokenizer_source is None:
        return None
    where: Path = (*path, "tokenizer_source" if raw.tokenizer is None else "tokenizer")
    asked = raw.tokenizer if isinstance(raw.tokenizer, schema.Tokenizer) else None
    source: Any = asked.source if asked else raw.tokenizer or raw.tokenizer_source
    if source is None:
        source = "union"  # as MergeKit has it
    if source == "base" and base is None:
        found.problem(where, "there is no base_model to take the tokenizer from")
        return None
    chosen = base if source == "base" else "union" if source == "union" else source_of(source, where)
    if chosen is None:
        return None
    rows = {}
    for token, rule in (asked.tokens or {} if asked else {}).items():
        made = _row(rule, (*where, "tokens", token), found, source_of)
        if made is not None:
            rows[token] = made
    return TokenizerChoice(
        chosen, base, tuple(rows.items()), asked.pad_to_multiple_of if asked else None,
        bool(asked and asked.force), of_base=source == "base",
    )  # fmt: skip


def _row(rule: schema.TokenRule, path: Path, found: Findings, source_of: Resolve) -> TokenRow | None:
    if not isinstance(rule.source, schema.TokenEmbedding):
        if rule.source is None:
            return TokenRow(force=rule.force, given=False)
        model = source_of(rule.source, (*path, "source"))
        return None if model is None else TokenRow(model, force=rule.force)
    row = rule.source
    if row.kind == "zero":
        if row.model is not None or row.token is not None or row.token_id is not None:
            found.problem((*path, "source"), "kind: zero takes no model and no token")
        return TokenRow(force=rule.force)
    if row.model is None or (row.token is None) == (row.token_id is None):
        found.problem((*path, "source"), "kind: model_token takes model, and either token or token_id")
        return None
    model = source_of(row.model, (*path, "source", "model"))
    return (
        None
        if model is None
        else TokenRow(model, row.token if row.token_id is None else row.token_id, rule.force)
    )


def in_one_vocabulary(recipe: Recipe, fetch: Callable[[Source], Checkpoint]) -> dict[int, Checkpoint]:
    """By id of every checkpoint that the recipe mentions: the same in the vocabulary that the recipe asks for."""
    asked = recipe.tokenizer
    if asked is None:
        return {}
    from weft.llm.tokens.share import share_vocabulary

    order = [*([] if asked.base is None else [asked.base]), *recipe.references]
    models = list({id(m): m for m in map(fetch, order)}.values())
    index = {id(m): i for i, m in enumerate(models)}

    def number(source: Source) -> int:
        return index[id(fetch(source))]

    made = share_vocabulary(
        models,
        "union" if asked.source == "union" else number(asked.source),
        base=None if asked.base is None else number(asked.base),
        tokens={t: _rule(row, number) for t, row in asked.tokens},
        pad_to_multiple_of=asked.pad_to_multiple_of,
        keep_padding=recipe.compat != "mergekit",
        force=asked.force,
    )
    return {id(before): after for before, after in zip(models, made, strict=True)}


def _rule(row: TokenRow, number: Callable[[Source], int]) -> TokenRule:
    from weft.llm.tokens.sources import TokenRule

    return TokenRule(None if row.model is None else number(row.model), row.token, row.force, row.given)


def check_one_vocabulary(recipe: Recipe, models: Sequence[Checkpoint]) -> None:
    """Where the recipe says nothing of a tokenizer, rows are merged by number: refuse if they mean other tokens."""
    if recipe.tokenizer is None and recipe.mismatch == "error" and len(models) > 1:
        from weft.llm.tokens.share import check_same

        check_same(models)


def with_template(made: Checkpoint, asked: str | None, models: Sequence[Checkpoint]) -> Checkpoint:
    """The result with the chat template that the recipe asks for."""
    if asked is None:
        return made
    from weft.llm.tokens.template import templated

    return templated(made, asked, models)
