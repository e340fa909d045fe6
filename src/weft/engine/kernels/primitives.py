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


@njit(inline="always", **OPTIONS)
def short_f16(x: Any) -> Any:
    """Raw float16 → float32: its bits in a float32's places, times 2^112 for the exponents' difference."""
    size = u32(u32(x) & u32(0x7FFF))
    sign = u32(u32(u32(x) & u32(0x8000)) << u32(16))
    moved = u32(size << u32(13))
    value = np.float32(moved.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    value = u32(u32(moved | u32(0x7F800000)) if size >= u32(0x7C00) else value)
    return u32(value | sign).view(np.float32)


@njit(inline="always", **OPTIONS)
def from_f16(x: Any) -> Any:
    """Raw float16 → float64."""
    return np.float64(short_f16(x))


@njit(inline="always", **OPTIONS)
def to_f16(exact: Any) -> Any:
    """A float64 rounded once, to nearest even, to raw float16."""
    size = abs(exact)
    word = np.float64(size).view(np.uint64)
    # of normal numbers 42 of the 52 bits behind the point go, and the exponent loses 1008
    even = np.uint64((word >> np.uint64(42)) & np.uint64(1))
    kept = np.uint64((word + np.uint64((1 << 41) - 1) + even) >> np.uint64(42))
    normal = np.uint64(kept - np.uint64(1008 << 10))
    # smaller ones are multiples of 2^-24, to which the sum with a number of 2^28 is rounded
    small = np.uint64(np.float64(size + np.float64(2.0**28)).view(np.uint64) & np.uint64(0x7FF))
    short = small if size < np.float64(2.0**-14) else normal
    short = np.uint64(0x7C00) if size >= np.float64(65520.0) else short
    short = np.uint64(0x7E00) if exact != exact else short
    sign = np.uint64((np.float64(exact).view(np.uint64) >> np.uint64(48)) & np.uint64(0x8000))
    return np.uint16(short | sign)


@njit(**OPTIONS)
def nonfinite_bits(x: Any, exponent: Any) -> Any:
    """Whether any raw 16-bit float is NaN or infinite: has all bits of the exponent."""
    found = np.uint16(0)
    for i in range(x.shape[0]):
        found |= np.uint16((x[i] & exponent) == exponent)
    return found != 0


@njit(**OPTIONS)
def nonfinite_float(x: Any) -> Any:
    """Whether any float is NaN or infinite."""
    found = 0
    for i in range(x.shape[0]):
        found += np.int32(not (abs(x[i]) <= np.finfo(x.dtype).max))
    return found != 0


@njit(**OPTIONS)
def unbounded(keys: Any, m: int) -> Any:
    """How many of m magnitudes are infinite or NaN."""
    found = u32(0)
    for j in range(m):
        found = u32(found + u32(keys[j] >= u32(0x7F800000)))
    return found


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
