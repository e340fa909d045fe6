"""Statistics of a stack, gathered in streaming passes: exact order statistics, Gram matrices, sums.

A statistic sees a stack `[k, n]` a range at a time. `partial` summarises a range, `join` puts summaries
together, `combine` closes a round, and after the last round `result` gives the keywords a step asked for.
Results don't depend on how the tensor was cut: counts are integers, and floating sums are kept per tile of
`TILE` elements (ranges begin at multiples of it) and added in a fixed order. Summaries of ranges are joined as
numpy arrays, and what comes out of a stream is one, so that what is computed from it (angles, weights) is the
same for every device and kernel; of a tensor at hand it is a tensor, which torch can differentiate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from weft.checkpoints.bits import Array
from weft.checkpoints.execution import TILE
from weft.late import Tensor, loaded, torch
from weft.methods.counting import DIGIT, Counted, add_up, reach

if TYPE_CHECKING:
    from weft.methods.step import At

T = TypeVar("T", Array, Tensor)


def namespace(x: Array | Tensor) -> Any:
    """numpy or torch, whichever x is of: both name the same functions alike."""
    return np if isinstance(x, np.ndarray | np.generic) else loaded()


def array(x: Array | Tensor) -> Array:
    """As a numpy array, on the CPU."""
    return x.cpu().numpy() if isinstance(x, Tensor) else x


def tensor(x: Any) -> Any:
    """A numpy array as a tensor; anything else as it is."""
    return torch.from_numpy(x) if isinstance(x, np.ndarray) else x


class Stat(ABC):
    """One statistic. `memo` is what earlier rounds left (None in the first)."""

    provides: tuple[str, ...] = ()
    scope: Literal["tensor", "model"] = "tensor"
    needs_order = False
    """True when `join` must see the summaries in the order of their ranges."""
    arrays = False
    """Whether a step takes what comes out of a stream as the arrays that they are; others are given tensors."""

    def rounds(self) -> int:
        """How many passes over the data are needed."""
        return 1

    @abstractmethod
    def partial(self, x: Tensor, memo: Any, params: Mapping[str, Any], at: At) -> Any:
        """Summary of a range, x: `[k, n]`."""

    @abstractmethod
    def join(self, parts: Sequence[Any]) -> Any:
        """One summary from several, in order."""

    @abstractmethod
    def combine(self, part: Any, memo: Any, params: Mapping[str, Any], numel: int) -> Any:
        """Close a round over `numel` elements: the memo for the next round, or for `result`.

        None if the summaries were made by a hint that was wrong: the first round is to be done without it.
        """

    def finished(self, memo: Any) -> bool:
        """True when no further round is needed, though `rounds` allows one."""
        return False

    def table_bytes(self, k: int, params: Mapping[str, Any]) -> int:
        """Memory that summaries of k models take, however short the range; what grows with it is not meant."""
        return 0

    @abstractmethod
    def result(self, memo: Any, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords for the step."""

    def of(self, x: Tensor, params: Mapping[str, Any], at: At) -> dict[str, Any]:
        """The statistic of one whole stack `[k, *shape]`; sums and inner products are differentiable."""
        flat = x.reshape(x.shape[0], -1)
        memo = None
        for _ in range(self.rounds()):
            if memo is not None and self.finished(memo):
                break
            memo = self.combine(self.partial(flat, memo, params, at), memo, params, flat.shape[1])
        return self.result(memo, params)


def fold(y: T) -> T:
    """Sum over the last axis by adding halves: [..., n] → [...].

    The order of the additions depends on n alone. Library sums and matrix products choose theirs by
    thread count, alignment and batch, and differ in the last bits from one cut of a tensor to another.
    """
    xp = namespace(y)
    while (n := y.shape[-1]) > 1:
        half = (n + 1) // 2
        both = y[..., : n - half] + y[..., half:]
        y = both if n == 2 * half else xp.concatenate([both, y[..., n - half : half]], -1)
    return y[..., 0] if n else y.sum(-1)


def tile_sums(y: Tensor) -> Tensor:
    """Sums over tiles, y: [m, n] → [tiles, m]; the last tile may be short."""
    full = y.shape[1] // TILE * TILE
    parts = [fold(y[:, :full].reshape(y.shape[0], -1, TILE)).T] if full else []
    if y.shape[1] > full or not full:
        parts.append(fold(y[:, full:])[None])
    return torch.cat(parts)


def pairs(k: int) -> list[tuple[int, int]]:
    """The upper triangle of a k×k matrix."""
    return [(i, j) for i in range(k) for j in range(i, k)]


def gram_of(x: Tensor) -> Tensor:
    """Inner products over the last axis in float64, x: [k, ..., n] → [..., k, k]."""
    k, x = x.shape[0], x.double()
    return symmetric(torch.stack([fold(x[i] * x[j]) for i, j in pairs(k)], -1), k)


