"""The kinds of low-rank update that adapters hold: LoRA, LoHa, LoKr and stacks of experts.

Each is exactly a product ΔW = B A of two matrices, kernels flattened, however it is parametrised, so everything
above (expanding over a base, merging, resizing) knows one form. Ranks and shapes come from headers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol

from weft.checkpoints.base import Checkpoint
from weft.late import Tensor, torch

Pair = tuple[Tensor, Tensor]


class Update(Protocol):
    """What every kind answers. `weights` is the adapter's own tensors."""

    @property
    def scale(self) -> float: ...
    @property
    def embedding(self) -> bool: ...
    @property
    def magnitude(self) -> str | None: ...
    @property
    def count(self) -> int:
        """Slices along the base's first axis, each with factors of its own: 1, or the number of experts."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The adapter's tensors that it is made of."""

    def rank(self, weights: Checkpoint) -> int: ...

    def dims(self, weights: Checkpoint) -> tuple[int, ...]:
        """`(out, in, *kernel)` of one slice."""

    def factors(self, weights: Checkpoint, index: int = 0) -> Pair:
        """B `[out, r]` with the scale in it, and A `[r, in·kernel]`, of one slice; float64."""

    def problem(self, weights: Checkpoint) -> str | None:
        """Why its own tensors do not fit each other, or None."""


def _matrix(weights: Checkpoint, key: str) -> Tensor:
    """A factor as a float64 matrix, kernels flattened."""
    return weights.tensor(key).to(torch.float64).flatten(1)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """x ⊗ y. torch.kron refuses some transposed matrices."""
    return (x[:, None, :, None] * y[None, :, None, :]).reshape(len(x) * len(y), -1)


