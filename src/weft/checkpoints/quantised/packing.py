"""Several codes in one number, and back: streams of bits in 32-bit words, two 4-bit codes in a byte."""

from __future__ import annotations

from weft.late import Tensor, torch

_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e2m1(codes: Tensor) -> Tensor:
    """What codes of a 4-bit float (sign, 2 bits of exponent, 1 of mantissa) stand for, in float64."""
    return torch.tensor([*_SIZES, *(-v for v in _SIZES)], dtype=torch.float64)[codes]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """int32 `[..., n]` → the codes `[..., 32·n // bits]` of its last axis, as int32.

    The words are one little-endian stream of bits: code k begins at bit k·bits, also where it lies in two
    words (3, 5, 6 and 7 bits).
    """
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return (words[..., None] >> shifts & ((1 << bits) - 1)).flatten(-2)
    count = 32 * words.shape[-1] // bits
    begin = torch.arange(count) * bits
    low = words.to(torch.int64) & 0xFFFFFFFF
    pairs = low | torch.nn.functional.pad(low[..., 1:], (0, 1)) << 32
    # the sign bit of the pair may be shifted in from above, and is masked off with the rest
    return (pairs[..., begin // 32] >> begin % 32 & ((1 << bits) - 1)).to(torch.int32)


def word_count(codes: int, bits: int) -> int:
    """32-bit words that hold so many codes."""
    return -(-codes * bits // 32)


def unpack_nibbles(data: Tensor, *, low_first: bool) -> Tensor:
    """uint8 `[..., n]` → 4-bit codes `[..., 2n]` as int64, ready to index a table."""
    low, high = data & 0xF, data >> 4
    pair = (low, high) if low_first else (high, low)
    return torch.stack(pair, dim=-1).flatten(-2).long()
