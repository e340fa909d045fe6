"""τ as a product of two thin matrices: θ̂ = θ0 + L R, the best approximation at a rank (truncated SVD).

Kernels are flattened to [out, the rest]; a tensor of three axes is a stack of matrices with factors of their own.
The product is made in tiles of eight rows whatever range is asked for, so its bits don't depend on the range.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from weft.checkpoints.base import TensorInfo
from weft.checkpoints.dtypes import dtype_name, is_mergeable, parse_dtype, round_to
from weft.deltas.pair import Pair, Part, Values
from weft.deltas.scheme import Encoder
from weft.errors import UsageError

if TYPE_CHECKING:
    from weft.adapters.difference import Difference

_ROWS = 8


def matrices(info: TensorInfo) -> tuple[int, int, int]:
    """(stack, rows, columns) of a tensor as it is decomposed; (0, 0, 0) for what is no matrix."""
    shape = info.shape
    if len(shape) < 2 or not info.numel:
        return 0, 0, 0
    return shape if len(shape) == 3 else (1, shape[0], prod(shape[1:]))


@dataclass(frozen=True, slots=True)
class LowRank:
    """Parts: `left` [stack, rows, rank], `right` [stack, rank, columns], in the dtype `factors`."""

    rank: int
    factors: str
    kind: ClassVar[str] = "lowrank"

    def problem(self, info: TensorInfo) -> str | None:
        stack, rows, columns = matrices(info)
        if not stack:
            return "a low-rank difference of what is no matrix"
        if not 1 <= self.rank <= min(rows, columns):
            return f"rank {self.rank} of a {rows}×{columns} matrix"
        try:
            dtype = parse_dtype(self.factors)
        except UsageError:
            return f"factors of dtype {self.factors!r}"
        fits = dtype_name(dtype) == self.factors and is_mergeable(dtype)
        return None if fits else f"factors of dtype {self.factors!r}"

    def parts(self, info: TensorInfo) -> dict[str, TensorInfo]:
        stack, rows, columns = matrices(info)
        dtype = parse_dtype(self.factors)
        return {
            "left": TensorInfo((stack, rows, self.rank), dtype),
            "right": TensorInfo((stack, self.rank, columns), dtype),
        }

    def decode(self, part: Part, base: Values, info: TensorInfo, start: int, stop: int) -> Tensor:
        values = base(start, stop, None).double()
        _, rows, columns = matrices(info)
        each, found = rows * columns, []
        for i in range(start // each, (stop - 1) // each + 1):
            low, high = max(start - i * each, 0), min(stop - i * each, each)
            found.append(self._update(part, rows, columns, i, low, high))
        return values + torch.cat(found)

    def _update(self, part: Part, rows: int, columns: int, i: int, low: int, high: int) -> Tensor:
        """Elements [low, high) of the i-th matrix of the stack."""
        r = self.rank
        tile = _ROWS * columns
        first, last = low // tile * _ROWS, min(-(-high // tile) * _ROWS, rows)
        at = i * rows * r
        left = part("left", at + first * r, at + last * r).double().reshape(-1, r)
        right = part("right", i * r * columns, (i + 1) * r * columns).double().reshape(r, columns)
        tiles = [left[a : a + _ROWS].clone() @ right for a in range(0, len(left), _ROWS)]
        return torch.cat(tiles).reshape(-1)[low - first * columns : high - first * columns]

    def working_bytes(self, info: TensorInfo, count: int) -> int:
        _, rows, columns = matrices(info)
        touched = min(count + 2 * _ROWS * columns, rows * columns)
        return 24 * touched + 16 * count + 20 * self.rank * (columns + touched // columns)


class LowRankEncoder(Encoder):
    """Both factors of one tensor, found together."""

    scheme: LowRank

    def __init__(self, pair: Pair, scheme: LowRank, fast: bool, seed: int) -> None:
        super().__init__(pair, scheme)
        self.fast, self.seed = fast, seed

    def prepare(self) -> None:
        for a, b in self.pair.cuts():
            self.pair.delta(a, b)  # says which tensor is not finite, which a decomposition cannot
        dtype = parse_dtype(self.scheme.factors)
        found = [self._factors(tau) for tau in differences(self.pair)]
        self.left = torch.cat([round_to(left, dtype).reshape(-1) for left, _ in found])
        self.right = torch.cat([round_to(right, dtype).reshape(-1) for _, right in found])

    def _factors(self, tau: Difference) -> tuple[Tensor, Tensor]:
        """left [rows, rank], right [rank, columns], float64."""
        if self.fast:
            made, _ = tau.sketched(self.scheme.rank, self.seed)
        else:
            made = tau.best(self.scheme.rank)
        # a sketch of a thin matrix may find fewer directions than it was asked for
        lacks = self.scheme.rank - made.left.shape[1]
        left = torch.nn.functional.pad(made.left, (0, lacks))
        return left, torch.nn.functional.pad(made.right, (0, 0, 0, lacks))

    def forget(self) -> None:
        self.left = self.right = torch.empty(0)

    def encode(self, part: str, start: int, stop: int) -> Tensor:
        return (self.left if part == "left" else self.right)[start:stop]

    def working_bytes(self, part: str, count: int) -> int:
        factors = sum(i.nbytes for i in self.scheme.parts(self.pair.info).values())
        return int(differences(self.pair)[0].working_bytes) + 10 * factors + 16 * count


def differences(pair: Pair) -> list[Difference]:
    """τ of each matrix of the stack, as `weft.adapters` decomposes it."""
    from weft.adapters.difference import Difference  # a room below, used by this scheme alone

    stack, many = matrices(pair.info)[0], len(pair.info.shape) == 3
    return [Difference(pair.model, pair.base, pair.name, i if many else None) for i in range(stack)]