def _shape(weights: Checkpoint, key: str) -> tuple[int, ...]:
    return weights.info(key).shape


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One update `scale · B A` and the names of its factors in the adapter (LoRA, 2106.09685).

    With `middle`, the Tucker form of a convolution: ΔW[o,i,h,w] = Σ_mn B[o,m] M[m,n,h,w] A[n,i].
    """

    a: str
    b: str
    scale: float
    embedding: bool = False
    magnitude: str | None = None
    middle: str | None = None
    count: ClassVar[int] = 1

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(k for k in (self.a, self.b, self.middle, self.magnitude) if k)

    def rank(self, weights: Checkpoint) -> int:
        return _shape(weights, self.b)[1]

    def dims(self, weights: Checkpoint) -> tuple[int, ...]:
        a, b = _shape(weights, self.a), _shape(weights, self.b)
        return (b[0], a[1], *(_shape(weights, self.middle)[2:] if self.middle else a[2:]))

    def factors(self, weights: Checkpoint, index: int = 0) -> Pair:
        a = _matrix(weights, self.a)
        if self.middle:
            middle = weights.tensor(self.middle).to(torch.float64)
            a = torch.einsum("mn...,ni->mi...", middle, a).flatten(1)
        return _matrix(weights, self.b) * self.scale, a

    def problem(self, weights: Checkpoint) -> str | None:
        a, b = _shape(weights, self.a), _shape(weights, self.b)
        inner = _shape(weights, self.middle)[:2] if self.middle and len(a) > 1 else (a[0],) * 2 if a else ()
        if len(a) < 2 or len(b) < 2 or inner != (b[1], a[0]):
            return f"A {list(a)} and B {list(b)} do not multiply"
        if any(n != 1 for n in b[2:]) or (self.middle and any(n != 1 for n in a[2:])):
            return f"B {list(b)} is a convolution of its own, which weft does not expand"
        return None


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa (2108.06098): ΔW = scale · (W₁ₐ W₁ᵦ) ⊙ (W₂ₐ W₂ᵦ), which is a product of rank r₁·r₂.

    (Σᵢ uᵢ vᵢᵀ) ⊙ (Σⱼ xⱼ yⱼᵀ) = Σᵢⱼ (uᵢ ⊙ xⱼ)(vᵢ ⊙ yⱼ)ᵀ. With `middles` (T₁, T₂: `[r, r, kh, kw]`), W₁ₐ and W₂ₐ
    are stored `[r, out]` and the kernel runs in T.
    """

    first: tuple[str, str]
    second: tuple[str, str]
    scale: float
    middles: tuple[str, str] | None = None
    magnitude: str | None = None
    embedding: ClassVar[bool] = False
    count: ClassVar[int] = 1

    @property
    def keys(self) -> tuple[str, ...]:
        return (
            *self.first,
            *self.second,
            *(self.middles or ()),
            *([self.magnitude] if self.magnitude else ()),
        )

    def rank(self, weights: Checkpoint) -> int:
        return _shape(weights, self.first[1])[0] * _shape(weights, self.second[1])[0]

    def dims(self, weights: Checkpoint) -> tuple[int, ...]:
        (left, right), middles = self.first, self.middles
        out, rest = _shape(weights, left), _shape(weights, right)[1:]
        if middles:
            return (out[1], *rest, *_shape(weights, middles[0])[2:])
        return (out[0], *rest)

    def factors(self, weights: Checkpoint, index: int = 0) -> Pair:
        pairs = []
        for i, (left, right) in enumerate((self.first, self.second)):
            b, a = _matrix(weights, left), _matrix(weights, right)
            if self.middles:
                middle = weights.tensor(self.middles[i]).to(torch.float64)
                b, a = b.T, torch.einsum("mn...,ni->mi...", middle, a).flatten(1)
            pairs.append((b, a))
        (b1, a1), (b2, a2) = pairs
        b = (b1[:, :, None] * b2[:, None, :]).flatten(1)
        a = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
        return b * self.scale, a

    def problem(self, weights: Checkpoint) -> str | None:
        shapes = [_shape(weights, key) for key in (*self.first, *self.second)]
        axis = 0 if self.middles else 1
        if any(len(s) < 2 for s in shapes) or any(
            shapes[i][axis] != shapes[i + 1][0] or shapes[i][1 - axis] != shapes[0][1 - axis]
            or shapes[i + 1][1:] != shapes[1][1:] for i in (0, 2)
        ):  # fmt: skip
            return f"LoHa factors {[list(s) for s in shapes]} do not multiply"
        return None


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr (2212.10650): ΔW = scale · W₁ ⊗ W₂, each whole or a product of two factors.

    (B₁A₁) ⊗ (B₂A₂) = (B₁ ⊗ B₂)(A₁ ⊗ A₂). A whole W counts as W·1 or 1·W, whichever is the smaller.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    scale: float
    middle: str | None = None
    magnitude: str | None = None
    embedding: ClassVar[bool] = False
    count: ClassVar[int] = 1

    def _dims(self, weights: Checkpoint, keys: tuple[str, ...], middle: str | None) -> tuple[int, ...]:
        if middle:  # t2 [r, r, kh, kw], a [r, out], b [r, in]
            return (_shape(weights, keys[0])[1], _shape(weights, keys[1])[1], *_shape(weights, middle)[2:])
        return (_shape(weights, keys[0])[0], *_shape(weights, keys[-1])[1:])

    def _rank(self, weights: Checkpoint, keys: tuple[str, ...], middle: str | None) -> int:
        if len(keys) > 1:
            return _shape(weights, keys[1])[0]
        out, *rest = self._dims(weights, keys, middle)
        return min(out, prod(rest))

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(k for k in (*self.first, *self.second, self.middle, self.magnitude) if k)

    def rank(self, weights: Checkpoint) -> int:
        return self._rank(weights, self.first, None) * self._rank(weights, self.second, self.middle)

    def dims(self, weights: Checkpoint) -> tuple[int, ...]:
        one, two = self._dims(weights, self.first, None), self._dims(weights, self.second, self.middle)
        return (one[0] * two[0], one[1] * two[1], *two[2:])

    def _pair(self, weights: Checkpoint, keys: tuple[str, ...], middle: str | None) -> Pair:
        whole = [_matrix(weights, key) for key in keys]
        if middle:
            core = weights.tensor(middle).to(torch.float64)
            return whole[0].T, torch.einsum("mn...,ni->mi...", core, whole[1]).flatten(1)
        if len(whole) > 1:
            return whole[0], whole[1]
        w = whole[0]
        if w.shape[0] < w.shape[1]:
            return torch.eye(w.shape[0], dtype=w.dtype), w
        return w, torch.eye(w.shape[1], dtype=w.dtype)

    def factors(self, weights: Checkpoint, index: int = 0) -> Pair:
        b1, a1 = self._pair(weights, self.first, None)
        b2, a2 = self._pair(weights, self.second, self.middle)
        return _kron(b1, b2) * self.scale, _kron(a1, a2)

    def problem(self, weights: Checkpoint) -> str | None:
        keys = (*self.first, *self.second)
        if any(len(_shape(weights, key)) < 2 for key in keys):
            return f"LoKr factors {[list(_shape(weights, key)) for key in keys]} are no matrices"
        for pair, middle in ((self.first, None), (self.second, self.middle)):
            inner = 0 if middle else 1
            if len(pair) > 1 and _shape(weights, pair[0])[inner] != _shape(weights, pair[1])[0]:
                return f"LoKr factors {[list(_shape(weights, key)) for key in pair]} do not multiply"
        return None


@dataclass(frozen=True, slots=True)
class Experts:
    """PEFT's LoRA on a stack of experts `[E, d₁, d₂]`: A `[E·r, in]` by expert, B `[out, r·E]` expert fastest.

    `turned` says which axis A reads: d₂ (False, ΔWₑ = Bₑ Aₑ) or d₁ (True, ΔWₑ = (Bₑ Aₑ)ᵀ).
    """

    a: str
    b: str
    scale: float
    count: int
    turned: bool = False
    embedding: ClassVar[bool] = False
    magnitude: ClassVar[str | None] = None

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.a, self.b)

    def rank(self, weights: Checkpoint) -> int:
        return _shape(weights, self.a)[0] // self.count

    def dims(self, weights: Checkpoint) -> tuple[int, ...]:
        return (_shape(weights, self.b)[0], _shape(weights, self.a)[1])

    def factors(self, weights: Checkpoint, index: int = 0) -> Pair:
        a, b = _matrix(weights, self.a), _matrix(weights, self.b)
        a = a.reshape(self.count, -1, a.shape[1])[index]
        b = b.reshape(b.shape[0], -1, self.count)[:, :, index]
        return b * self.scale, a

    def problem(self, weights: Checkpoint) -> str | None:
        a, b = _shape(weights, self.a), _shape(weights, self.b)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] % self.count:
            return f"A {list(a)} and B {list(b)} are no factors of {self.count} experts"
        return None


@dataclass(frozen=True, slots=True)
class Scaling:
    """(IA)³ (2205.05638): a learned factor for each output (`inner` False) or input (True) of a weight."""

    key: str
    inner: bool