def symmetric(entries: T, k: int) -> T:
    """The symmetric matrix with this upper triangle: [..., k(k+1)/2] → [..., k, k]."""
    where = {ij: at for at, ij in enumerate(pairs(k))}
    index = [where[min(i, j), max(i, j)] for i in range(k) for j in range(k)]
    return entries[..., index].reshape(*entries.shape[:-1], k, k)


class Gram(Stat):
    """`gram: [k, k]` float64, the inner products of the k tensors."""

    provides = ("gram",)
    needs_order = True
    arrays = True

    def partial(self, x: Tensor, memo: Any, params: Mapping[str, Any], at: At) -> Tensor:
        # pair by pair: one product of the range's size is alive at a time
        sums = [tile_sums((x[i].double() * x[j].double())[None]) for i, j in pairs(x.shape[0])]
        return torch.cat(sums, 1)  # [tiles, k(k+1)/2]

    def join(self, parts: Sequence[Array | Tensor]) -> Array:
        return np.concatenate([array(p) for p in parts])

    def combine(self, part: T, memo: Any, params: Mapping[str, Any], numel: int) -> T:
        gram = symmetric(fold(part.T), math.isqrt(2 * part.shape[1]))
        return gram.cpu() if isinstance(gram, Tensor) else gram

    def result(self, memo: Array | Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        return {"gram": memo}


class Sums(Stat):
    """Sums over elements of per-element quantities: `name: [m]`, float64.

    `fn(x, params, at)` maps `[k, n]` to `[m, n]`; the statistic is its sum over n. For a step of grain "row"
    every range consists of whole rows, and `fn` may look at them.
    """

    needs_order = True

    def __init__(
        self,
        name: str,
        fn: Callable[[Tensor, Mapping[str, Any], At], Tensor],
        scope: Literal["tensor", "model"] = "tensor",
    ) -> None:
        self.provides, self.fn, self.scope = (name,), fn, scope

    def partial(self, x: Tensor, memo: Any, params: Mapping[str, Any], at: At) -> Tensor:
        return tile_sums(self.fn(x, params, at).double())

    def join(self, parts: Sequence[Array | Tensor]) -> Array:
        return np.concatenate([array(p) for p in parts])

    def combine(self, part: T, memo: Any, params: Mapping[str, Any], numel: int) -> T:
        total = fold(part.T)
        return total.cpu() if isinstance(total, Tensor) else total

    def result(self, memo: Array | Tensor, params: Mapping[str, Any]) -> dict[str, Any]:
        return {self.provides[0]: memo}


Ranks = Callable[[Mapping[str, Any], int, int], Sequence[Sequence[int]]]
Value = Callable[[Tensor, Mapping[str, Any], "At"], Tensor]


class Select(Stat):
    """Exact order statistics of magnitudes by radix selection: no sort, no copy, two counting passes.

    `ranks(params, k, numel)` gives, per model, the 1-based ranks wanted, counted from the largest magnitude
    down; the result `name: [k, q]` holds the magnitudes at those ranks (+inf for rank 0, so that
    nothing reaches it, and 0.0 for ranks past the end). Magnitudes are compared as float32 whatever the
    working dtype: its bit patterns order like the numbers, and 24 bits hold what 16-bit weights differ by.
    Of something else than the entries: `value(x, params, at)` maps `[k, n]` to the `[m, n]` to be ranked.
    """

    def __init__(self, name: str, ranks: Ranks, value: Value | None = None) -> None:
        self.provides, self.ranks, self.value = (name,), ranks, value

    def _magnitude(self, x: Tensor, params: Mapping[str, Any], at: At) -> Tensor:
        return compared(x if self.value is None else self.value(x, params, at))

    def rounds(self) -> int:
        return 2

    def table_bytes(self, k: int, params: Mapping[str, Any]) -> int:
        # a row of counts for each rank; the pieces, their stack, what was added up before, the new sum
        wanted = max((len(row) for row in self.ranks(params, k, 1)), default=1)
        return 4 * k * wanted * 8 << DIGIT

    def partial(self, x: Tensor, memo: Any, params: Mapping[str, Any], at: At) -> Tensor:
        """Counts `[k, q, digits]` of the upper half of the keys, then of the lower half below a prefix."""
        keys = self._magnitude(x, params, at).view(torch.int32).long()  # [k, n]
        digits = 1 << DIGIT
        if memo is None:
            # magnitudes have no sign bit: the upper half is a digit of 15 bits
            counts = [torch.bincount(row >> DIGIT, minlength=digits // 2) for row in keys]
            return torch.stack(counts)[:, None]
        prefix = memo["prefix"]  # [k, q]
        counts = []
        for row, wanted in zip(keys, prefix.tolist(), strict=True):
            upper = row >> DIGIT
            counts += [torch.bincount(row[upper == p] & (digits - 1), minlength=digits) for p in wanted]
        return torch.stack(counts).reshape(*prefix.shape, digits)

    def join(self, parts: Sequence[Array | Tensor | Counted]) -> Array | Counted:
        counted = [p for p in parts if isinstance(p, Counted)]
        if counted:  # a table beside them is an empty range's
            return Counted.join(counted)
        return add_up([array(p) for p in parts if not isinstance(p, Counted)])

    def finished(self, memo: Any) -> bool:
        return bool(memo["round"] == 2)

    def combine(
        self, part: Array | Tensor | Counted, memo: Any, params: Mapping[str, Any], numel: int
    ) -> Any:
        if memo is None:
            k = (part.counts if isinstance(part, Counted) else part).shape[0]
            wanted = np.array([list(r) for r in self.ranks(params, k, numel)], np.int64)
            memo = {"wanted": wanted, "rank": wanted.clip(1, max(numel, 1)), "numel": numel,
                    "prefix": np.zeros_like(wanted), "round": 0}  # fmt: skip
        if not isinstance(part, Counted):
            return self._next_digit(array(part), memo)
        found = part.upper_digits(memo["rank"])
        if found is None:
            return None
        prefix, rank = found
        lower = part.lower_digits(prefix, rank)
        if lower is None:
            return memo | {"round": 1, "rank": rank, "prefix": prefix}
        return memo | {"round": 2, "rank": rank, "prefix": (prefix << DIGIT) | lower}

    def _next_digit(self, part: Array, memo: Any) -> Any:
        above = (
            part[..., ::-1].astype(np.int64).cumsum(-1)
        )  # from the largest digit down, [k, 1 or q, digits]
        where, before = reach(above[..., :-1], memo["rank"])
        return memo | {
            "round": memo["round"] + 1,
            "rank": memo["rank"] - before,
            "prefix": (memo["prefix"] << DIGIT) | (part.shape[-1] - 1 - where),
        }

    def result(self, memo: Any, params: Mapping[str, Any]) -> dict[str, Any]:
        value = memo["prefix"].astype(np.int32).view(np.float32).astype(np.float64)
        value = np.where(memo["wanted"] <= 0, math.inf, value)
        value = np.where(memo["wanted"] > memo["numel"], 0.0, value)
        return {self.provides[0]: value}

    def of(self, x: Tensor, params: Mapping[str, Any], at: At) -> dict[str, Any]:
        """On a tensor at hand a partial sort is simpler, and gives the same numbers."""
        magnitude = self._magnitude(x.detach().reshape(x.shape[0], -1), params, at)  # [k, n]
        ranks = self.ranks(params, *magnitude.shape)
        rows = [[_at_rank(m, r) for r in rs] for m, rs in zip(magnitude, ranks, strict=True)]
        return {self.provides[0]: torch.tensor(rows, dtype=torch.float64)}


class Chain(Stat):
    """Statistics of one step, one after the other: each sees the results of those before it as parameters."""

    def __init__(self, *stats: Stat) -> None:
        self.stats = stats
        self.provides = tuple(name for s in stats for name in s.provides)
        self.scope = stats[0].scope
        self.needs_order = any(s.needs_order for s in stats)

    def rounds(self) -> int:
        return sum(s.rounds() for s in self.stats)

    # memo: (number of the running statistic, rounds it has had, its own memo, results so far)
    def _state(self, memo: Any) -> tuple[int, int, Any, dict[str, Any]]:
        return memo or (0, 0, None, {})

    def partial(self, x: Tensor, memo: Any, params: Mapping[str, Any], at: At) -> Any:
        number, _, inner, found = self._state(memo)
        return number, self.stats[number].partial(x, inner, {**params, **found}, at)

    def join(self, parts: Sequence[Any]) -> Any:
        number = parts[0][0]
        return number, self.stats[number].join([part for _, part in parts])

    def combine(self, part: Any, memo: Any, params: Mapping[str, Any], numel: int) -> Any:
        number, had, inner, found = self._state(memo)
        stat, known = self.stats[number], {**params, **found}
        inner = stat.combine(part[1], inner, known, numel)
        if had + 1 < stat.rounds() and not stat.finished(inner):
            return number, had + 1, inner, found
        # as tensors, since the statistics that follow are torch's
        return number + 1, 0, None, {**found, **{n: tensor(v) for n, v in stat.result(inner, known).items()}}

    def finished(self, memo: Any) -> bool:
        return bool(memo[0] == len(self.stats))

    def table_bytes(self, k: int, params: Mapping[str, Any]) -> int:
        return 4 * k * 8 << DIGIT if any(isinstance(s, Select) for s in self.stats) else 0

    def result(self, memo: Any, params: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = memo[3]
        return found

    def of(self, x: Tensor, params: Mapping[str, Any], at: At) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for stat in self.stats:
            found |= stat.of(x, {**params, **found}, at)
        return found


def _at_rank(magnitude: Tensor, rank: int) -> float:
    n = magnitude.numel()
    if rank <= 0:
        return math.inf
    return float(magnitude.kthvalue(n - rank + 1).values) if rank <= n else 0.0


def compared(x: Tensor) -> Tensor:
    """|x| as magnitudes are compared: rounded to float32."""
    return x.abs().to(torch.float32)
