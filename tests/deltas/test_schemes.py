"""What each scheme stores, against the papers' formulas written out in float64."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import base_model, lost, packed, tuned

import weft
from weft.checkpoints.base import TensorInfo
from weft.deltas.bits import byte_range, pack_bits, unpack_bits
from weft.deltas.exact import ordered, unordered, widths

W = "layers.0.weight"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("change", ["all", "few", "none but one"])
def test_exact_gives_every_bit_back(tmp_path: Path, dtype: torch.dtype, change: str) -> None:
    base = base_model(dtype=dtype)
    model = tuned(base)
    if change != "all":
        share = 0.02 if change == "few" else 1e-9
        g = torch.Generator().manual_seed(5)
        model = {
            n: torch.where(torch.rand(t.shape, generator=g) < share, t, base[n]) for n, t in model.items()
        }
        model[W][3, 5] += 1
    model[W][0, :4] = torch.tensor([torch.nan, -torch.inf, -0.0, 0.0]).to(dtype)
    model["steps"] = torch.tensor([4, -(2**40)])
    delta = packed(model, base, tmp_path / "d", scheme="exact")
    for name, values in model.items():
        back = delta.tensor(name)
        assert back.dtype == values.dtype
        assert torch.equal(back.view(torch.uint8), values.view(torch.uint8)), name
    stored = sum(i.nbytes for i in weft.load(tmp_path / "d" / "delta.safetensors").tensors.values())
    whole = sum(t.nbytes for t in model.values())
    assert stored <= whole if change == "all" else stored < 0.25 * whole


def test_exact_codes_of_a_16_bit_model_whose_fine_tune_moved_little_are_short(tmp_path: Path) -> None:
    base = base_model(dtype=torch.bfloat16)
    model = {
        n: (t.float() * (1 + 2**-6)).to(t.dtype) if t.is_floating_point() else t for n, t in base.items()
    }
    weft.save(weft.pack_delta(model, base, scheme="exact"), tmp_path / "d")
    parts = weft.load(tmp_path / "d" / "delta.safetensors")
    assert (
        parts.info(f"{W}.codes").nbytes <= base[W].nbytes // 4
    )  # a step or two of 1/128: codes of 4 bits or less


@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40),
    st.sampled_from(["f4", "f2", "b2"]),
)
@settings(max_examples=60, deadline=None)
def test_order_is_a_bijection_that_rises(values: list[float], kind: str) -> None:
    dtype = {"f4": torch.float32, "f2": torch.float16, "b2": torch.bfloat16}[kind]
    x = torch.tensor(values, dtype=torch.float32).to(dtype)
    n = ordered(x)
    assert torch.equal(unordered(n, dtype).view(torch.uint8), x.view(torch.uint8))
    finite = ~x.isnan()
    a, b = x[finite].double(), n[finite]
    for i in range(len(a)):
        assert ((a[i] < a) <= (b[i] < b)).all()


@given(st.integers(1, 24), st.lists(st.integers(0, 2**24 - 1), min_size=1, max_size=60), st.data())
@settings(max_examples=80, deadline=None)
def test_codes_come_back_from_any_range(bits: int, values: list[int], data: st.DataObject) -> None:
    codes = torch.tensor(values) % 2**bits
    stream = pack_bits(codes, bits)
    start = data.draw(st.integers(0, len(values) - 1))
    stop = data.draw(st.integers(start + 1, len(values)))
    a, b, shift = byte_range(start, stop, bits)
    assert torch.equal(unpack_bits(stream[a:b], bits, shift, stop - start), codes[start:stop])


@given(st.integers(-(2**30), 2**30))
def test_a_width_is_the_least_that_holds(d: int) -> None:
    b = int(widths(torch.tensor([d])))
    if b == 0:
        assert d == 0
    elif b <= 24:
        assert -(2 ** (b - 1)) <= d < 2 ** (b - 1)
        assert b == 1 or not -(2 ** (b - 2)) <= d < 2 ** (b - 2)
    else:
        assert not -(2**23) <= d < 2**23


def test_sparse_keeps_the_largest_entries(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    delta = packed(model, base, tmp_path / "d", scheme="sparse", density=0.1, dtype=torch.float32)
    tau = model[W].double() - base[W].double()
    k = round(0.1 * tau.numel())
    keep = tau.abs().float() >= tau.abs().float().flatten().topk(k).values[-1]
    want = base[W].double() + torch.where(keep, tau.float().double(), 0)
    assert int(keep.sum()) == k
    torch.testing.assert_close(delta.tensor(W).double(), want.float().double(), rtol=0, atol=1e-9)
    assert torch.equal(delta.tensor("norm.weight"), model["norm.weight"])  # vectors are kept exactly


def test_of_equal_entries_the_first_are_kept(tmp_path: Path) -> None:
    base = {"w": torch.zeros(10, 10)}
    delta = packed({"w": torch.full((10, 10), 0.5)}, base, tmp_path / "d", scheme="sparse", density=0.07)
    assert delta.tensor("w").flatten().nonzero().flatten().tolist() == list(range(7))


def test_low_rank_is_the_best_of_its_rank_for_matrices_kernels_and_stacks(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    delta = packed(model, base, tmp_path / "d", scheme="lowrank", rank=4, dtype=torch.float32)
    for name, flat in ((W, (1, 48, 40)), ("layers.1.weight", (1, 24, 27)), ("experts.weight", (3, 16, 20))):
        tau = (model[name].double() - base[name].double()).reshape(flat)
        u, s, v = torch.linalg.svd(tau, full_matrices=False)
        want = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
        got = (delta.tensor(name).double() - base[name].double()).reshape(flat)
        torch.testing.assert_close(got, want, rtol=0, atol=3e-7)


def test_energy_keeps_the_least_rank_with_that_share(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    delta = packed(model, base, tmp_path / "d", scheme="lowrank", energy=0.5, dtype=torch.float32)
    s = torch.linalg.svdvals(model[W].double() - base[W].double()).square()
    rank = int((s.cumsum(0) < 0.5 * s.sum()).sum()) + 1
    assert delta.document.tensors[W].scheme.rank == rank  # type: ignore[union-attr]
    assert lost(delta, model, base, W) <= sqrt(0.5)


@pytest.mark.parametrize("group", ["tensor", "row", 32])
def test_sign_is_bitdelta(tmp_path: Path, group: str | int) -> None:
    base, model = base_model(), tuned(base_model())
    delta = packed(model, base, tmp_path / "d", scheme="sign", group=group)
    tau = (model[W].double() - base[W].double()).flatten()
    size = {"tensor": tau.numel(), "row": 40, 32: 32}[group]
    scale = tau.reshape(-1, size).abs().mean(1, keepdim=True).float().double()
    want = scale * torch.where(tau.reshape(-1, size) >= 0, 1.0, -1.0)
    want = base[W].double() + want.reshape(48, 40)
    torch.testing.assert_close(delta.tensor(W), want, rtol=0, atol=1e-15)
    if group == "tensor":
        s = float(tau.abs().mean())
        told = sqrt(1 - s**2 * tau.numel() / float(tau.square().sum()))
        assert lost(delta, model, base, W) == pytest.approx(told, rel=1e-4)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_quantised_is_tvq_and_errs_by_half_a_step_at_most(tmp_path: Path, bits: int) -> None:
    base, model = base_model(dtype=torch.float64), tuned(base_model(dtype=torch.float64))
    delta = packed(model, base, tmp_path / "d", scheme="quantised", bits=bits, group="tensor")
    tau = model[W] - base[W]
    step = ((tau.max() - tau.min()) / (2**bits - 1)).float().double()
    zero = (-tau.min() / step).round()
    q = ((tau / step).round() + zero).clamp(0, 2**bits - 1)
    torch.testing.assert_close(delta.tensor(W), base[W] + step * (q - zero), rtol=0, atol=1e-15)
    assert float((delta.tensor(W) - model[W]).abs().max()) <= (1 if bits == 1 else 0.5) * float(step) * (
        1 + 1e-5
    )
    assert delta.parts.info(f"{W}.codes") == TensorInfo((-(-tau.numel() * bits // 8),), torch.uint8)


def test_what_did_not_change_stays_as_it_was_in_every_scheme(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    model[W] = torch.where(torch.arange(40) < 20, base[W], model[W])
    for scheme in ("quantised", "sparse", "exact"):
        delta = packed(model, base, tmp_path / scheme, scheme=scheme)
        assert torch.equal(delta.tensor(W)[:, :20], base[W][:, :20]), scheme


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.7])
def test_auto_keeps_to_its_bound_and_is_no_larger_than_what_keeps_to_it(tmp_path: Path, error: float) -> None:
    base, model = base_model(), tuned(base_model())
    g = torch.Generator().manual_seed(2)
    thin = torch.randn(48, 2, generator=g) @ torch.randn(2, 40, generator=g) * 0.01
    model[W] = base[W] + thin
    delta = packed(model, base, tmp_path / "auto", scheme="auto", error=error)
    names = [n for n, t in base.items() if t.is_floating_point()]
    for name in names:
        assert lost(delta, model, base, name) <= error + 1e-6, name
    if error == 0.05:
        assert delta.document.tensors[W].scheme.kind == "lowrank"
    size = (tmp_path / "auto" / "delta.safetensors").stat().st_size
    exact = packed(model, base, tmp_path / "exact", scheme="exact")
    assert size <= (tmp_path / "exact" / "delta.safetensors").stat().st_size + 64
    assert torch.equal(exact.tensor(W), model[W])


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_auto_takes_the_fewest_bits_that_keep_to_the_bound(tmp_path: Path, bits: int) -> None:
    base, model = base_model(), tuned(base_model())
    known = lost(packed(model, base, tmp_path / "q", scheme="quantised", bits=bits), model, base, W)
    for error, most in ((1.001 * known, known), (0.999 * known, 0.999 * known)):
        delta = packed(model, base, tmp_path / f"{error}", error=error)
        assert lost(delta, model, base, W) <= most * (1 + 1e-6)
        scheme = delta.document.tensors[W].scheme
        if error > known and scheme.kind == "quantised":
            assert scheme.bits == bits  # type: ignore[attr-defined]
