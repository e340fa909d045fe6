"""Batches from texts and data sets: tokenised, padded, masked, as models of transformers take them.

texts("corpus.jsonl", tokenizer)                 a file, or strings, for statistics of inputs
rows(dataset, tokenizer, text="sentence")        mappings with a text and a label (a datasets.Dataset gives such)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weft.errors import DataError, UsageError

Batch = dict[str, Tensor]


def padded(ids: Sequence[Sequence[int]]) -> Batch:
    """`input_ids` and `attention_mask` [n, longest]; what is left out has id 0 and mask 0."""
    longest = max(map(len, ids))
    table = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for i, one in enumerate(ids):
        table[i, : len(one)] = torch.tensor(one, dtype=torch.long)
        mask[i, : len(one)] = 1
    return {"input_ids": table, "attention_mask": mask}


def texts(
    source: str | Path | Sequence[str],
    tokenizer: Any = None,
    *,
    vocabulary: int = 256,
    length: int = 512,
    batch: int = 8,
    labels: bool = False,
) -> list[Batch]:
    """Batches of windows of `length` tokens of a text, several, or the Path of a file (.txt, .jsonl, .gz).

    Without a tokenizer tokens are the bytes modulo `vocabulary`. With `labels` every batch has its ids as labels,
    as causal language models take them. DataError for texts without tokens.
    """
    from weft.llm.perplexity import tokens_of

    if length < 2 or batch < 1:
        raise UsageError(f"length {length}, batch {batch}: two tokens and one example are the least")
    every = tokens_of(source, tokenizer, vocabulary)
    windows = [ids[i : i + length] for ids in every for i in range(0, len(ids), length)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise DataError(f"{source if isinstance(source, Path) else 'the texts'}: not two tokens in a text")
    made = []
    for start in range(0, len(windows), batch):
        one = padded(windows[start : start + batch])
        made.append({**one, "labels": one["input_ids"]} if labels else one)
    return made


class rows(Iterable[Batch]):
    """Batches of rows, made anew in every pass: each row a mapping with a text and, if named, a label."""

    def __init__(
        self, dataset: Iterable[Mapping[str, Any]], tokenizer: Any, *, text: str = "text",
        label: str | None = "label", length: int = 512, batch: int = 8,
    ) -> None:  # fmt: skip
        self.dataset, self.tokenizer, self.text, self.label = dataset, tokenizer, text, label
        self.length, self.batch = length, batch

    def __iter__(self) -> Iterator[Batch]:
        left = iter(self.dataset)
        while some := list(islice(left, self.batch)):
            for key in [self.text, *([] if self.label is None else [self.label])]:
                without = next((r for r in some if key not in r), None)
                if without is not None:
                    raise UsageError(f"a row has no {key!r}; it has {', '.join(map(str, without))}")
            ids = [list(self.tokenizer(str(r[self.text]))["input_ids"])[: self.length] for r in some]
            if not all(ids):
                raise DataError(f"a row's {self.text!r} has no tokens")
            one = padded(ids)
            if self.label is not None:
                one["labels"] = torch.tensor([int(r[self.label]) for r in some])
            yield one
