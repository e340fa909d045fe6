"""Tensors of several blocks of positions and several batches: what small ones never reach."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import packed
from torch import Tensor

import weft
from weft.deltas.exact import Exact
from weft.deltas.node import Delta
from weft.deltas.packed import Packed
from weft.deltas.pair import BATCH
from weft.deltas.positions import BLOCK
from weft.deltas.sparse import Sparse

SHAPE = (1001, 333)
N = 1001 * 333
assert N > BATCH + BLOCK and N % BLOCK and N % BATCH and N % 8

WAYS: dict[str, dict[str, Any]] = {
    "list": {"scheme": "sparse", "density": 0.02, "dtype": torch.float32},
    "bitmap": {"scheme": "sparse", "density": 0.3, "dtype": torch.float32},
    "sign": {"scheme": "sign"},
    "sign, long groups": {"scheme": "sign", "group": BATCH + 77},
    "sign, odd groups": {"scheme": "sign", "group": 1001},
    "quantised": {"scheme": "quantised", "bits": 3, "group": "tensor"},
    "quantised, long groups": {"scheme": "quantised", "bits": 3, "group": BATCH + 77},
    "quantised, odd groups": {"scheme": "quantised", "bits": 5, "group": 1001},
    "lowrank": {"scheme": "lowrank", "rank": 3, "dtype": torch.float32},
    "exact": {"scheme": "exact"},
}


def grouped(tau: Tensor, size: int, each: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([each(part) for part in torch.split(tau.flatten(), size)]).reshape(SHAPE)


def signs(part: Tensor) -> Tensor:
    return part.abs().mean().float().double() * torch.where(part >= 0, 1.0, -1.0)


def codes(bits: int) -> Callable[[Tensor], Tensor]:
    def each(part: Tensor) -> Tensor:
        low, high = min(float(part.min()), 0.0), max(float(part.max()), 0.0)
        step = torch.tensor((high - low) / (2**bits - 1)).float().double()
        zero = torch.tensor(-low / float(step)).double().round()
        return step * (((part / step).round() + zero).clamp(0, 2**bits - 1) - zero)

    return each


def largest(tau: Tensor, k: int) -> Tensor:
    order = np.argsort(-np.abs(tau.flatten().numpy()).astype(np.float32), kind="stable")
    kept = torch.zeros(N, dtype=torch.float64)
    kept[torch.from_numpy(order[:k])] = tau.flatten()[torch.from_numpy(order[:k])]
    return kept.float().double().reshape(SHAPE)


def best(tau: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


WANT: dict[str, Callable[[Tensor], Tensor]] = {
    "list": lambda tau: largest(tau, round(0.02 * N)),
    "bitmap": lambda tau: largest(tau, round(0.3 * N)),
    "sign": signs,
    "sign, long groups": lambda tau: grouped(tau, BATCH + 77, signs),
    "sign, odd groups": lambda tau: grouped(tau, 1001, signs),
    "quantised": codes(3),
    "quantised, long groups": lambda tau: grouped(tau, BATCH + 77, codes(3)),
    "quantised, odd groups": lambda tau: grouped(tau, 1001, codes(5)),
    "lowrank": lambda tau: best(tau, 3),
    "exact": lambda tau: tau,
}


def base() -> dict[str, Tensor]:
    return {"w": torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)}


def model() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    tau = 0.01 * torch.randn(SHAPE, generator=g, dtype=torch.float64)
    tau += (
        0.05
        * torch.randn(1001, 3, generator=g, dtype=torch.float64)
        @ torch.randn(3, 333, generator=g, dtype=torch.float64)
    )
    tau[:, 0] = tau[0, 0]  # equal magnitudes in every block
    return {"w": base()["w"] + tau}


@pytest.fixture(scope="module")
def deltas(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Delta]:
    folder = tmp_path_factory.mktemp("blocks")
    return {
        name: packed(model(), base(), folder / str(i), **way) for i, (name, way) in enumerate(WAYS.items())
    }


@pytest.mark.parametrize("way", WAYS)
def test_the_formula_over_many_blocks(deltas: dict[str, Delta], way: str) -> None:
    tau = model()["w"] - base()["w"]
    torch.testing.assert_close(
        deltas[way].tensor("w"),
        base()["w"] + WANT[way](tau),
        rtol=0,
        atol=2e-6 if way == "lowrank" else 1e-12,
    )


def test_both_indices_are_used(deltas: dict[str, Delta]) -> None:
    for name in ("list", "bitmap"):
        scheme = deltas[name].document.tensors["w"].scheme
        assert isinstance(scheme, Sparse) and scheme.index == name


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_over_many_blocks(deltas: dict[str, Delta], data: st.DataObject) -> None:
    way = data.draw(st.sampled_from(list(WAYS)))
    edges = st.sampled_from([0, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, BATCH + 76, BATCH + 77, N - 1])
    start = data.draw(edges | st.integers(0, N - 1))
    stop = data.draw(st.integers(start + 1, min(N, start + 3 * BLOCK)))
    delta = deltas[way]
    assert torch.equal(delta.read("w", start, stop), delta.tensor("w").flatten()[start:stop])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_a_part_is_computed_alike(data: st.DataObject) -> None:
    """However a save cuts the parts, and whatever was read before, the stored bytes are the same."""
    pack, whole = data.draw(st.sampled_from(packs()))
    name = data.draw(st.sampled_from(list(pack)))
    grain, n = pack.grain(name), pack.info(name).numel
    first = data.draw(st.integers(0, (n - 1) // grain))
    last = data.draw(st.integers(first + 1, -(-n // grain)))
    start, stop = first * grain, min(last * grain, n)
    assert torch.equal(pack.read(name, start, stop), whole[name].flatten()[start:stop])


@cache
def packs() -> list[tuple[Packed, dict[str, Tensor]]]:
    made = [weft.pack_delta(model(), base(), **WAYS[w]) for w in WAYS]
    return [(pack, {name: pack.tensor(name) for name in pack}) for pack in made]


@pytest.mark.parametrize("density", [0.01, 0.3])
def test_ties_are_kept_from_the_first_over_many_blocks(density: float) -> None:
    """As a list and as a bitmap; ranges of the index that begin within a block find the same ones."""
    n, k = 3 * BLOCK + 100, round(density * (3 * BLOCK + 100))
    tau = torch.full((2, n // 2), 0.5)
    tau[1, -50:] = 1.0  # larger ones at the end go before
    pack = weft.pack_delta({"w": tau}, {"w": torch.zeros_like(tau)}, scheme="sparse", density=density)
    want = torch.zeros(n, dtype=torch.bool)
    want[: k - 50] = want[-50:] = True
    if density == 0.3:
        mask = torch.from_numpy(np.packbits(want.numpy(), bitorder="little"))
        for start in (0, BLOCK // 8 - 3, BLOCK // 16, k // 8 - 7, 3 * BLOCK // 8 - 1):
            assert torch.equal(pack.read("w.mask", start, start + 12), mask[start : start + 12])
    else:
        at = want.nonzero().flatten() % BLOCK
        assert torch.equal(pack.tensor("w.at").to(torch.int64), at)
        assert torch.equal(pack.read("w.at", 700, 900).to(torch.int64), at[700:900])


@pytest.mark.parametrize("share", [0.001, 0.2])
def test_exact_over_many_blocks(tmp_path: Path, share: float) -> None:
    """Few changes are listed; many small ones are codes, with a few outliers listed beside them."""
    old = {"w": base()["w"].bfloat16()}
    g = torch.Generator().manual_seed(3)
    raw = old["w"].view(torch.int16)
    raw = raw + torch.randint(-1, 2, SHAPE, generator=g) * (torch.rand(SHAPE, generator=g) < 5 * share)
    new = {"w": raw.to(torch.int16).view(torch.bfloat16).clone()}
    far = torch.rand(SHAPE, generator=g) < 0.0005
    new["w"][far] = 77.0
    delta = packed(new, old, tmp_path / "d", scheme="exact")
    assert torch.equal(delta.tensor("w").view(torch.int16), new["w"].view(torch.int16))
    entry = delta.document.tensors["w"].scheme
    assert isinstance(entry, Exact)
    assert entry.count >= int(far.sum()) > 0
    assert (entry.bits > 0) == (share == 0.2)


def test_a_small_range_reads_little_of_the_pack(
    deltas: dict[str, Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    for way, most in (
        ("sign", 200),
        ("quantised", 500),
        ("list", 4 * 0.02 * BLOCK),
        ("lowrank", 333 * 3 + 100),
    ):
        delta, asked = deltas[way], [0]
        read = delta.parts.read

        def counted(name: str, start: int, stop: int, read=read, asked=asked, **more):  # type: ignore[no-untyped-def]
            asked[0] += stop - start
            return read(name, start, stop, **more)

        with monkeypatch.context() as patch:
            patch.setattr(delta.parts, "read", counted)
            delta.read("w", BLOCK + 5, BLOCK + 1005)
        assert 0 < asked[0] <= most, way


@pytest.mark.parametrize("scheme", ["quantised", "sign", "sparse", "exact"])
def test_a_merge_whose_ranges_are_longer_than_a_batch_is_packed(tmp_path: Path, scheme: str) -> None:
    g = torch.Generator().manual_seed(4)
    start, *ours = ({"w": torch.randn(2, BATCH + 333, generator=g)} for _ in range(3))
    merged = weft.merge(ours, "della", base=start, density=0.4, seed=1)
    assert merged.grain("w") > BATCH
    lazily = packed(merged, start, tmp_path / "lazy", scheme=scheme)
    plainly = packed(dict(merged.state_dict()), start, tmp_path / "plain", scheme=scheme)
    for part in lazily.parts:
        assert torch.equal(lazily.parts.tensor(part), plainly.parts.tensor(part)), part
