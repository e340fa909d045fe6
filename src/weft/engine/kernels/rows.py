"""DELLA's drop, row by row: the order of a row's magnitudes, and what it makes of the row.

Differences of 16-bit weights are short numbers: a row of a thousand has some two hundred magnitudes. Entries of
one magnitude have one chance, so a table of the magnitudes that occur is found by counting, and only the few
entries with more digits are sorted. Rows of longer numbers are sorted whole.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from weft.engine.kernels.primitives import OPTIONS, bits, u32


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
def count_short(keys: Any, buckets: Any, counts: Any, longer: Any) -> tuple[Any, int]:
    """Count the magnitudes of a row by their upper 16 bits; (buckets in use, entries with lower bits).

    `buckets` get each entry's place in `counts` (zero before), which does not count the entries with lower bits:
    their positions are put into `longer` in ascending order. (-1, 0) for a row that this is not made for: too
    long, of too many octaves, or with more such entries than `longer` has room for.
    """
    n, few = keys.shape[0], longer.shape[0] - 1
    least, most, more = u32(0xFFFF), u32(0), u32(0)
    for j in range(n):
        upper = u32(keys[j] >> u32(15))
        least = min(least, u32(upper - u32(1)))  # zeros, which have a place of their own, become the greatest
        most = max(most, upper)
        more = u32(more + u32(u32(keys[j] & u32(0x7FFF)) != u32(0)))
    least = min(least, most)
    span = np.int64(most) - np.int64(least) + 1
    if span > counts.shape[0] - 4 or more > few or n > 65535:
        return -1, 0
    for j in range(n):
        upper = u32(keys[j] >> u32(15))
        buckets[j] = u32(upper - least if upper else u32(0))
    for j in range(n):
        counts[np.uint64(buckets[j])] += np.uint16(1)
    return span, gather_longer(keys, buckets, counts, longer) if more else 0


@njit(**OPTIONS)
def gather_longer(keys: Any, buckets: Any, counts: Any, longer: Any) -> int:
    """Take the few entries with lower bits out of the counts, and put their positions into `longer`, ascending."""
    n, found = np.uint64(keys.shape[0]), 0
    whole = n // np.uint64(16) * np.uint64(16)
    s = np.uint64(0)
    while s < n:
        stop = min(s + np.uint64(16), n)
        some = u32(0x7FFF)
        if s < whole:  # sixteen at once
            some = u32(0)
            for j in range(16):
                some = u32(some | keys[s + np.uint64(j)])
        if u32(some & u32(0x7FFF)):
            for here in range(s, stop):
                key = keys[here]
                if not u32(key & u32(0x7FFF)):
                    continue
                counts[np.uint64(buckets[here])] -= np.uint16(1)
                at = found
                while at > 0 and keys[np.uint64(longer[np.uint64(at - 1)])] > key:
                    longer[np.uint64(at)] = longer[np.uint64(at - 1)]
                    at -= 1
                longer[np.uint64(at)] = u32(here)
                found += 1
        s = stop
    return found


@njit(**OPTIONS)
def chance_at(first: int, last: int, n: int, density: float, window: float) -> float:
    """The probability of the entries at ranks first … last of n, which have one magnitude."""
    return density + window * (np.float64(first + last - (n - 1)) / np.float64(max(n - 1, 1)))


@njit(**OPTIONS)
def rank_longer(
    keys: Any, longer: Any, i: int, found: int, rank: int, density: float, window: float, table: Any
) -> int:
    """Put the probability of the i-th longer number, and of those equal to it, at their places; how many they are.

    `rank` is how many entries of the row are smaller.
    """
    last = i
    while last + 1 < found and keys[np.uint64(longer[last + 1])] == keys[np.uint64(longer[i])]:
        last += 1
    chance = chance_at(rank, rank + last - i, keys.shape[0], density, window)
    for at in range(i, last + 1):
        table[at] = chance
    return last + 1 - i


@njit(**OPTIONS)
def list_used(counts: Any, span: int, used: Any) -> Any:
    """Put the places in use and their counts into `used`, ascending, and clear them; how many there are.

    Most are empty, without a pattern that a processor could foresee: so four are looked at together, and of
    those each is put down and counts only if it is in use.
    """
    four, m = counts.view(np.uint64), np.uint64(0)
    for w in range(np.uint64(span + 3) // np.uint64(4)):
        word = four[w]
        if not word:
            continue
        four[w] = 0
        for lane in range(4):
            place = (np.uint64(w) * np.uint64(4) + np.uint64(lane)) << np.uint64(16)
            count = (word >> np.uint64(16 * lane)) & np.uint64(0xFFFF)
            used[m] = place | count
            m += np.uint64(count != np.uint64(0))
    return m


@njit(**OPTIONS)
def chances_of_short(
    keys: Any, buckets: Any, counts: Any, longer: Any, span: int, found: int, density: float, window: float,
    table: Any, used: Any, chances: Any,
) -> None:  # fmt: skip
    """Each entry's probability after `count_short`; clears `counts`. `table`: as long as `counts` and `longer`."""
    n = keys.shape[0]
    short, others = table[: counts.shape[0]], table[counts.shape[0] :]
    # where numbers mix signed and unsigned, the compiler would compare them as floats
    none = np.uint64(0xFFFFFFFF)
    following = np.uint64(buckets[np.uint64(longer[0])]) if found else none
    rank, i = 0, 0
    for u in range(list_used(counts, span, used)):
        d, count = used[u] >> np.uint64(16), np.int64(used[u] & np.uint64(0xFFFF))
        while following < d:
            same = rank_longer(keys, longer, i, found, rank, density, window, others)
            i, rank = i + same, rank + same
            following = np.uint64(buckets[np.uint64(longer[np.uint64(i)])]) if i < found else none
        short[d] = chance_at(rank, rank + count - 1, n, density, window)
        rank += count
    while i < found:
        same = rank_longer(keys, longer, i, found, rank, density, window, others)
        i, rank = i + same, rank + same
    for j in range(n):
        chances[j] = short[np.uint64(buckets[j])]
    for i in range(found):
        chances[np.uint64(longer[i])] = others[i]


