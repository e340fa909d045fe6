"""A pack is a model like any other: read by ranges, merged, nested, moved, and refused over another base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from packs import Model, base_model, lost, packed, tuned

import weft
from weft.checkpoints.dtypes import round_to
from weft.deltas.node import Delta
from weft.deltas.ways import USES
from weft.errors import DataError, UsageError

W = "layers.0.weight"
SCHEMES = list(USES)


def folders(tmp_path: Path) -> tuple[Model, Model]:
    base, model = base_model(), tuned(base_model())
    weft.save(weft.load(base), tmp_path / "base")
    weft.save(weft.load(model), tmp_path / "model")
    return base, model


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_pack_names_its_base_and_opens_by_itself(tmp_path: Path, scheme: str) -> None:
    folders(tmp_path)
    made = weft.pack_delta(tmp_path / "model", tmp_path / "base", base_ref="../base", scheme=scheme)
    weft.save(made, tmp_path / "pack")
    read = weft.load(tmp_path / "pack")
    assert isinstance(read, Delta) and list(read) == list(weft.load(tmp_path / "model"))
    weft.save(read, tmp_path / "whole")
    again = weft.load(tmp_path / "whole")
    for name in again:
        assert torch.equal(again.tensor(name), round_to(read.tensor(name), read.info(name).dtype)), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_any_range_is_the_range_of_the_whole(tmp_path: Path, scheme: str) -> None:
    base, model = base_model(), tuned(base_model())
    delta = packed(model, base, tmp_path / "d", scheme=scheme)
    for name in delta:
        whole, grain, n = delta.tensor(name).flatten(), delta.grain(name), delta.info(name).numel
        for a, b in ((0, n), (n // 3 // grain * grain, n), (0, max(grain, n // 2 // grain * grain))):
            assert torch.equal(delta.read(name, a, b), whole[a:b]), (name, a, b)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_same_bytes_for_any_threads_and_memory(tmp_path: Path, scheme: str) -> None:
    base, model = base_model(), tuned(base_model())
    for i, settings in enumerate(({"threads": 1}, {"threads": 4}, {"memory": "40MiB"})):
        weft.save(weft.pack_delta(model, base, scheme=scheme), tmp_path / str(i), **settings)
    first = (tmp_path / "0" / "delta.safetensors").read_bytes()
    assert all((tmp_path / str(i) / "delta.safetensors").read_bytes() == first for i in (1, 2))


def test_a_pack_is_merged_and_a_merge_is_packed(tmp_path: Path) -> None:
    base, one, two = base_model(), tuned(base_model(), 1), tuned(base_model(), 2)
    packs = [packed(m, base, tmp_path / str(i), scheme="exact") for i, m in enumerate((one, two))]
    merged = weft.merge(packs, "ties", base=base, density=0.5)
    plain = weft.merge([one, two], "ties", base=base, density=0.5)
    for name in plain:
        assert torch.equal(merged.tensor(name), plain.tensor(name))
    delta = packed(plain, base, tmp_path / "merge", scheme="exact")
    for name in plain:
        assert torch.equal(delta.tensor(name), round_to(plain.tensor(name), plain.info(name).dtype))


def test_tensors_may_be_new_or_gone_or_of_another_shape_or_dtype(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    del model["experts.weight"]
    model["extra"] = torch.arange(5.0)
    model["layers.1.weight"] = torch.randn(2, 2)
    model[W] = model[W].bfloat16()
    model["steps"] = torch.tensor([1.5, 2.5])
    delta = packed(model, base, tmp_path / "d", scheme="exact")
    assert set(delta) == set(model)
    for name, values in model.items():
        assert delta.info(name).dtype == values.dtype
        assert torch.equal(delta.tensor(name).to(values.dtype), values), name


def test_what_is_equal_takes_no_room_and_a_model_without_a_difference_is_refused(tmp_path: Path) -> None:
    base = base_model()
    model = base | {W: tuned(base)[W]}
    delta = packed(model, base, tmp_path / "d", scheme="exact")
    assert list(delta.document.tensors) == [W]
    with pytest.raises(UsageError, match="nothing to pack"):
        weft.pack_delta(base, base)


def test_another_base_is_told_by_its_shapes_or_by_its_values(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    packed(model, base, tmp_path / "d")
    with pytest.raises(DataError, match=r"made for another base.*names, shapes or dtypes"):
        weft.load(tmp_path / "d", base={n: t for n, t in base.items() if n != W})
    with pytest.raises(DataError, match=r"made for another base.*other values"):
        weft.load(tmp_path / "d", base=base_model(seed=9))
    with pytest.raises(UsageError, match="does not say what it is a difference from; pass base="):
        weft.load(tmp_path / "d")


def test_settings_that_cannot_be_meant_are_named(tmp_path: Path) -> None:
    base, model = base_model(), tuned(base_model())
    for settings, words in (
        ({"scheme": "sparce"}, "did you mean 'sparse'"),
        ({"scheme": "sparse", "bits": 4}, "sparse has no bits: bits is for quantised"),
        ({"scheme": "quantised", "bits": 9}, "bits must be 1 to 8, not 9"),
        ({"scheme": "sparse", "density": 0.0}, r"density is a share .* in \(0, 1\]"),
        ({"scheme": "lowrank", "rank": 0}, "rank must be at least 1"),
        ({"error": 1.5}, r"error is a share of the difference in \[0, 1\)"),
        ({"scheme": "sign", "include": "nothing"}, "include 'nothing' matches no tensor"),
        ({"scheme": "sign", "exclude": "("}, "is no regular expression"),
        ({"scheme": "sign", "group": "column"}, "group must be tensor, row or a number"),
    ):
        with pytest.raises(UsageError, match=words):
            weft.pack_delta(model, base, **settings)  # type: ignore[arg-type]
    model[W][0, 0] = torch.nan
    with pytest.raises(DataError, match=f"{W}.*NaN or infinite values, which only an exact delta can keep"):
        weft.save(weft.pack_delta(model, base, scheme="sign"), tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert weft.pack_delta(model, base, scheme="sign", exclude=W)


def test_a_delta_of_a_delta_opens_and_one_of_itself_is_refused(tmp_path: Path) -> None:
    folders(tmp_path)
    first = weft.pack_delta(tmp_path / "model", tmp_path / "base", base_ref="../base", scheme="sign")
    weft.save(first, tmp_path / "one")
    second = weft.pack_delta(tmp_path / "model", tmp_path / "one", base_ref="../one", scheme="exact")
    weft.save(second, tmp_path / "two")
    model = weft.load(tmp_path / "model")
    assert torch.equal(weft.load(tmp_path / "two").tensor(W).float(), model.tensor(W))
    text = (tmp_path / "one" / "weft_delta.json").read_text()
    (tmp_path / "one" / "weft_delta.json").write_text(text.replace('"../base"', '"../two"'))
    with pytest.raises(DataError, match="is a delta of a delta of … itself; pass base="):
        weft.load(tmp_path / "one")


def test_rtvq_corrects_what_the_shared_part_lost_and_beats_tvq_of_the_same_size(tmp_path: Path) -> None:
    base = base_model(dtype=torch.float64)
    common = tuned(base, 50, 0.02)
    models = {f"m{i}": tuned(common, i, 0.004) for i in range(4)}
    weft.save(weft.load(base), tmp_path / "base")
    saved = weft.pack_family(models, tmp_path / "base", tmp_path / "f", bits=2, shared_bits=4, group="tensor")
    assert set(saved) == {"shared", *models}
    tau = {n: m[W] - base[W] for n, m in models.items()}
    shared = quantise(torch.stack(list(tau.values())).mean(0), 4)
    for name in models:
        delta = weft.load(tmp_path / "f" / name)
        want = base[W] + shared + quantise(tau[name] - shared, 2)
        torch.testing.assert_close(delta.tensor(W), want, rtol=0, atol=1e-9)
        alone = packed(
            models[name], base, tmp_path / f"tvq-{name}", scheme="quantised", bits=3, group="tensor"
        )
        # 2 bits each and 4 shared by four models: 3 bits a model
        assert lost(delta, models[name], base, W) < 0.7 * lost(alone, models[name], base, W)


def quantise(tau: torch.Tensor, bits: int) -> torch.Tensor:
    """TVQ's Q_b(τ) with one group."""
    step = ((tau.max() - tau.min()) / (2**bits - 1)).float().double()
    zero = (-tau.min() / step).round()
    found: torch.Tensor = step * (((tau / step).round() + zero).clamp(0, 2**bits - 1) - zero)
    return found


def test_twenty_fine_tunes_take_little_more_than_one_model(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    base = {"w": (torch.randn(256, 256, generator=g) * 0.1).bfloat16()}
    weft.save(weft.load(base), tmp_path / "base")
    size = (tmp_path / "base" / "model.safetensors").stat().st_size
    models = {f"m{i}": tuned(base, i, 0.003) for i in range(20)}
    total = size
    for name, model in models.items():
        weft.save(weft.pack_delta(model, tmp_path / "base", scheme="sign"), tmp_path / name)
        total += sum(f.stat().st_size for f in (tmp_path / name).glob("delta.safetensors"))
    assert total < 2.4 * size  # one bit instead of sixteen, twenty times: 1 + 20 / 16
