"""`transplant`: give a model another model's tokenizer.

A token that the model knows, under the same text or standing for the same bytes, keeps its row. The others are
approximated from the tokens that both models know; see `approximate.py` for the ways. Embedding and head are done
each in its own space. The result is lazy: known and combined rows are read when they are written.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.memory import StateDict
from weft.checkpoints.rowmap import Ints, RowMap
from weft.checkpoints.rows import Mapped, Rows
from weft.errors import DataError, UsageError, did_you_mean
from weft.llm.tokens.approximate import NEED_DONOR, NEED_SHARED, WAYS, Terms, Unknown
from weft.llm.tokens.forms import form, forms
from weft.llm.tokens.matching import Matching, in_pieces, matched, shared_roles
from weft.llm.tokens.numbers import renumbered, renumbered_files
from weft.llm.tokens.share import of_tokenizer
from weft.llm.tokens.sources import Holder, with_mean
from weft.llm.tokens.tables import tables
from weft.llm.tokens.vocabulary import needed
from weft.recipes.kinds import kinds_of

METHODS = (*WAYS, "mean")


@dataclass(frozen=True)
class Report:
    """What became of the donor's tokens."""

    method: str
    tokens: int
    exact: int
    by_bytes: int
    by_role: int
    approximated: int
    shared: int
    """Tokens of text that both know, from which the others are approximated."""
    error: dict[str, float] = field(default_factory=dict)
    """Tensor → mean relative error with which the donor's rows are approximated (omp)."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Transplanted:
    """The model with the donor's tokenizer, and what became of the tokens."""

    checkpoint: Rows
    report: Report


def transplant(
    model: Checkpoint,
    donor: Checkpoint,
    method: str = "omp",
    *,
    k: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    pad_to_multiple_of: int | None = None,
) -> Transplanted:
    """`model` with `donor`'s tokenizer.

    `method` is one of `METHODS`; `k` how many tokens one is made of (omp: 64, neighbours: 8). `dtype` and `device`
    are those of the approximation. Rows beyond the donor's tokens are mean rows, as many as
    `pad_to_multiple_of` asks for.

    Raises UsageError for an unknown method, DataError where a tokenizer is missing or too few tokens are shared.
    """
    if method not in METHODS:
        raise UsageError(
            f"there is no method {method!r}{did_you_mean(method, METHODS)}; there are {', '.join(METHODS)}"
        )
    if k is not None and k < 1:
        raise UsageError(f"k must be at least 1, not {k}")
    ours, theirs = (Holder(m, needed(m), tables(m)) for m in (model, donor))
    found = matched(
        theirs.vocabulary, ours.vocabulary,
        shared_roles((donor, theirs.vocabulary), (model, ours.vocabulary)),
    )  # fmt: skip
    row = np.where(found.row < ours.tables.rows, found.row, -1)
    wanted = np.array(
        [i for t, i in sorted(theirs.vocabulary.ids.items(), key=lambda e: e[1]) if row[i] < 0], np.int64
    )
    both = np.flatnonzero((row >= 0) & (found.plain == 1) & (np.arange(len(row)) < theirs.tables.rows))
    shared = np.stack([both, row[both]])
    if method in NEED_SHARED and len(wanted) and not shared.shape[1]:
        raise DataError(
            f"{model.origin} and {donor.origin} share no token, so {method} has nothing to go by; use gaussian"
        )
    if method in NEED_DONOR:  # a token without a row in the donor is given none
        wanted = wanted[wanted < theirs.tables.rows]
    made = _Tables(
        ours, theirs, method, k or {"omp": 64}.get(method, 8), seed, dtype, device, row, wanted, shared
    )
    maps = {
        name: made.mapped(name) for name in sorted(ours.tables.names, key=lambda n: not ours.tables.width(n))
    }
    checkpoint = _dressed(ours, theirs, maps, pad_to_multiple_of)
    return Transplanted(checkpoint, _report(method, theirs, found, int((row < 0).sum()), shared, made.error))


