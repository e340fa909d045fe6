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
def store_bf16(values: Any, m: int, out: Any) -> None:
    """Round m float64 values once, to nearest even, into raw bfloat16."""
    rounded = np.empty(BLOCK, np.float32)
    raw = rounded.view(np.uint32)
    for j in range(m):
        rounded[j] = np.float32(values[j])
    ties = u32(0)
    special = u32(0)
    for j in range(m):
        v = raw[j]
        ties += u32(u32(v & u32(0xFFFF)) == u32(0x8000))
        special += u32(u32(v & u32(0x7F800000)) == u32(0x7F800000))
        carry = u32(u32(v + u32(0x7FFF)) + u32(u32(v >> u32(16)) & u32(1)))
        out[j] = np.uint16(carry >> u32(16))
    if ties:
        # a float32 half-way between two bfloat16 may have been rounded there: lean back to the true side
        for j in range(m):
            v = raw[j]
            if u32(v & u32(0xFFFF)) == u32(0x8000):
                near, exact = abs(np.float64(rounded[j])), abs(values[j])
                up = exact > near or (exact == near and u32(v >> u32(16)) & u32(1))
                out[j] = np.uint16(v >> u32(16)) + np.uint16(1 if up else 0)
    if special:
        for j in range(m):
            if values[j] != values[j]:
                out[j] = np.uint16(0x7FC0)


@njit(**OPTIONS)
def store_float(values: Any, m: int, out: Any) -> None:
    """m float64 values into float32 or float64."""
    for j in range(m):
        out[j] = values[j]


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


@njit(**OPTIONS)
def radix_pass(keys: Any, source: Any, target: Any, counts: Any, shift: Any) -> None:
    """One stable counting pass over 8 bits of the keys, from order `source` to order `target`."""
    n = keys.shape[0]
    counts[:] = 0
    for j in range(n):
        counts[(keys[j] >> shift) & u32(0xFF)] += 1
    total = 0
    for d in range(256):
        total, counts[d] = total + counts[d], total
    for j in range(n):
        o = source[j]
        d = (keys[o] >> shift) & u32(0xFF)
        target[counts[d]] = o
        counts[d] += 1


@njit(**OPTIONS)
def rank_order(keys: Any, order: Any, other: Any, counts: Any) -> None:
    """Stable ascending order of n 31-bit keys into `order`; `other` [n] and `counts` [256] are scratch."""
    n = keys.shape[0]
    long = 0
    for j in range(n):
        order[j] = j
        long += np.int64((keys[j] & u32(0x7FFF)) != u32(0))
    if long > n // 8:
        radix_pass(keys, order, other, counts, u32(0))
        radix_pass(keys, other, order, counts, u32(8))
        radix_pass(keys, order, other, counts, u32(16))
        radix_pass(keys, other, order, counts, u32(24))
        return
    # short numbers: their upper 16 bits nearly decide, and insertion settles the rest
    radix_pass(keys, order, other, counts, u32(15))
    radix_pass(keys, other, order, counts, u32(23))
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
    x: Any, n: int, density: float, window: float, rescale: bool, start: int, k0: Any, k1: Any
) -> None:
    """DELLA's `thin` in place on the rows (of n) of a flat float64 x."""
    keys = np.empty(n, np.uint32)
    order = np.empty(n, np.int32)
    other = np.empty(n, np.int32)
    counts = np.empty(256, np.int32)
    last = max(n - 1, 1)
    for row in range(x.shape[0] // n):
        at = row * n
        for j in range(n):
            keys[j] = np.float32(abs(x[at + j])).view(np.uint32)
        rank_order(keys, order, other, counts)
        for r in range(n):
            other[order[r]] = r
        for j in range(n):
            chance = density + window * (np.float64(2 * other[j] - (n - 1)) / last)
            kept = np.float64(bits(u32(start + at + j), k0, k1)) < np.floor(chance * 4294967296.0)
            value = x[at + j] / chance if rescale else x[at + j]
            x[at + j] = value if kept else 0.0
