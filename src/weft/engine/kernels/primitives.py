"""Pieces of compiled code that generated kernels are put together from.

Values are float64 inside a kernel. bf16 is read and written as raw uint16, so a tensor passes through once,
without intermediate arrays. Loops run over blocks of `BLOCK` values that stay in the first-level cache, and
are kept simple enough for the compiler to vectorise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

BLOCK = 1024
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


@njit(**OPTIONS)
def store_bf16(values: Any, m: int, out: Any, at: int) -> None:
    """Round m float64 values once, to nearest even, into raw bfloat16."""
    rounded = np.empty(BLOCK, np.float32)
    raw = rounded.view(np.uint32)
    ties = 0
    for j in range(m):
        rounded[j] = np.float32(values[j])
    for j in range(m):
        ties += np.int32((raw[j] & u32(0xFFFF)) == u32(0x8000))
    if ties:
        # a float32 half-way between two bfloat16 may have been rounded there: lean back to the true side
        for j in range(m):
            if (raw[j] & u32(0xFFFF)) == u32(0x8000):
                near = np.float64(rounded[j])
                if abs(values[j]) > abs(near):
                    raw[j] = raw[j] + u32(1)
                elif abs(values[j]) < abs(near):
                    raw[j] = raw[j] - u32(1)
    for j in range(m):
        v = raw[j]
        carry = u32(u32(v + u32(0x7FFF)) + u32(u32(v >> u32(16)) & u32(1)))
        out[at + j] = np.uint16(carry >> u32(16))
    for j in range(m):
        if values[j] != values[j]:
            out[at + j] = np.uint16(0x7FC0)


@njit(**OPTIONS)
def store_float(values: Any, m: int, out: Any, at: int) -> None:
    """m float64 values into float32 or float64."""
    for j in range(m):
        out[at + j] = values[j]


@njit(cache=True, **OPTIONS)
def nonfinite_bf16(x: Any) -> Any:
    """Whether any raw bfloat16 is NaN or infinite."""
    found = np.uint16(0)
    for i in range(x.shape[0]):
        found |= np.uint16((x[i] & np.uint16(0x7F80)) == np.uint16(0x7F80))
    return found != 0


@njit(cache=True, **OPTIONS)
def nonfinite_float(x: Any) -> Any:
    """Whether any float is NaN or infinite."""
    found = 0
    for i in range(x.shape[0]):
        found += np.int32(not (abs(x[i]) <= np.finfo(x.dtype).max))
    return found != 0


@njit(**OPTIONS)
def count_upper(keys: Any, m: int, counts: Any, rest: Any, kept: int) -> int:
    """Count the upper halves of m keys; put keys whose lower half is not zero into `rest` behind `kept`.

    Returns how many are there now; more than fit once they didn't.
    """
    # two tables in turn: neighbours often fall on one count, and would wait for each other
    pairs = m // 2
    for j in range(pairs):
        counts[0, keys[2 * j] >> u32(16)] += 1
        counts[1, keys[2 * j + 1] >> u32(16)] += 1
    if m % 2:
        counts[0, keys[m - 1] >> u32(16)] += 1
    room = rest.shape[0] - 1
    if kept > room:
        return kept
    for j in range(m):  # without a branch: write always, move on when there was something to keep
        rest[min(kept, room)] = keys[j]
        kept += np.int64((keys[j] & u32(0xFFFF)) != u32(0))
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


@njit(cache=True, **OPTIONS)
def rank_order(keys: Any, order: Any, bucket: Any, starts: Any) -> None:
    """Stable ascending order of n non-negative float32 `keys` into `order`, by buckets and insertion.

    `bucket` [n] and `starts` [n + 1] are scratch. Near-uniform after scaling by the maximum, which is what
    magnitudes of one row nearly are; a crowded bucket costs an insertion sort.
    """
    n = keys.shape[0]
    top = np.float32(0)
    for j in range(n):
        top = max(top, keys[j])
    if not top > 0:
        for j in range(n):
            order[j] = j
        return
    scale = np.float64(n - 1) / np.float64(top)
    for j in range(n + 1):
        starts[j] = 0
    for j in range(n):
        b = np.int32(np.float64(keys[j]) * scale)
        bucket[j] = b
        starts[b + 1] += 1
    for j in range(n):
        starts[j + 1] += starts[j]
    for j in range(n):  # scatter in order of position, so that equal keys stay in it
        at = starts[bucket[j]]
        starts[bucket[j]] = at + 1
        order[at] = j
    for j in range(1, n):
        o = order[j]
        v = keys[o]
        i = j - 1
        while i >= 0 and keys[order[i]] > v:
            order[i + 1] = order[i]
            i -= 1
        order[i + 1] = o


@njit(cache=True, **OPTIONS)
def thin_rows(
    x: Any, n: int, density: float, window: float, rescale: bool, start: int, k0: Any, k1: Any, longest: int
) -> bool:
    """DELLA's `thin` in place on the rows (of n) of a flat float64 x. False if a row is too uneven.

    `longest` bounds the work of a row: when more than that many keys share a bucket, nothing is promised
    and the caller falls back to a sort.
    """
    keys = np.empty(n, np.float32)
    order = np.empty(n, np.int32)
    bucket = np.empty(n, np.int32)
    starts = np.empty(n + 1, np.int32)
    last = max(n - 1, 1)
    for row in range(x.shape[0] // n):
        at = row * n
        for j in range(n):
            keys[j] = np.float32(abs(x[at + j]))
        if not _even_enough(keys, bucket, starts, longest):
            return False
        rank_order(keys, order, bucket, starts)
        for r in range(n):
            j = order[r]
            chance = density + window * (np.float64(2 * r - (n - 1)) / last)
            if np.float64(bits(u32(start + at + j), k0, k1)) < np.floor(chance * 4294967296.0):
                if rescale:
                    x[at + j] = x[at + j] / chance
            else:
                x[at + j] = 0.0
    return True


@njit(cache=True, **OPTIONS)
def _even_enough(keys: Any, bucket: Any, starts: Any, longest: int) -> bool:
    n = keys.shape[0]
    top = np.float32(0)
    for j in range(n):
        top = max(top, keys[j])
    if not top > 0:
        return True
    scale = np.float64(n - 1) / np.float64(top)
    for j in range(n + 1):
        starts[j] = 0
    worst = 0
    for j in range(n):
        b = np.int32(np.float64(keys[j]) * scale)
        starts[b] += 1
        # zeros pile up harmlessly: equal keys need no moves
        if keys[j] != 0:
            worst = max(worst, starts[b])
    return worst <= longest