@njit(**OPTIONS)
def chances_of_any(
    keys: Any, packed: Any, other: Any, counts: Any, density: float, window: float, chances: Any
) -> None:
    """Each entry's probability, by sorting the row."""
    n = keys.shape[0]
    for j in range(n):
        packed[j] = (np.uint64(keys[j]) << np.uint64(32)) | np.uint64(j)
    sort_row(packed, other, counts)
    first = 0
    while first < n:
        key = packed[first] >> np.uint64(32)
        last = first
        while last + 1 < n and packed[last + 1] >> np.uint64(32) == key:
            last += 1
        chance = chance_at(first, last, n, density, window)
        for at in range(first, last + 1):
            chances[packed[at] & np.uint64(0xFFFFFFFF)] = chance
        first = last + 1


@njit(**OPTIONS)
def thin_row(
    values: Any, density: float, window: float, rescale: bool, here: Any, k0: Any, k1: Any,
    keys: Any, buckets: Any, chances: Any, packed: Any, other: Any,
    short_counts: Any, longer: Any, table: Any, used: Any, counts: Any,
) -> None:  # fmt: skip
    """DELLA's `thin` in place on a row of n float64; `here` is its position in the stream of (k0, k1).

    Scratch: n uint32 (keys, buckets), n float64 (chances), n uint64 (packed, other); some uint16 that are zero
    before and after (short_counts), uint32 (longer), as many float64 as both (table), uint64 (used), and
    [4, 256] int32.
    """
    n = values.shape[0]
    for j in range(n):
        keys[j] = np.float32(abs(values[j])).view(np.uint32)
    span, found = count_short(keys, buckets, short_counts, longer)
    if span < 0:
        chances_of_any(keys, packed, other, counts, density, window, chances)
    else:
        chances_of_short(
            keys, buckets, short_counts, longer, span, found, density, window, table, used, chances
        )
    for j in range(n):  # the draw by itself: short loops vectorise
        keys[j] = bits(u32(here + u32(j)), k0, k1)
    for j in range(n):
        chance = chances[j]
        kept = np.float64(keys[j]) < np.floor(chance * 4294967296.0)
        value = values[j] / chance if rescale else values[j]
        values[j] = value if kept else 0.0
