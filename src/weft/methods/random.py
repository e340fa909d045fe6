"""Random bits from a counter: the same whatever the cut, thread, device or order.

The draw for position p (flat, in the whole tensor) of one tensor of one model is a hash of its coordinates:

    hi, lo = p >> 32, p & 0xFFFFFFFF
    k0, k1 = two little-endian 32-bit words of blake2b-64("weft/1:{seed}:{model}:{hi}:{name}")
    bits   = mix(mix(lo ^ k0) ^ k1)

    mix(x):  x ^= x >> 16;  x *= 0x7FEB352D;  x ^= x >> 15;  x *= 0x846CA68B;  x ^= x >> 16     (mod 2³²)

`mix` is a bijection of 32-bit words found by search for least bias (C. Wellons, hash-prospector, "lowbias32",
public domain); two rounds with a key word before each make streams of different keys independent for our
purpose. Within one key no value occurs twice: for n positions the variance of a count is smaller than
binomial by a factor of 1 − n/2³².

An entry is kept with probability p when bits < ⌊p·2³²⌋, so p = 1 keeps all and p = 0 none. Whoever
re-implements this in another language must reproduce every bit; `tests/methods/test_random.py` has vectors.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from weft.late import Tensor, torch
from weft.methods.step import At

WORD = 0xFFFFFFFF


@lru_cache(maxsize=4096)
def stream_key(seed: int, model: int, name: str, high: int = 0) -> tuple[int, int]:
    """(k0, k1): the two key words of one stream. `high` is the upper word of the position."""
    digest = hashlib.blake2b(f"weft/1:{seed}:{model}:{high}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def mix(x: Tensor) -> Tensor:
    """One round on 32-bit words held in int64; a product's overflow does not reach its low 32 bits."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & WORD
    x = (x ^ (x >> 15)) * 0x846CA68B & WORD
    return x ^ (x >> 16)


def uniform_bits(at: At, model: int, n: int, device: torch.device | str | None = None) -> Tensor:
    """`[n]` int64 in [0, 2³²): the bits of positions at.start … at.start + n − 1 of tensor at.name."""
    parts: list[Tensor] = []
    start = at.start
    while start < at.start + n or not parts:
        high, low = start >> 32, start & WORD
        stop = min(at.start + n, (high + 1) << 32)
        k0, k1 = stream_key(at.seed, model, at.name, high)
        x = torch.arange(low, low + stop - start, dtype=torch.int64, device=device)
        parts.append(mix(mix(x ^ k0) ^ k1))
        start = stop
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def threshold(probability: float) -> int:
    """⌊p·2³²⌋: an entry is kept when its bits are below."""
    return int(probability * (1 << 32))
