"""The difference of two models in one weight, streamed by rows, and its best low-rank approximation.

Exact: for D [m, n] with n ≤ m the Gram matrix DᵀD = V Λ Vᵀ is summed over blocks of rows; its first r eigenvectors
give D V_r V_rᵀ, the best approximation of rank r (Eckart–Young) to a relative 1e-8, in O(n²) memory however tall
D is. A wide D is held whole and decomposed from the other side.

Fast: a randomised range finder (Halko, Martinsson & Tropp, 0909.4061) with oversampling and power iterations; the
reported error is that of the result, not an estimate.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm, pi, prod, sqrt

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.checkpoints.execution import executing, execution, map_here
from weft.methods.random import uniform_bits
from weft.methods.step import At

_BLOCK = 1 << 20
"""Elements of a block of rows."""
_HELD = 1 << 23
"""A difference of no more elements is kept between passes."""
_OVERSAMPLING, _POWERS = 16, 2


@dataclass(frozen=True, slots=True)
class Approximation:
    """D ≈ left · right with left [m, r], right [r, n] (singular values shared evenly), and what it lost."""

    left: Tensor
    right: Tensor
    norm: float
    """‖D‖ in Frobenius norm."""
    error: float
    """‖D − left · right‖ / ‖D‖; 0 for a D of zeros."""


class Difference:
    """D = model − base in one weight as stored, [m, n], kernels flattened; one slice of a stack of experts."""

    def __init__(self, model: Checkpoint, base: Checkpoint, name: str, index: int | None = None) -> None:
        self.model, self.base, self.name = model, base, name
        self.own = model.aliases.get(name, name)
        self.theirs = base.aliases.get(name, name)
        shape = base.info(self.theirs).shape
        self.shape = shape if index is None else shape[1:]
        self.rows, self.columns = self.shape[0], prod(self.shape[1:])
        self.start = (index or 0) * prod(self.shape)

    @property
    def working_bytes(self) -> int:
        """An upper bound of what approximating it holds."""
        small = min(self.rows, self.columns)
        whole = self.rows * self.columns if self.columns > self.rows else 0
        return 8 * (4 * small * small + max(whole, min(self.rows * self.columns, _HELD)) + 4 * _BLOCK)

    @property
    def changed(self) -> bool:
        """Whether any element differs. Stops at the first block that does."""
        with self._ready():
            return any(bool((block != 0).any()) for block in self._read())

    def _ready(self) -> _Ready:
        return _Ready(((self.model, self.own), (self.base, self.theirs)))

    def _read(self) -> Iterator[Tensor]:
        """Blocks of rows, float64; all rows at once where a source cannot be cut so."""
        total = self.rows * self.columns
        unit = lcm(self.columns, self.model.grain(self.own), self.base.grain(self.theirs))
        if self.start % unit or total % unit:
            low, high = 0, self.base.info(self.theirs).numel
            whole = self._between(low, high)[self.start : self.start + total]
            yield whole.reshape(self.rows, self.columns)
            return
        step = max(1, _BLOCK // unit) * unit
        for low in range(self.start, self.start + total, step):
            high = min(low + step, self.start + total)
            yield self._between(low, high).reshape(-1, self.columns)

    def _between(self, low: int, high: int) -> Tensor:
        ours = self.model.read(self.own, low, high, dtype=torch.float64)
        return ours - self.base.read(self.theirs, low, high, dtype=torch.float64)

    @cached_property
    def _kept(self) -> Tensor:
        return torch.cat(list(self._read()))

    def blocks(self) -> Iterator[Tensor]:
        """As `_read`, from memory where D is small or wide."""
        if self.rows * self.columns <= _HELD or self.columns > self.rows:
            yield self._kept
        else:
            yield from self._read()

    def spectrum(self) -> Tensor:
        """All singular values, falling; those that are zero but for rounding are zero."""
        with self._ready():
            return _roots(torch.linalg.eigvalsh(self._gram()))

    def _gram(self) -> Tensor:
        small = min(self.rows, self.columns)
        gram = torch.zeros(small, small, dtype=torch.float64)
        for block in self.blocks():
            gram += block.T @ block if self.columns <= self.rows else block @ block.T
        return gram

    def best(self, rank: int) -> Approximation:
        """The best approximation at a rank."""
        with self._ready():
            gram = self._gram()
            norm = sqrt(max(float(gram.trace()), 0.0))
            _, vectors = torch.linalg.eigh(gram)
            v = vectors.flip(1)[:, :rank]
            if self.columns > self.rows:
                return _shared(v, v.T @ self._kept, norm)
            return _shared(torch.cat([block @ v for block in self.blocks()]), v.T, norm)

    def sketched(self, rank: int, seed: int) -> tuple[Approximation, Tensor]:
        """Nearly the best approximation at a rank, and its singular values, by a random sketch."""
        with self._ready():
            width = min(rank + _OVERSAMPLING, self.rows, self.columns)
            q = self._times(_normal(self.name, self.start, seed, self.columns, width))
            for _ in range(_POWERS):
                q = self._times(torch.linalg.qr(self._transposed_times(torch.linalg.qr(q)[0]))[0])
            q = torch.linalg.qr(q)[0]
            core = self._transposed_times(q).T
            norm = sqrt(sum(float(block.square().sum()) for block in self.blocks()))
            u, s, vh = torch.linalg.svd(core, full_matrices=False)
            return _shared(q @ u[:, :rank], s[:rank, None] * vh[:rank], norm), s

    def _times(self, x: Tensor) -> Tensor:
        return torch.cat([block @ x for block in self.blocks()])

    def _transposed_times(self, x: Tensor) -> Tensor:
        total, row = torch.zeros(self.columns, x.shape[1], dtype=torch.float64), 0
        for block in self.blocks():
            total += block.T @ x[row : row + len(block)]
            row += len(block)
        return total


class _Ready:
    """Statistics of a merge gathered before it is read and forgotten afterwards, in this thread alone.

    A thread that helped another while it holds the lock of one weight could wait for that other's lock.
    """

    def __init__(self, pairs: tuple[tuple[Checkpoint, str], ...]) -> None:
        self.pairs = pairs

    def __enter__(self) -> None:
        self._alone = executing(replace(execution(), map=map_here, where="cpu"))
        self._alone.__enter__()
        for source, name in self.pairs:
            source.ready(name)

    def __exit__(self, *error: object) -> None:
        for source, name in self.pairs:
            source.release(name)
        self._alone.__exit__(None, None, None)


def _roots(eigenvalues: Tensor) -> Tensor:
    """Singular values from the rising eigenvalues of a Gram matrix."""
    falling = eigenvalues.flip(0).clamp_min(0)
    floor = falling[:1] * len(falling) * torch.finfo(torch.float64).eps
    return torch.where(falling > floor, falling, 0.0).sqrt()


def _shared(left: Tensor, right: Tensor, norm: float) -> Approximation:
    """left · right with the lengths shared evenly; one of the two has orthonormal columns or rows."""
    lengths = left.norm(dim=0) * right.norm(dim=1)
    kept = float(lengths.norm())
    root = lengths.sqrt()
    left = left * torch.nan_to_num(root / left.norm(dim=0))
    right = right * torch.nan_to_num(root / right.norm(dim=1))[:, None]
    error = sqrt(max(norm * norm - kept * kept, 0.0)) / norm if norm else 0.0
    return Approximation(left, right, norm, error)


def _normal(name: str, offset: int, seed: int, rows: int, columns: int) -> Tensor:
    """[rows, columns] standard normal, by Box–Muller from weft's counter: the same for any order or thread."""
    count = rows * columns
    bits = [uniform_bits(At(f"sketch:{name}:{offset}", seed=seed), i, count).double() for i in (0, 1)]
    radius = (-2 * torch.log((bits[0] + 0.5) / 2**32)).sqrt()
    return (radius * torch.cos(2 * pi * (bits[1] + 0.5) / 2**32)).reshape(rows, columns)
