"""The chances of a row's entries, by every path: short numbers, full floats, equal values, one crowded octave."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from weft.engine.kernels import rows
from weft.engine.kernels.emit import FEW, SPAN
from weft.methods.della import keep_probability


def row(kind: str, n: int) -> np.ndarray:
    g = np.random.default_rng(n)
    short = np.round(g.normal(size=n) * 64) / 4096
    return np.asarray({
        "short": short,
        "short but few": np.where(g.random(n) < 20 / n, g.normal(size=n).round(4) * 1e-2, short),
        "floats": g.normal(size=n) * 1e-3,
        "equal": np.full(n, 0.25),
        "equal and long": np.full(n, 0.1),
        "zeros": np.zeros(n),
        "crowded": 1.0 + g.random(n) * 1e-4,
        "wide": 10.0 ** g.uniform(-30, 30, n),
        "mixed": np.where(g.random(n) < 0.5, 0.0, g.normal(size=n)),
    }[kind], np.float32)  # fmt: skip


KINDS = ["short", "short but few", "floats", "equal", "equal and long", "zeros", "crowded", "wide", "mixed"]


@pytest.mark.parametrize("n", [1, 2, 255, 3000])
@pytest.mark.parametrize("kind", KINDS)
def test_chances_are_those_of_the_ranks(kind: str, n: int) -> None:
    values = row(kind, n)
    expected = keep_probability(torch.from_numpy(values), 0.5, 0.2).numpy()
    keys, buckets = np.abs(values).view(np.uint32), np.empty(n, np.uint32)
    short_counts, longer = np.zeros(SPAN, np.uint16), np.empty(FEW + 1, np.uint32)
    table, counts = np.empty(SPAN + FEW + 1), np.empty((4, 256), np.int32)
    found = np.full(n, np.nan)
    span, more = rows.count_short(keys, buckets, short_counts, longer)
    if span < 0:
        assert kind in ("floats", "equal and long", "crowded", "wide", "mixed")
    else:
        used = np.empty(SPAN + 4, np.uint64)
        rows.chances_of_short(keys, buckets, short_counts, longer, span, more, 0.5, 0.2, table, used, found)
        assert (found == expected).all()
    assert not short_counts.any()
    found[:] = np.nan
    rows.chances_of_any(keys, np.empty(n, np.uint64), np.empty(n, np.uint64), counts, 0.5, 0.2, found)
    assert (found == expected).all()
    assert expected.mean() == pytest.approx(0.5)