@dataclass
class _Tables:
    """The tables of one transplant, made one after the other."""

    ours: Holder
    theirs: Holder
    method: str
    k: int
    seed: int
    dtype: torch.dtype
    device: str
    row: Ints
    wanted: Ints
    shared: Ints
    error: dict[str, float] = field(default_factory=dict)
    last: RowMap | None = None

    def mapped(self, name: str) -> Mapped:
        """How one table is made. A bias, which has no space of its own, is made as the table before it."""
        model, width, lead = self.ours.model, self.ours.tables.width(name), self.ours.tables.lead(name)
        known = RowMap.pick(0, self.row)
        missing = np.zeros(len(self.row), np.int64)
        missing[self.wanted] = 1
        at = np.full(len(self.row), -1, np.int64)
        at[self.wanted] = np.arange(len(self.wanted))
        if not width and self.last is not None:
            return Mapped(RowMap.chosen([known, self.last], missing), ((model, name),), width, lead)
        made = self._approximated(name) if width and self.method != "mean" else None
        if isinstance(made, Terms):
            if made.error is not None:
                self.error[name] = made.error
            combined = _combined(made, self.wanted, len(self.row))
            self.last = combined
            return Mapped(RowMap.chosen([known, combined], missing), ((model, name),), width, lead)
        if made is None:
            extra: Checkpoint = _average(model, name, self.shared[1], width)
            at[self.wanted] = 0
        else:
            extra = StateDict({name: made.float()}, origin=f"{self.method}({model.origin})")
        rows = RowMap.chosen([known, RowMap.pick(1, at)], missing)
        return Mapped(rows, ((model, name), (extra, name)), width, lead)

    def _approximated(self, name: str) -> Terms | torch.Tensor:
        donor = self.theirs
        key = donor.tables.stored(name) or _counterpart(name, donor)
        u = Unknown(
            name, self._table(donor.model, key if self.method in NEED_DONOR else ""),
            self._table(self.ours.model, name if self.method in ("random", "gaussian", "procrustes") else ""),
            self.wanted, self.shared, self._pieces() if self.method == "pieces" else [], self.k, self.seed,
        )  # fmt: skip
        return WAYS[self.method](u)

    def _table(self, model: Checkpoint, name: str) -> torch.Tensor:
        """A whole table in memory; nothing for a way that has no use for it."""
        return model.tensor(name, dtype=self.dtype).to(self.device) if name else torch.zeros(0, 0)

    def _pieces(self) -> list[list[int]]:
        known = {b: i for b, i in forms(self.ours.vocabulary).items() if i < self.ours.tables.rows}
        longest = max(map(len, known), default=1)
        names = self.theirs.vocabulary.by_id()
        texts = [form(str(names[i]), self.theirs.vocabulary) or b"" for i in self.wanted]
        return [in_pieces(text, known, longest) for text in texts]


def _counterpart(name: str, donor: Holder) -> str:
    """The donor's head for a head, where it has one, else its embedding, whatever they are called."""
    known = [n for n in donor.tables.names if donor.tables.width(n)]
    return max(known, key=lambda n: len(kinds_of(n) & kinds_of(name)))


def _combined(made: Terms, wanted: Ints, n: int) -> RowMap:
    """The terms as rows of the whole vocabulary."""
    counts = np.zeros(n, np.int64)
    counts[wanted] = np.bincount(made.out, minlength=len(wanted))
    order = np.argsort(made.out, kind="stable")  # `wanted` ascends, so this is the order of the rows, too
    indptr = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    return RowMap(indptr, np.zeros(len(order), np.int64), made.row[order], made.coefficient[order])


def _average(model: Checkpoint, name: str, rows: Ints, width: tuple[int, ...]) -> Rows:
    """One row: the mean of `rows`."""
    zero = np.zeros(len(rows), np.int64)
    return Rows(model, {name: Mapped(RowMap.mean(1, zero, zero, rows), ((model, name),), width)})


def _dressed(ours: Holder, theirs: Holder, maps: dict[str, Mapped], multiple: int | None) -> Rows:
    """The result with the donor's tokenizer files and numbers."""
    n = theirs.vocabulary.size
    rows = n if multiple is None else -(-n // multiple) * multiple
    if rows > n:
        pad = RowMap.pick(0, np.full(rows - n, -1, np.int64))
        for name, m in maps.items():
            longer = np.concatenate([m.rows.indptr, m.rows.indptr[-1] + pad.indptr[1:]])
            maps[name] = Mapped(
                RowMap(longer, m.rows.source, m.rows.row, m.rows.coefficient), m.sources, m.width, m.lead
            )
    made = Rows(ours.model, maps)
    if rows > n:
        made = with_mean(made, n)
    config = renumbered(
        ours.model.config,
        ours.vocabulary,
        theirs.vocabulary.ids,
        theirs.model.config,
        (ours.tables.rows, rows),
    )
    others = [a for a in ours.model.assets if not of_tokenizer(a)]
    others = list(renumbered_files(others, ours.vocabulary, theirs.vocabulary.ids, theirs.model.assets))
    files = [a for a in theirs.model.assets if of_tokenizer(a)]
    return Rows(made.model, made.maps, config=config, assets=(*others, *files),
                origin=f"{ours.model.origin} with the tokenizer of {theirs.model.origin}")  # fmt: skip


def _report(
    method: str, theirs: Holder, found: Matching, missing: int, shared: Ints, error: dict[str, float]
) -> Report:
    holes = theirs.vocabulary.size - len(theirs.vocabulary)
    return Report(
        method, len(theirs.vocabulary), found.exact, found.by_bytes, found.by_role, missing - holes,
        int(shared.shape[1]), error,
    )  # fmt: skip
