"""Pieces of compiled code that generated kernels are put together from.

Values are float64 inside a kernel. bf16 is read and written as raw uint16, so a tensor passes through once,
without intermediate arrays. Loops run over blocks of `BLOCK` values that stay in the first-level cache, and
are kept simple enough for the compiler to vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
u32 = np.uint32


@njit(inline="always", **OPTIONS)
def from_bf16(x: Any) -> Any:
    """Raw bfloat16 → float64."""
    return np.float64(u32(u32(x) << u32(16)).view(np.float32))


@njit(inline="always", **OPTIONS)
def short_bf16(x: Any) -> Any:
    """Raw bfloat16 → float32."""
    return u32(u32(x) << u32(16)).view(np.float32)


@njit(inline="always", **OPTIONS)
def magnitude(x: Any) -> Any:
    """|x| as magnitudes are compared (float32)."""
    return np.float32(abs(x))


@njit(inline="always", **OPTIONS)
def mix(x: Any) -> Any:
    """One round of methods/random.py's mixer on a uint32."""
    x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x7FEB352D))
    x = u32(u32(x ^ u32(x >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ u32(x >> u32(16)))


@njit(inline="always", **OPTIONS)
def bits(position: Any, k0: Any, k1: Any) -> Any:
    """The uniform 32 bits of a position (low word) in a stream."""
    return mix(u32(mix(u32(position ^ k0)) ^ k1))


@njit(inline="always", **OPTIONS)
def to_bf16(exact: Any) -> Any:
    """A float64 rounded once, to nearest even, to raw bfloat16.

    A float32 half-way between two bfloat16 may have been rounded there: it leans back by one place to the
    true side first. Such values are common (a mean by 0.5, 0.3 and 0.2 has short numbers), so this is done
    without a branch.
    """
    near = np.float32(exact)
    v = near.view(np.uint32)
    a, b = abs(exact), abs(np.float64(near))
    lean = u32(1) if a > b else (u32(0xFFFFFFFF) if a < b else u32(0))
    v = u32(v + (lean if u32(v & u32(0xFFFF)) == u32(0x8000) else u32(0)))
    even = u32(u32(v >> u32(16)) & u32(1))
    short = np.uint16(u32(u32(v + u32(0x7FFF)) + even) >> u32(16))
    return np.uint16(0x7FC0) if exact != exact else short


@njit(**OPTIONS)
def nonfinite_bf16(x: Any) -> Any:
    """Whether any raw bfloat16 is NaN or infinite."""
    found = np.uint16(0)
    for i in range(x.shape[0]):
        found |= np.uint16((x[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return found != 0


@njit(**OPTIONS)
def nonfinite_float(x: Any) -> Any:
    """Whether any float is NaN or infinite."""
    found = 0
    for i in range(x.shape[0]):
        found += np.int32(not (abs(x[i]) <= np.finfo(x.dtype).max))
    return found != 0


@njit(**OPTIONS)
def count_upper(keys: Any, m: int, counts: Any) -> None:
    """Count the upper halves of m keys."""
    for j in range(m):
        counts[np.uint64(keys[j] >> u32(16))] += 1


@njit(**OPTIONS)
def tally(keys: Any, m: int, bracket: Any, counts: Any) -> None:
    """Of m keys: how many upper halves lie above a bracket (counts[0]), and how often each in it occurs.

    To compare all keys with each of a few takes less than a table of counts, since it needs no order.
    """
    first, above = u32(bracket[0]), u32(0)
    width = u32(u32(bracket[1]) - first)
    for j in range(m):
        above = u32(above + u32(u32(keys[j] >> u32(16)) >= u32(first + width)))
    counts[0] += above
    for d in range(width):
        digit, found = u32(first + u32(d)), u32(0)
        for j in range(m):
            found = u32(found + u32(u32(keys[j] >> u32(16)) == digit))
        counts[np.uint64(d) + np.uint64(1)] += found


@njit(**OPTIONS)
def keep_long(keys: Any, m: int, bracket: Any, rest: Any, kept: int) -> int:
    """Put those of m keys in the bracket whose lower half is not zero into `rest`, behind the `kept` there.

    Returns how many are there now; more than fit once they didn't. They are few: most stretches have none.
    """
    first = u32(bracket[0])
    width = u32(u32(bracket[1]) - first)
    for s in range(0, m, 64):
        some, part = u32(0), keys[s : min(s + 64, m)]
        for j in range(part.shape[0]):
            v = part[j]
            inside = u32(u32(u32(v >> u32(16)) - first) < width)
            some = u32(some | u32(inside & u32(u32(v & u32(0xFFFF)) != u32(0))))
        if some:
            for j in range(part.shape[0]):
                v = part[j]
                if u32(u32(v >> u32(16)) - first) < width and u32(v & u32(0xFFFF)) != 0:
                    if kept < rest.shape[0]:
                        rest[kept] = v
                    kept += 1
    return kept


@njit(**OPTIONS)
def count_lower(keys: Any, m: int, prefix: Any, counts: Any) -> None:
    """Count the lower halves of those of m keys whose upper half is `prefix`."""
    for j in range(m):
        if (keys[j] >> u32(16)) == prefix:
            counts[keys[j] & u32(0xFFFF)] += 1


@njit(nogil=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})
def dot(a: Any, b: Any, m: int) -> float:
    """Inner product of m float64; the compiler may add in lanes, always the same ones."""
    total = 0.0
    for j in range(m):
        total += a[j] * b[j]
    return total


@njit(nogil=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})
def total(a: Any, m: int) -> float:
    """Sum of m float64, in lanes as `dot`."""
    found = 0.0
    for j in range(m):
        found += a[j]
    return found


@njit(**OPTIONS)
def _scatter(source: Any, target: Any, counts: Any, shift: Any, mask: Any) -> None:
    """One stable counting-sort pass over a digit; `counts` holds how often each value of it occurs."""
    total = 0
    for d in range(256):
        total, counts[d] = total + counts[d], total
    for j in range(source.shape[0]):
        v = source[j]
        d = np.uint64((v >> shift) & mask)
        target[np.uint64(counts[d])] = v
        counts[d] += 1


@njit(**OPTIONS)
def sort_row(packed: Any, other: Any, counts: Any) -> None:
    """Sort uint64 words (31-bit magnitude above 32-bit position) ascending, stable by position.

    `other` [n] and `counts` [4, 256] are scratch. Differences of 16-bit weights are short numbers: where few
    have lower bits, two passes over the upper 16 bits and an insertion settle the order.
    """
    n = packed.shape[0]
    counts[:] = 0
    for j in range(n):
        v = packed[j] >> np.uint64(32)
        counts[2, np.uint64((v >> np.uint64(15)) & np.uint64(0xFF))] += 1
        counts[3, np.uint64(v >> np.uint64(23))] += 1
    long = 0
    for j in range(n):
        long += np.int64((packed[j] & np.uint64(0x7FFF00000000)) != np.uint64(0))
    if long > n // 8:
        for j in range(n):
            v = packed[j] >> np.uint64(32)
            counts[0, np.uint64(v & np.uint64(0xFF))] += 1
            counts[1, np.uint64((v >> np.uint64(8)) & np.uint64(0x7F))] += 1
        _scatter(packed, other, counts[0], np.uint64(32), np.uint64(0xFF))
        _scatter(other, packed, counts[1], np.uint64(40), np.uint64(0x7F))
    _scatter(packed, other, counts[2], np.uint64(47), np.uint64(0xFF))
    _scatter(other, packed, counts[3], np.uint64(55), np.uint64(0xFF))
    if long and long <= n // 8:
        for j in range(1, n):
            v = packed[j]
            i = j - 1
            while i >= 0 and packed[i] > v:
                packed[i + 1] = packed[i]
                i -= 1
            packed[i + 1] = v


@njit(**OPTIONS)
def rank_short(keys: Any, ranks: Any, starts: Any, where: Any, spare: Any, buckets: Any, counts: Any) -> bool:
    """Ranks of a row's keys in `ranks`, stable by position; False if they span too many octaves for it.

    One counting pass over the upper 16 bits of the keys, and whether they have lower ones: equal values, of
    which differences of 16-bit weights have many, are in order by then. The few that have lower bits are
    sorted by them first. The other arguments are scratch: `buckets`, `where`, `spare` as long as the row.
    """
    n = keys.shape[0]
    least, most = u32(0xFFFF), u32(0)
    for j in range(n):
        upper = u32(keys[j] >> u32(15))
        least = min(least, u32(upper - u32(1)))  # zeros, which have a place of their own, become the greatest
        most = max(most, upper)
    least = min(least, most)
    span = 2 * (np.int64(most) - np.int64(least) + 1)
    if span > starts.shape[0]:
        return False
    for j in range(n):
        upper = u32(keys[j] >> u32(15))
        low = u32(1) if keys[j] & u32(0x7FFF) else u32(0)
        buckets[j] = u32(u32(upper - least if upper else u32(0)) << u32(1)) | low
    starts[:span] = 0
    for j in range(n):
        starts[np.uint64(buckets[j])] += 1
    total = 0
    for d in range(span):
        total, starts[d] = total + starts[d], total
    long = 0
    for j in range(n):
        d = np.uint64(buckets[j])
        at = starts[d]
        ranks[j] = at
        starts[d] = at + 1
        where[np.uint64(long)] = u32(j)
        long += np.int64(d & np.uint64(1))
    if long:
        _rank_long(keys, ranks, buckets, starts, where[:long], spare[:long], counts)
    return True


@njit(**OPTIONS)
def _rank_long(keys: Any, ranks: Any, buckets: Any, starts: Any, where: Any, spare: Any, counts: Any) -> None:
    """Deal out anew, in the order of their lower 15 bits, the ranks of the keys at `where`."""
    counts[:2] = 0
    for i in range(where.shape[0]):
        j = np.uint64(where[i])
        starts[np.uint64(buckets[j])] -= 1
        counts[0, np.uint64(keys[j] & u32(0xFF))] += 1
        counts[1, np.uint64((keys[j] >> u32(8)) & u32(0x7F))] += 1
    for digit in range(2):
        total = 0
        for d in range(256):
            total, counts[digit, d] = total + counts[digit, d], total
    for i in range(where.shape[0]):
        d = np.uint64(keys[np.uint64(where[i])] & u32(0xFF))
        spare[np.uint64(counts[0, d])] = where[i]
        counts[0, d] += 1
    for i in range(where.shape[0]):
        d = np.uint64((keys[np.uint64(spare[i])] >> u32(8)) & u32(0x7F))
        where[np.uint64(counts[1, d])] = spare[i]
        counts[1, d] += 1
    for i in range(where.shape[0]):
        j = np.uint64(where[i])
        d = np.uint64(buckets[j])
        ranks[j] = starts[d]
        starts[d] += 1


@njit(**OPTIONS)
def thin_rows(
    x: Any, n: int, density: float, window: float, rescale: bool, start: Any, k0: Any, k1: Any,
    words: Any, long_words: Any, starts: Any, counts: Any,
) -> None:  # fmt: skip
    """DELLA's `thin` in place on the rows (of n) of a flat float64 x.

    Scratch: `words` [5n + 1] uint32, `long_words` [2n] uint64, `starts` [2 SPAN] and `counts` [4, 256] int32.
    """
    keys, spare, buckets, where = words[:n], words[n : 2 * n], words[2 * n : 3 * n], words[3 * n : 4 * n + 1]
    ranks = words[4 * n + 1 :].view(np.int32)
    packed, other = long_words[:n], long_words[n:]
    most = np.float64(max(n - 1, 1))
    for row in range(x.shape[0] // n):
        values = x[row * n : row * n + n]
        here = u32(start + row * n)
        for j in range(n):
            keys[j] = np.float32(abs(values[j])).view(np.uint32)
        if not rank_short(keys, ranks, starts, where, spare, buckets, counts):
            for j in range(n):
                packed[j] = (np.uint64(keys[j]) << np.uint64(32)) | np.uint64(j)
            sort_row(packed, other, counts)
            for r in range(n):
                ranks[packed[r] & np.uint64(0xFFFFFFFF)] = r
        for j in range(n):  # the draw by itself: short loops vectorise
            spare[j] = bits(u32(here + u32(j)), k0, k1)
        for j in range(n):
            chance = density + window * (np.float64(2 * ranks[j] - (n - 1)) / most)
            kept = np.float64(spare[j]) < np.floor(chance * 4294967296.0)
            value = values[j] / chance if rescale else values[j]
            values[j] = value if kept else 0.0
