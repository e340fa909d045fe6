"""Which tensors have one row a token, and how many rows they have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError
from weft.llm.layout import fields, is_tower, layout, may_be_vocabulary
from weft.methods.layers import block_of
from weft.methods.parts import stored_name
from weft.recipes.kinds import kinds_of

_NO_VOCABULARY = re.compile(r"position|wpe|token_type|segment|patch|cls_token|pooler")


@dataclass(frozen=True)
class Tables:
    """The vocabulary's tensors of one model, all with the same number of rows."""

    model: Checkpoint
    names: tuple[str, ...]
    rows: int

    def stored(self, name: str) -> str | None:
        """The tensor of this model that another's `name` corresponds to: its own, or what it is tied to."""
        key = stored_name(self.model, name)
        return key if key in self.names else None

    def lead(self, name: str) -> tuple[int, ...]:
        """Axes of length 1 before the rows."""
        return (1,) if self.model.info(name).shape[0] != self.rows else ()

    def width(self, name: str) -> tuple[int, ...]:
        """Shape of one row."""
        return self.model.info(name).shape[1 + len(self.lead(name)) :]


def tables(model: Checkpoint) -> Tables:
    """The tensors with one row a token. DataError where there is none, or where config and tensors disagree."""
    sizes = dict(layout(model).vocabulary)
    stated = {v for path, v in fields(model.config or {}) if path[-1] == "vocab_size" and type(v) is int}
    if not sizes and not stated:  # nothing is known but names and shapes
        sizes = {n: i.shape[0] for n, i in model.tensors.items() if i.shape}
    sizes = {n: rows for n, rows in sizes.items() if _of_the_vocabulary(n)}
    embeddings = [rows for n, rows in sizes.items() if "head" not in kinds_of(n)]
    if not embeddings:
        there = ", ".join(
            f"{n} {list(i.shape)}" for n, i in model.tensors.items()
            if _of_the_vocabulary(n) and "head" not in kinds_of(n)
        )  # fmt: skip
        told = f"config.json says vocab_size {', '.join(map(str, sorted(stated)))}, " if stated else ""
        raise DataError(
            f"{model.origin}: {told}no embedding has one row a token (it has {there or 'no embedding at all'}): "
            "mend the config, or merge without a tokenizer option"
        )
    rows = max(embeddings)
    names = [n for n, count in sizes.items() if count == rows]
    # a bias over the vocabulary with an axis before it (BART's final_logits_bias)
    names += [n for n, i in model.tensors.items() if n.endswith("logits_bias") and i.shape == (1, rows)]
    return Tables(model, tuple(names), rows)


def differing(models: Mapping[str, Checkpoint]) -> dict[str, dict[str, int]]:
    """Vocabulary tensors whose number of rows is not the same in all models: name → model → rows.

    Nothing is said of models that are no language models.
    """
    if not any("vocab_size" in (path[-1] for path, _ in fields(m.config or {})) for m in models.values()):
        return {}
    found: dict[str, dict[str, int]] = {}
    for label, model in models.items():
        for name, info in model.tensors.items():
            if _of_the_vocabulary(name) and info.shape:
                found.setdefault(name, {})[label] = info.shape[0]
    return {name: rows for name, rows in found.items() if len(set(rows.values())) > 1}


def _of_the_vocabulary(name: str) -> bool:
    """Whether a name may be that of a language model's embedding or head."""
    outside = block_of(name) is None and not is_tower(name) and not _NO_VOCABULARY.search(name)
    return outside and may_be_vocabulary(name)
