"""Codes of 1 to 24 bits in a stream of bytes: code k lies in bits [k·b, (k+1)·b), lowest bit first."""

from __future__ import annotations

from math import gcd

import numpy as np
import torch
from torch import Tensor

MOST = 24
"""The widest code."""


def code_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes take."""
    return -(-count * bits // 8)


def period(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the shortest run of codes that ends on a byte: 8 three-bit codes are 3 bytes."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes `[n]` (integers in [0, 2^bits)) → uint8 `[ceil(n·bits / 8)]`; what is left of the last byte is 0."""
    values = codes.to(torch.int64).numpy()
    planes = np.empty((len(values), bits), dtype=np.uint8)
    for j in range(bits):
        planes[:, j] = values >> j & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_bits(data: Tensor, bits: int, first: int, count: int) -> Tensor:
    """Codes `[count]`, int64, of which the first begins at bit `first` (0 … 7) of `data`, uint8."""
    stream = np.unpackbits(data.numpy(), bitorder="little", count=first + count * bits)[first:]
    planes = stream.reshape(count, bits)
    if bits == 1:
        return torch.from_numpy(planes[:, 0].astype(np.int64))
    values = np.zeros(count, dtype=np.int64)
    for j in range(bits):
        values |= planes[:, j].astype(np.int64) << j
    return torch.from_numpy(values)


def byte_range(start: int, stop: int, bits: int) -> tuple[int, int, int]:
    """(first byte, last byte + 1, bit of the first byte) at which codes [start, stop) lie."""
    return start * bits // 8, code_bytes(stop, bits), start * bits % 8
