"""The order of a row's magnitudes, by every path: short numbers, full floats, equal values, one crowded octave."""

from __future__ import annotations

import numpy as np
import pytest

from weft.engine.kernels import primitives
from weft.engine.kernels.generate import SPAN


def rows(kind: str, n: int) -> np.ndarray:
    g = np.random.default_rng(n)
    values = {
        "short": np.round(g.normal(size=n) * 64) / 4096,
        "floats": g.normal(size=n) * 1e-3,
        "equal": np.full(n, 0.25),
        "zeros": np.zeros(n),
        "crowded": 1.0 + g.random(n) * 1e-4,
        "wide": 10.0 ** g.uniform(-30, 30, n),
        "mixed": np.where(g.random(n) < 0.5, 0.0, g.normal(size=n)),
    }[kind]
    return np.abs(values).astype(np.float32).view(np.uint32)


@pytest.mark.parametrize("n", [1, 2, 255, 3000])
@pytest.mark.parametrize("kind", ["short", "floats", "equal", "zeros", "crowded", "wide", "mixed"])
def test_order_is_stable_and_ascending(kind: str, n: int) -> None:
    keys = rows(kind, n)
    expected = np.argsort(keys, kind="stable")
    ranks, where = np.empty(n, np.int32), np.empty(n + 1, np.uint32)
    spare, buckets = np.empty(n, np.uint32), np.empty(n, np.uint32)
    starts, counts = np.empty(2 * SPAN, np.int32), np.empty((4, 256), np.int32)
    if primitives.rank_short(keys, ranks, starts, where, spare, buckets, counts):
        assert (ranks[expected] == np.arange(n)).all()
    else:
        assert kind == "wide"
    packed = (keys.astype(np.uint64) << np.uint64(32)) | np.arange(n, dtype=np.uint64)
    primitives.sort_row(packed, np.empty(n, np.uint64), counts)
    assert (packed & np.uint64(0xFFFFFFFF) == expected).all()
