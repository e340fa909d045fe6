"""`compare` against the formulas written down in numpy, and what must not change a digit of it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from weft.analysis.diff import Comparison, compare
from weft.analysis.groups import group_of, in_order, kind_of, patterns
from weft.analysis.parallel import in_parallel
from weft.analysis.sums import Difference
from weft.analysis.values import survey_values
from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.checkpoints.execution import TILE, executing, execution
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model

MODULES = ("attn.q_proj", "mlp.up_proj")
NAMES = ["embed.weight", *(f"layers.{i}.{m}.weight" for i in range(3) for m in MODULES), "norm.weight"]


def model(seed: int, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (13, 7)) -> Checkpoint:
    generator = torch.Generator().manual_seed(seed)
    return StateDict({n: torch.randn(shape, generator=generator).to(dtype) for n in NAMES}, f"m{seed}")


def wide(source: Checkpoint, name: str) -> Any:
    return source.tensor(name).double().numpy().reshape(-1)


def agrees(found: Difference, a: Any, b: Any, base: Any = 0.0) -> None:
    ta, tb = a - base, b - base
    assert found.numel == a.size
    assert found.norm_a == pytest.approx(np.linalg.norm(ta), rel=1e-14)
    assert found.norm_b == pytest.approx(np.linalg.norm(tb), rel=1e-14)
    assert found.norm_difference == pytest.approx(np.linalg.norm(b - a), rel=1e-14)
    assert found.relative == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(ta), rel=1e-13)
    assert found.cosine == pytest.approx(ta @ tb / np.linalg.norm(ta) / np.linalg.norm(tb), abs=1e-13)
    assert found.sign_conflict == np.mean((ta * tb) < 0)
    assert found.changed == np.mean(a != b)
    assert found.max_abs == np.abs(b - a).max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_base", [False, True])
def test_formulas(dtype: torch.dtype, with_base: bool) -> None:
    a, b, base = model(1, dtype), model(2, dtype), model(3, dtype)
    found = compare(a, b, base if with_base else None)
    for name in NAMES:
        zero = wide(base, name) if with_base else 0.0
        agrees(found.tensors[name], wide(a, name), wide(b, name), zero)


def test_groups_are_the_formulas_over_all_their_elements() -> None:
    a, b, base = model(1), model(2), model(3)
    found = compare(a, b, base)

    def joined(source: Checkpoint, names: list[str]) -> Any:
        return np.concatenate([wide(source, n) for n in names])

    groups = [(found.total, NAMES)]
    groups += [(d, [n for n in NAMES if group_of(n) == g]) for g, d in found.layers.items()]
    groups += [(d, [n for n in NAMES if kind_of(n) == k]) for k, d in found.kinds.items()]
    groups += [(found.stacks["layers"], [n for n in NAMES if n.startswith("layers")])]
    for difference, names in groups:
        agrees(difference, joined(a, names), joined(b, names), joined(base, names))
    assert list(found.layers) == ["embed", "layers.0", "layers.1", "layers.2", "norm"]


@pytest.mark.parametrize("numel", [1, TILE - 1, TILE, 3 * TILE + 5, 20 * TILE + 1])
def test_digits_do_not_depend_on_cut_or_threads(numel: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (StateDict({"x": torch.randn(numel, generator=generator)}) for _ in range(2))
    whole = compare(a, b).to_json()
    agrees(compare(a, b).tensors["x"], wide(a, "x"), wide(b, "x"))
    for chunk in (TILE, 4 * TILE):
        with executing(replace(execution(), chunk=chunk)):
            assert compare(a, b).to_json() == whole
            with in_parallel(4):
                assert compare(a, b).to_json() == whole


def test_memory_is_that_of_a_range() -> None:
    class Watched(StateDict):
        longest = 0

        def read(self, name: str, start: int = 0, stop: int | None = None, **how: Any) -> torch.Tensor:
            Watched.longest = max(Watched.longest, (self.info(name).numel if stop is None else stop) - start)
            return super().read(name, start, stop, **how)

    a, b = Watched({"x": torch.zeros(40 * TILE)}), Watched({"x": torch.ones(40 * TILE)})
    with executing(replace(execution(), chunk=2 * TILE)):
        assert compare(a, b, a).tensors["x"].changed == 1
        survey_values(b)
    assert Watched.longest == 2 * TILE


def test_identical() -> None:
    found = compare(model(1), model(1))
    assert found.identical and found.same_values
    total = found.total
    assert (total.relative, total.cosine, total.changed, total.sign_conflict, total.max_abs) == (
        0,
        1,
        0,
        0,
        0,
    )


def test_other_dtype_is_the_same_values_but_not_identical() -> None:
    a = model(1, torch.bfloat16)
    b = StateDict({n: a.tensor(n).float() for n in a})
    found = compare(a, b)
    assert found.same_values and not found.identical
    assert found.dtypes["norm.weight"] == ("bfloat16", "float32")


def test_zero_has_no_direction() -> None:
    zero, one = StateDict({"x": torch.zeros(3)}), StateDict({"x": torch.ones(3)})
    found = compare(zero, one).tensors["x"]
    assert found.relative is None and found.cosine is None and found.norm_difference == pytest.approx(3**0.5)
    back = compare(one, zero).tensors["x"]
    assert back.relative == 1 and back.cosine is None
    assert compare(zero, zero).tensors["x"].relative == 0


def test_what_cannot_be_compared_is_listed() -> None:
    a = StateDict({"x": torch.ones(2, 3), "y": torch.ones(2), "z": torch.ones(4)})
    b = StateDict({"x": torch.ones(3, 2), "z": torch.ones(4), "w": torch.ones(1)})
    found = compare(a, b, StateDict({"x": torch.ones(2, 3)}))
    assert (found.only_a, found.only_b) == (["y"], ["w"])
    assert found.shapes == {"x": ([2, 3], [3, 2])}
    assert list(found.not_in_base) == ["z"] and not found.tensors and not found.same_values
    assert list(compare(a, b).tensors) == ["z"]


def test_tied_names_are_compared_by_their_values() -> None:
    shared = torch.ones(4)
    tied = StateDict({"embed": shared, "head": shared})
    apart = StateDict({"embed": torch.ones(4), "head": torch.full((4,), 2.0)})
    for found in (compare(tied, apart), compare(apart, tied)):
        assert not found.only_a and not found.only_b
        assert found.tensors["embed"].changed == 0 and found.tensors["head"].changed == 1


def test_nonfinite_values_are_counted_and_left_out() -> None:
    a = StateDict({"x": torch.tensor([1.0, float("nan"), 2.0, float("inf"), 5.0])})
    b = StateDict({"x": torch.tensor([1.0, float("nan"), 4.0, 1.0, float("-inf")])})
    found = compare(a, b).tensors["x"]
    assert found.nonfinite == 3 and found.changes == 3  # NaN in both is no change
    assert found.norm_a == pytest.approx(5**0.5) and found.max_abs == 2
    assert compare(a, a).identical
    json.dumps(compare(a, b).to_json(), allow_nan=False)


def test_integers_are_exact_and_count_in_no_total() -> None:
    big = 2**53
    for dtype in (torch.int64, torch.uint64, torch.uint16, torch.bool):
        high = big + 1 if dtype.itemsize == 8 else 1
        low = high - 1
        a = StateDict({"n": torch.tensor([low, low]).to(dtype), "w": torch.ones(2)})
        b = StateDict({"n": torch.tensor([low, high]).to(dtype), "w": torch.ones(2)})
        found = compare(a, b)
        assert found.tensors["n"].changed == 0.5 and found.integers == ["n"]
        assert found.total.changes == 0 and not found.same_values and compare(a, a).identical


def test_odd_tensors() -> None:
    a = StateDict({"scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "c": torch.tensor([1 + 1j, 2j])})
    b = StateDict({"scalar": torch.tensor(-2.0), "empty": torch.zeros(0, 3), "c": torch.tensor([1 + 1j, 3j])})
    found = compare(a, b)
    assert found.tensors["scalar"].sign_conflict == 1 and found.tensors["scalar"].cosine == -1
    assert found.tensors["empty"].to_json()["cosine"] is None
    assert found.tensors["c"].changed == 0.5 and found.tensors["c"].norm_difference == 1


def test_lazy_checkpoints() -> None:
    from weft.api import merge

    a, b = model(1), model(2)
    found = compare(a, merge([a, b], weight=[0.75, 0.25]))
    straight = compare(a, b)
    # the merge is a quarter of the way
    assert found.total.norm_difference == pytest.approx(straight.total.norm_difference / 4, rel=1e-12)


def test_config() -> None:
    def with_config(config: dict[str, Any]) -> Model:
        return Model(model(1), config, (), "m")

    found = compare(
        with_config({"a": 1, "b": {"c": 2, "d": 3}}), with_config({"a": 1.0, "b": {"c": 2}, "e": [1]})
    )
    assert found.config == {"a": (1, 1.0), "b.d": (3, None), "e": (None, [1])}
    assert found.same_values and not found.identical


def test_json_holds_everything() -> None:
    told = json.loads(json.dumps(compare(model(1), model(2), model(3)).to_json(), allow_nan=False))
    assert set(told["tensors"]) == set(NAMES) and told["base"] == "m3" and told["identical"] is False
    assert set(told) >= {
        "total",
        "layers",
        "stacks",
        "kinds",
        "only_a",
        "only_b",
        "shapes",
        "dtypes",
        "config",
    }
    assert set(told["total"]) == {"numel", "norm_a", "norm_b", "norm_difference", "relative", "cosine",
                                  "sign_conflict", "changed", "max_abs", "nonfinite"}  # fmt: skip


def test_values() -> None:
    x = torch.tensor([0.0, -3.0, 4.0, float("nan"), float("inf"), 0.0])
    found = survey_values(StateDict({"x": x, "e": torch.zeros(0), "bad": torch.full((2,), float("nan"))}))
    v = found["x"]
    assert (v.norm, v.min, v.max, v.nan, v.inf, v.mean) == (5, -3, 4, 1, 1, 0.25)
    assert v.zero_fraction == pytest.approx(1 / 3) and v.rms == pytest.approx(2.5)
    assert found["e"].to_json()["min"] is None and found["bad"].max is None


def test_order_and_patterns() -> None:
    names = ["lm_head.weight", "layers.10.w", "layers.2.w", "norm.weight", "embed.weight"]
    names += ["layers.2.experts.1.w", "layers.2.experts.0.w"]
    assert in_order(names)[0] == "embed.weight" and in_order(names)[-2:] == ["lm_head.weight", "norm.weight"]
    info = TensorInfo((2,), torch.float32)
    groups = patterns(dict.fromkeys([f"layers.{i}.w" for i in (0, 1, 2, 5)] + names[3:], info))
    told = {g.pattern: len(g.names) for g in groups}
    assert (
        told["layers.{0..2,5}.w"] == 4 and told["layers.2.experts.{0,1}.w"] == 2 and told["norm.weight"] == 1
    )
    other = patterns({"layers.0.w": info, "layers.1.w": TensorInfo((3,), torch.float32)})
    assert [g.pattern for g in other] == ["layers.0.w", "layers.1.w"]


@pytest.mark.parametrize("flat", [False, True])
def test_picture(tmp_path: Path, flat: bool) -> None:
    pytest.importorskip("matplotlib")
    from weft.analysis.picture import draw

    names = ["a$b_{.weight", "c.weight"] if flat else NAMES
    generator = torch.Generator().manual_seed(0)
    a, b = (StateDict({n: torch.randn(4, generator=generator) for n in names}) for _ in range(2))
    for i, found in enumerate((compare(a, b), compare(a, a), compare(a, b, a))):
        draw(found, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 3  # nothing temporary is left


def test_nothing_to_compare() -> None:
    found = compare(StateDict({"a": torch.ones(1)}), StateDict({"b": torch.ones(1)}))
    assert isinstance(found, Comparison) and found.total.cosine is None and not math.isnan(found.total.norm_a)
