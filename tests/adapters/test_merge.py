"""`merge_adapters` as a whole: what is known beforehand, what is reported, what is refused."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from merging_models import random_factors, write
from safetensors.torch import load_file, save_file

import weft
from weft.adapters.factors import as_adapter
from weft.adapters.lowrank import difference
from weft.adapters.merge import merge_adapters
from weft.errors import DataError, DataProblems, UsageError

SHAPES = {"layers.0.q.weight": (20, 16), "layers.1.q.weight": (20, 16)}
Q0, Q1 = SHAPES


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / f"a{i}", random_factors(SHAPES, 4, i)) for i in range(2)]


def test_ranks_and_shapes_are_known_before_anything_is_read(two: list[Path]) -> None:
    made = merge_adapters(two, how="concat")
    shapes = {n: tuple(i.shape) for n, i in made.tensors.items()}
    assert shapes[f"base_model.model.{Q0.removesuffix('.weight')}.lora_A.weight"] == (8, 16)
    assert made.adapter_config["r"] == 8 and not made.report
    assert [merge_adapters(two, how=h).adapter_config["r"] for h in ("svd", "ties", "knots", "lego")] == [
        4, 4, 8, 4,
    ]  # fmt: skip


def test_the_report_says_what_the_rank_costs(two: list[Path]) -> None:
    exact = merge_adapters(two, [1.0, -0.5], how="concat")
    for rank in (1, 3, 8):
        made = merge_adapters(two, [1.0, -0.5], rank=rank)
        weft.save(made, two[0].parent / f"r{rank}")
        for name in SHAPES:
            told = made.report[name]
            assert told["rank"] == rank
            lost = difference(made.factors(name), exact.factors(name))
            assert told["error"] == pytest.approx(lost, rel=1e-9, abs=1e-12)
            assert told["norm"] == pytest.approx(float(exact.factors(name).delta().norm()))
            assert 0 < told["overlap"] < 1


def test_an_energy_finds_a_rank_for_every_weight(tmp_path: Path) -> None:
    strong = random_factors(SHAPES, 6, 0)
    b, a = strong[Q1]
    strong[Q1] = (torch.cat([b[:, :1] * 100, b[:, 1:]], 1), a)  # one direction outweighs the others
    paths = [write(tmp_path / "a", strong), write(tmp_path / "b", random_factors(SHAPES, 2, 1))]
    made = merge_adapters(paths, energy=0.9)
    assert made.factors(Q1).rank == 1 < made.factors(Q0).rank < 8
    weft.save(made, tmp_path / "out")
    back = as_adapter(tmp_path / "out")
    for name in SHAPES:
        assert 1 - made.report[name]["error"] ** 2 >= 0.9
        assert back.rank(name) == made.factors(name).rank
        assert difference(back.factors(name), made.factors(name)) < 1e-6
    capped = merge_adapters(paths, energy=0.999, rank=3)
    assert capped.factors(Q0).rank == 3
    for how in ("ties", "core_space"):
        made = merge_adapters(paths, how=how, density=0.8, energy=0.8)
        assert all(made.factors(n).rank == made.report[n]["rank"] for n in SHAPES)
        assert all(1 - made.report[n]["error"] ** 2 >= 0.8 for n in SHAPES)


def test_weights_for_each_tensor(two: list[Path]) -> None:
    table = {Q0: [1.0, 0.0], Q1: [0.25, 2.0]}
    made = merge_adapters(two, table, how="concat")
    found = [as_adapter(p) for p in two]
    for name, (x, y) in table.items():
        expected = x * found[0].factors(name).delta() + y * found[1].factors(name).delta()
        torch.testing.assert_close(made.factors(name).delta(), expected)
    with pytest.raises(UsageError, match=r"no weights for 1 tensors.*layers\.1\.q"):
        merge_adapters(two, {Q0: [1, 1]}, how="svd")
    with pytest.raises(UsageError, match="one list"):
        merge_adapters(two, table, how="ties")


def test_the_default_is_the_mean(two: list[Path]) -> None:
    made, halves = merge_adapters(two), merge_adapters(two, [0.5, 0.5])
    assert difference(made.factors(Q0), halves.factors(Q0)) < 1e-12


def test_an_adapter_without_a_weight_adds_nothing_there_if_asked(tmp_path: Path) -> None:
    some = {Q0: (20, 16)}
    paths = [
        write(tmp_path / "a", random_factors(SHAPES, 3, 0)),
        write(tmp_path / "b", random_factors(some, 3, 1)),
    ]
    with pytest.raises(DataProblems, match=r"layers\.1\.q\.weight'?: not in .*b"):
        merge_adapters(paths)
    a = as_adapter(paths[0]).factors(Q1)
    for how in ("concat", "svd", "linear", "lego", "task_arithmetic", "knots", "core_space"):
        params = {"method": "task_arithmetic"} if how in ("knots", "core_space") else {}
        made = merge_adapters(paths, [1.0, 1.0], how=how, missing="zero", **params)
        if how == "lego":  # two adapters' units: of one that is there, at twice its weight
            assert made.factors(Q1).rank == 3
        else:
            assert difference(made.factors(Q1), a) < 1e-6, how


def test_saving_is_the_same_for_any_number_of_threads(two: list[Path], tmp_path: Path) -> None:
    for how, params in (("svd", {}), ("knots", {"density": 0.4}), ("dare_ties", {"density": 0.5})):
        states = []
        for threads in (1, 4):
            out = tmp_path / f"{how}{threads}"
            weft.save(merge_adapters(two, how=how, seed=3, **params), out, threads=threads)
            states.append((out / "adapter_model.safetensors").read_bytes())
        assert states[0] == states[1], how
    other = merge_adapters(two, how="dare_ties", seed=4, density=0.5)
    assert difference(other.factors(Q0), as_adapter(tmp_path / "dare_ties1").factors(Q0)) > 0.01


def test_a_merge_of_merges_is_a_merge(two: list[Path]) -> None:
    inner = merge_adapters(two, [1.0, 1.0], how="concat")
    outer = merge_adapters([inner, two[0]], [1.0, -1.0], how="svd", rank=4)
    assert difference(outer.factors(Q0), as_adapter(two[1]).factors(Q0)) < 1e-9


def test_merges_pickle(two: list[Path]) -> None:
    for how in ("svd", "knots", "ties", "dare_ties_factors"):
        made = merge_adapters(two, how=how, seed=1)
        again = pickle.loads(pickle.dumps(made))
        assert difference(again.factors(Q0), made.factors(Q0)) < 1e-12


def test_the_identity_changes_with_whatever_changes_the_values(two: list[Path]) -> None:
    found = {
        merge_adapters(two, w, how=h, rank=r).identity()
        for w, h, r in (
            ([1, 1], "svd", 2), ([1, 2], "svd", 2), ([1, 1], "svd", 3), ([1, 1], "concat", None),
            ([1, 1], "knots", None), ([1, 1], "ties", None),
        )
    }  # fmt: skip
    assert len(found) == 6 and None not in found


def test_stored_dtypes(tmp_path: Path) -> None:
    half = write(tmp_path / "a", random_factors(SHAPES, 2, 0, torch.float16))
    brain = write(tmp_path / "b", random_factors(SHAPES, 2, 1, torch.bfloat16))
    key = "base_model.model.layers.0.q.lora_A.weight"
    assert merge_adapters([half, half]).info(key).dtype == torch.float16
    assert merge_adapters([half, brain]).info(key).dtype == torch.float32
    assert merge_adapters([half, brain], dtype=torch.bfloat16).info(key).dtype == torch.bfloat16


# -- what is not a low-rank update ---------------------------------------------------------------------


def with_extras(folder: Path, seed: int, **tensors: torch.Tensor) -> Path:
    write(folder, random_factors(SHAPES, 2, seed), modules_to_save=["head"])
    state = load_file(folder / "adapter_model.safetensors")
    save_file(state | {f"base_model.model.{k}": v for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def test_whole_tensors_are_refused_averaged_or_dropped(tmp_path: Path) -> None:
    heads = [torch.full((3, 2), 1.0), torch.full((3, 2), 5.0)]
    paths = [with_extras(tmp_path / str(i), i, **{"head.weight": h}) for i, h in enumerate(heads)]
    with pytest.raises(DataProblems, match=r"head\.weight.*") as caught:
        merge_adapters(paths)
    assert "average" in str(caught.value)
    made = merge_adapters(paths, [3.0, 1.0], extras="average")
    weft.save(made, tmp_path / "out")
    torch.testing.assert_close(
        as_adapter(tmp_path / "out").replacement("head.weight"), torch.full((3, 2), 2.0)
    )
    dropped = merge_adapters(paths, extras="drop")
    assert not any("head" in n for n in dropped.tensors) and "head.weight" in dropped.notes[0]
    with pytest.raises(DataProblems, match="add up to 0"):
        merge_adapters(paths, [1.0, -1.0], extras="average")
    paths[1] = with_extras(tmp_path / "other", 3, **{"head.weight": torch.ones(4, 2)})
    with pytest.raises(DataProblems, match="different shapes"):
        merge_adapters(paths, extras="average")


def test_updates_of_biases_add_up(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        folder = write(tmp_path / str(i), random_factors(SHAPES, 2, i), lora_bias=True, lora_alpha=4,
                       alpha_pattern={})  # fmt: skip
        state = load_file(folder / "adapter_model.safetensors")
        for j in range(2):
            state[f"base_model.model.layers.{j}.q.lora_B.bias"] = torch.full((20,), 1.0 + i)
        save_file(state, folder / "adapter_model.safetensors")
        paths.append(folder)
    made = merge_adapters(paths, [1.0, 0.5], how="concat", extras="average")
    weft.save(made, tmp_path / "out")
    # scale alpha/r = 2 times (1 + 0.5·2)
    back = as_adapter(tmp_path / "out").bias("layers.0.q.bias")
    torch.testing.assert_close(back, torch.full((20,), 4.0, dtype=torch.float64))


# -- bad input ----------------------------------------------------------------------------------------


def test_adapters_of_another_base_are_refused_by_name_and_by_shape(tmp_path: Path, two: list[Path]) -> None:
    named = [
        write(tmp_path / n, random_factors(SHAPES, 2, 0), base_model_name_or_path=f"org/{n}") for n in "xy"
    ]
    with pytest.raises(UsageError, match="different bases") as caught:
        merge_adapters(named)
    assert "org/x" in str(caught.value) and "org/y" in str(caught.value)
    assert merge_adapters(named, bases="any").adapter_config["base_model_name_or_path"] == "org/x"
    other = write(tmp_path / "o", random_factors({Q0: (20, 12), Q1: (22, 16)}, 2, 0))
    with pytest.raises(DataProblems, match="different models") as problems:
        merge_adapters([two[0], other])
    assert len(problems.value.problems) == 2


def test_unequal_ranks_are_refused_where_factors_are_added(tmp_path: Path, two: list[Path]) -> None:
    other = write(tmp_path / "o", random_factors(SHAPES, 6, 0))
    for how in ("linear", "ties_factors", "factorwise", "robustmerge"):
        with pytest.raises(DataProblems, match="needs equal ranks") as caught:
            merge_adapters([two[0], other], how=how)
        assert "4 in" in caught.value.problems[0] and "6 in" in caught.value.problems[0]


def test_dora_is_refused_and_told_what_to_do(tmp_path: Path, two: list[Path]) -> None:
    folder = write(tmp_path / "d", random_factors(SHAPES, 2, 0), use_dora=True)
    state = load_file(folder / "adapter_model.safetensors")
    for j in range(2):
        state[f"base_model.model.layers.{j}.q.lora_magnitude_vector"] = torch.ones(20)
    save_file(state, folder / "adapter_model.safetensors")
    with pytest.raises(UsageError, match="DoRA"):
        merge_adapters([two[0], folder], missing="zero")


def test_nan_is_found_and_named(tmp_path: Path, two: list[Path]) -> None:
    bad = random_factors(SHAPES, 4, 0)
    bad[Q1][0][0, 0] = float("nan")
    path = write(tmp_path / "bad", bad)
    for how in ("svd", "ties", "knots"):
        with pytest.raises(DataError, match=r"bad.*layers\.1\.q\.weight.*NaN"):
            weft.save(merge_adapters([two[0], path], how=how), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_requests_that_cannot_be_meant(two: list[Path]) -> None:
    cases = {
        "did you mean 'concat'": {"how": "concatt"},
        "weights of whole models|adapters have updates only": {"how": "slerp"},
        "rank must be": {"rank": 0},
        "energy is a share": {"energy": 2.0},
        "3 weights for 2 adapters": {"weights": [1, 2, 3]},
        "finite numbers": {"weights": [1, float("nan")]},
        "has no parameter 'density'": {"how": "svd", "density": 0.5},
        "did you mean 'density'": {"how": "ties_factors", "densty": 0.5},
        "has no parameter 'densty'": {"how": "ties", "densty": 0.5},
        "extras must be": {"extras": "keep"},
        "no method 'tiess'": {"how": "knots", "method": "tiess"},
    }
    for message, given in cases.items():
        with pytest.raises(UsageError, match=message):
            made = merge_adapters(two, given.pop("weights", None), **given)  # type: ignore[arg-type]
            made.factors(Q0)
    with pytest.raises(UsageError, match="must be a list"):
        merge_adapters(two[0])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="no adapters"):
        merge_adapters([])


def test_vllm_gets_a_rank_it_serves(two: list[Path]) -> None:
    made = merge_adapters(two, rank=3, serve="vllm")
    assert made.adapter_config["r"] == 8 and "--max-lora-rank 8" in made.notes[0]
    assert difference(as_adapter(made).factors(Q0), merge_adapters(two, rank=3).factors(Q0)) < 1e-9


# -- image trainers' files ------------------------------------------------------------------------------


def test_names_that_peft_would_not_find_are_not_written_for_it(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        b, a = random_factors({"w": (20, 16)}, 2, i)["w"]
        module = "lora_unet_down_blocks_0_to_q"
        save_file(
            {
                f"{module}.lora_down.weight": a,
                f"{module}.lora_up.weight": b,
                f"{module}.alpha": torch.tensor(1.0),
            },
            tmp_path / f"{i}.safetensors",
        )
        paths.append(tmp_path / f"{i}.safetensors")
    with pytest.raises(UsageError, match=r"underscores.*layout"):
        merge_adapters(paths)
    name = "down_blocks_0_to_q.weight"
    made = merge_adapters(paths, [1.0, 1.0], how="concat", layout="kohya")
    found = made.factors(next(iter(n for n in as_adapter(paths[0]).names if n.endswith(name))))
    pairs = [random_factors({"w": (20, 16)}, 2, i)["w"] for i in range(2)]
    expected = sum(0.5 * (b.double() @ a.double()) for b, a in pairs)  # alpha/r = 1/2
    torch.testing.assert_close(found.delta(), expected)


DATA = Path(os.environ.get("WEFT_DATA", "../shared/data")) / "checkpoints" / "sd2_lora"


@pytest.mark.skipif(not DATA.is_dir(), reason="the real adapters are not here")
def test_real_adapters_of_an_image_model_merge_into_one_file(tmp_path: Path) -> None:
    paths = sorted(DATA.glob("*.safetensors"))
    made = merge_adapters(paths, [1.0, 0.5, -0.25], rank=8, layout="kohya")
    weft.save(made, tmp_path / "out.safetensors")
    inputs, back = [as_adapter(p) for p in paths], as_adapter(tmp_path / "out.safetensors")
    assert set(back.names) == set(inputs[0].names)
    name = back.names[0]
    whole = sum(w * a.factors(name).delta() for w, a in zip([1.0, 0.5, -0.25], inputs, strict=True))
    assert isinstance(whole, torch.Tensor)
    lost = float((whole - back.factors(name).delta()).norm() / whole.norm())
    assert made.report[name]["error"] == pytest.approx(lost, abs=2e-3)  # stored in half precision
    exact = merge_adapters(paths, [1.0, 0.5, -0.25], how="concat", layout="kohya")
    torch.testing.assert_close(exact.factors(name).delta(), whole)
