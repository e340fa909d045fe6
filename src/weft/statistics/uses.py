"""Where a module uses its parameters: which part of which one an operand of a linear map is.

A weight may be used whole, as a view (the query rows of a fused projection, one expert of a stack), or transposed.
Views are recognised by the memory they show, so it does not matter by which code they came about.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd

from torch import Tensor, nn

from weft.checkpoints.dtypes import is_mergeable


@dataclass(frozen=True)
class Use:
    """A linear map y = x wᵀ whose w is rows [first, first + rows) of a parameter, seen as a matrix.

    The parameter's rows have the length of w's inputs; where `transposed` they have that of its outputs (stored
    [in, out]). `table` marks rows that are looked up, `scale` a vector that is multiplied with.
    """

    name: str
    first: int
    rows: int
    of: int
    """Rows of the whole parameter."""
    transposed: bool = False
    table: bool = False
    scale: bool = False


class Parameters:
    """The floating parameters of a module, found by the memory that tensors show."""

    def __init__(self, module: nn.Module) -> None:
        self.named: dict[str, nn.Parameter] = {
            n: p for n, p in module.named_parameters() if is_mergeable(p.dtype) and not p.is_meta
        }
        every = dict(module.named_parameters(remove_duplicate=False))
        first = {id(p): n for n, p in self.named.items()}
        self.tied = {n: first[id(p)] for n, p in every.items() if id(p) in first and first[id(p)] != n}
        self._stored: dict[int, list[str]] = {}
        for name, p in self.named.items():
            self._stored.setdefault(p.untyped_storage().data_ptr(), []).append(name)

    def find(self, w: Tensor, *, flipped: bool = False) -> Use | None:
        """Which rows of which parameter the matrix w [out, in] is; None if it is none.

        `flipped` says that w is given as [in, out] (the right operand of x @ w).
        """
        for name in self._stored.get(w.untyped_storage().data_ptr(), ()):
            p = self.named.get(name)
            if p is None:
                continue
            start = int(w.storage_offset() - p.storage_offset())
            if start < 0 or start + w.numel() > p.numel() or w.numel() == 0:
                continue
            lead = int(w.shape[0])
            width = w.numel() // lead
            whole = w.shape == p.shape and w.stride() == p.stride()  # in whatever memory format
            if whole or w.is_contiguous():  # rows of the parameter, in the order w has them
                return _rows(name, p, start, lead, width, transposed=flipped)
            if w.dim() == 2 and w.t().is_contiguous():
                return _rows(name, p, start, width, lead, transposed=not flipped)
        return None

    def table(self, w: Tensor) -> Use | None:
        """The parameter whose rows are looked up in w [V, d]."""
        found = self.find(w)
        return None if found is None else Use(found.name, found.first, found.rows, found.of, table=True)

    def scale(self, w: Tensor) -> Use | None:
        """The vector parameter that w is."""
        if w.dim() != 1:
            return None
        for name in self._stored.get(w.untyped_storage().data_ptr(), ()):
            p = self.named.get(name)
            if p is not None and p.shape == w.shape and p.storage_offset() == w.storage_offset():
                return Use(name, 0, len(w), len(w), scale=True)
        return None


def _rows(name: str, p: Tensor, start: int, rows: int, width: int, *, transposed: bool) -> Use | None:
    if width == 0 or start % width or p.numel() % width:
        return None
    return Use(name, start // width, rows, p.numel() // width, transposed)


def block_rows(uses: Iterable[Use]) -> int:
    """Rows of the equal blocks that a parameter must be cut into so that every use is made of whole blocks."""
    rows = 0
    for use in uses:
        rows = gcd(rows, use.first, use.rows, use.of)
    return rows


def by_parameter(uses: Iterable[Use]) -> Mapping[tuple[str, bool], list[Use]]:
    """The uses of each parameter, those as a table apart from those as a linear map."""
    found: dict[tuple[str, bool], list[Use]] = {}
    for use in uses:
        found.setdefault((use.name, use.table), []).append(use)
    return found
