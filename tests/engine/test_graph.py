"""Lazy nodes: arithmetic on checkpoints equals float64 arithmetic on tensors, rounded once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import State, family, state
from torch import Tensor, nn

import weft
from weft.checkpoints.dtypes import round_to
from weft.checkpoints.lazy import Affine, Cast, Renamed, subset
from weft.errors import DataProblems, UsageError
from weft.methods.registry import METHODS, pipeline_method
from weft.methods.step import STEPS

A, B, C = (state(i, torch.float32) for i in range(3))
NAME = "layers.0.mlp.weight"


def loaded() -> list[weft.Checkpoint]:
    return [weft.load(s) for s in (A, B, C)]


EXPRESSIONS: dict[str, Any] = {
    "a + b": lambda a, b, c: a + b,
    "a - b": lambda a, b, c: a - b,
    "2.5 * a": lambda a, b, c: 2.5 * a,
    "a * -0.3": lambda a, b, c: a * -0.3,
    "a / 3": lambda a, b, c: a / 3,
    "-a": lambda a, b, c: -a,
    "negation: a - (b - a)": lambda a, b, c: a - (b - a),
    "analogy: a + (b - c)": lambda a, b, c: a + (b - c),
    "task arithmetic": lambda a, b, c: a + 0.5 * (b - a) - 0.3 * (c - a),
    "extrapolation": lambda a, b, c: b + 0.7 * (b - a),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_arithmetic_is_exact_to_one_rounding(name: str) -> None:
    found = EXPRESSIONS[name](*loaded())
    for tensor, t in A.items():
        expected = EXPRESSIONS[name](t.double(), B[tensor].double(), C[tensor].double())
        values = found.tensor(tensor)
        assert values.dtype == torch.float64
        assert values.shape == t.shape
        torch.testing.assert_close(values, expected, rtol=1e-14, atol=1e-15)
        written = found.state_dict()[tensor]
        assert written.dtype == torch.float32
        torch.testing.assert_close(written, expected.float(), rtol=2e-7, atol=1e-9)


def test_expressions_are_one_node() -> None:
    a, b, c = loaded()
    found = 2 * (a + 0.5 * (b - a)) - (c - a) / 4
    assert isinstance(found, Affine)
    assert {id(s): k for k, s in found.terms} == {id(a): 1.25, id(b): 1.0, id(c): -0.25}
    assert found.inputs[0] is a


def test_terms_that_cancel_are_not_read() -> None:
    a, b, c = loaded()
    assert [s for _, s in (a + b - b + c - c).terms] == [a]
    assert (a - a).coefficients == [0.0]
    assert not (a - a).tensor(NAME).any()


def test_config_comes_from_a_model_that_is_added(tmp_path: Path) -> None:
    base, (tuned, *_) = family(tmp_path)
    (tmp_path / "tuned0/config.json").write_text('{"x": 1}')
    a, b = weft.load(base), weft.load(tuned)
    assert (b - a).config == {"x": 1}
    assert (-1.0 * a + b).config == {"x": 1}


def test_what_cannot_be_added_is_told_at_once() -> None:
    other = {"w": torch.ones(2), "v": torch.ones(3), "x": torch.ones(1)}
    with pytest.raises(DataProblems) as error:
        weft.load(other) + weft.load({"w": torch.ones(3), "v": torch.ones(3), "y": torch.ones(1)})
    assert len(error.value.problems) == 3
    with pytest.raises(UsageError, match="only checkpoints can be added"):
        weft.load(other) + 3  # type: ignore[operator]


def test_integers_are_carried() -> None:
    a = weft.load({"w": torch.ones(2), "n": torch.tensor([7])})
    b = weft.load({"w": torch.ones(2), "n": torch.tensor([9])})
    assert (2 * a - b).tensor("n").tolist() == [7]


def test_a_range_is_a_part_of_the_whole() -> None:
    a, b, c = loaded()
    found = Cast(a + (b - c), torch.bfloat16)
    whole = found.read(NAME)
    assert torch.equal(found.read(NAME, 100, 777), whole[100:777])


# -- cast, rename, subset --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_cast_rounds_once_and_then_stays(dtype: torch.dtype) -> None:
    a, b, _ = loaded()
    exact = (A[NAME].double() + B[NAME].double() * 0.1).reshape(-1)
    node = Cast(a + 0.1 * b, dtype)
    assert node.info(NAME).dtype == dtype
    values = node.read(NAME)
    assert values.dtype == dtype
    error = (values.double() - exact).abs()
    coded = values.view(torch.int16 if dtype.itemsize == 2 else torch.int8)
    for step in (1, -1):
        near = (coded + step).view(dtype).double()
        assert bool((error <= (near - exact).abs().nan_to_num(nan=torch.inf)).all())
    # as if it had been saved and loaded: a wider dtype shows what the narrow one kept
    assert torch.equal(node.read(NAME, dtype=torch.float32), values.float())
    assert torch.equal(node.read(NAME, dtype=torch.float64), values.double())


def test_cast_leaves_integers_and_refuses_to_store_as_them() -> None:
    node = Cast(weft.load({"w": torch.ones(2), "n": torch.tensor([7])}), torch.float16)
    assert node.info("n").dtype == torch.int64
    with pytest.raises(UsageError, match="floating"):
        Cast(node, torch.int8)


def test_renamed() -> None:
    source = weft.load({"a.w": torch.ones(2), "b.w": torch.zeros(3), "c": torch.ones(1)})
    node = Renamed(source, lambda n: None if n == "c" else n.replace("a.", "x."))
    assert list(node) == ["x.w", "b.w"]
    assert node.tensor("x.w").tolist() == [1, 1]
    assert (node.bytes_read("x.w"), node.grain("x.w")) == (8, 1)
    with pytest.raises(UsageError, match=r"no tensor 'a\.w'.*x\.w"):
        node.tensor("a.w")
    with pytest.raises(UsageError, match="both become"):
        Renamed(source, lambda n: "same")
    assert list(subset(source, ["c"])) == ["c"]


def test_renamed_keeps_ties() -> None:
    w = torch.ones(2)
    source = weft.load({"embed": w, "head": w})
    assert dict(Renamed(source, lambda n: f"model.{n}").aliases) == {"model.head": "model.embed"}
    assert dict(Renamed(source, lambda n: None if n == "embed" else n).aliases) == {}


# -- merges of merges ------------------------------------------------------------------------------------


def test_a_merge_of_a_merge_rounds_nothing_in_between(tmp_path: Path) -> None:
    """bf16 inputs: equal to two steps in float64, and unlike two steps with a bf16 file between."""
    base, (x, y) = family(tmp_path)
    inner = weft.merge([x, y], "ties", base=base, density=0.4)
    outer = weft.merge([inner, x], "linear", weight=[0.3, 0.7])
    loaded_x = weft.load(x)
    for name, info in outer.tensors.items():
        assert info.dtype == torch.bfloat16
        exact = 0.3 * inner.tensor(name) + 0.7 * loaded_x.tensor(name).double()
        assert torch.equal(outer.tensor(name), exact)
    weft.save(outer, tmp_path / "nested.safetensors", threads=2)
    nested = weft.load(tmp_path / "nested.safetensors")
    for name in outer:
        exact = round_to(outer.tensor(name), torch.bfloat16)
        assert torch.equal(nested.tensor(name), exact)
    weft.save(inner, tmp_path / "step.safetensors")
    stepped = weft.merge([tmp_path / "step.safetensors", x], "linear", weight=[0.3, 0.7])
    assert not torch.equal(stepped.tensor(NAME), outer.tensor(NAME))


def test_a_merge_works_as_base_and_in_arithmetic(tmp_path: Path) -> None:
    base, (x, y) = family(tmp_path)
    mean = weft.merge([x, y], "linear")
    moved = weft.merge([x], "task_arithmetic", base=mean, weight=0.5)
    expected = mean.tensor(NAME) + 0.5 * (weft.load(x).tensor(NAME).double() - mean.tensor(NAME))
    torch.testing.assert_close(moved.tensor(NAME), expected, rtol=1e-12, atol=0)
    back = mean - weft.load(base)
    torch.testing.assert_close(
        back.tensor(NAME), mean.tensor(NAME) - weft.load(base).tensor(NAME).double(), rtol=1e-12, atol=0
    )


def test_deep_graphs_save_as_they_read(tmp_path: Path) -> None:
    base, (x, y) = family(tmp_path)
    inner = weft.merge([x, y], "ties", base=base, density=0.4, scope="model")
    middle = weft.merge([inner, weft.load(y) - 0.1 * weft.load(x)], "slerp", t=0.3)
    outer = Cast(weft.merge([middle, x], "dare_ties", base=inner, density=0.5), torch.float32)
    for out, threads in (("a", 1), ("b", 4)):
        weft.save(outer, tmp_path / f"{out}.safetensors", threads=threads)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    written = weft.load(tmp_path / "a.safetensors")
    assert all(torch.equal(written.tensor(n), outer.tensor(n)) for n in outer)


# -- into a module ----------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, tie: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 10, bias=False)
        if tie:
            self.head.weight = self.embed.weight


@pytest.mark.parametrize("tie", [False, True])
def test_materialize(tie: bool) -> None:
    a, b, target = Net(tie), Net(tie), Net(tie)
    with torch.no_grad():
        a.norm.num_batches_tracked.fill_(5)
    assert weft.materialize(weft.merge([a, b], "linear"), target) is target
    expected = (a.embed.weight.double() + b.embed.weight.double()) / 2
    assert torch.equal(target.embed.weight, expected.float())
    assert target.norm.num_batches_tracked == 5
    assert (target.head.weight is target.embed.weight) == tie


def test_materialize_lists_all_that_does_not_fit() -> None:
    wrong = {n: t for n, t in Net().state_dict().items() if n != "norm.bias"}
    wrong |= {"head.weight": torch.ones(3, 3), "extra": torch.ones(1)}
    with pytest.raises(DataProblems) as error:
        weft.materialize(wrong, Net())
    told = "\n".join(error.value.problems)
    assert len(error.value.problems) == 3
    assert "norm.bias: not in" in told
    assert "extra: not in the module" in told
    assert "head.weight: shape [3, 3]" in told


# -- the graph travels --------------------------------------------------------------------------------------


def travelled(checkpoint: weft.Checkpoint) -> weft.Checkpoint:
    found: weft.Checkpoint = pickle.loads(pickle.dumps(checkpoint))
    return found


def same(a: weft.Checkpoint, b: weft.Checkpoint) -> None:
    assert dict(a.tensors) == dict(b.tensors)
    assert a.identity() == b.identity()
    left: State = a.state_dict()
    right: dict[str, Tensor] = b.state_dict()
    assert all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "della", "slerp", "model_stock", "sce"])
def test_graphs_pickle(tmp_path: Path, method: str) -> None:
    base, tuned = family(tmp_path)
    needs_base = METHODS[method].base == "required"
    merged = weft.merge(tuned, method, base=base if needs_base else None, seed=3)
    same(travelled(merged), merged)  # before anything is found out, and after
    same(travelled(merged), merged)


def test_schedules_and_arithmetic_pickle(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    merged = weft.merge(
        tuned, "ties", base=base, scope="tensor",
        density=[{"filter": "mlp", "value": [0.2, 0.6]}, {"value": 0.5}], weight=[1.0, 0.5],
    )  # fmt: skip
    node = Renamed(Cast(merged + 0.5 * (weft.load(tuned[0]) - weft.load(base)), torch.float16), str.upper)
    same(travelled(node), node)


def test_methods_and_steps_pickle_by_name() -> None:
    assert all(travelled(METHODS[m]) is METHODS[m] for m in METHODS)  # type: ignore[arg-type, comparison-overlap]
    assert all(travelled(s) is s for s in STEPS.values())  # type: ignore[arg-type, comparison-overlap]


def test_methods_made_of_steps_pickle(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    steps = STEPS["trim"](density=0.3) | STEPS["weighted_sum"](weight=0.5)
    merged = weft.merge(tuned, pipeline_method(steps, "mine"), base=base)
    same(travelled(merged), merged)


def test_a_file_that_changed_does_not_travel(tmp_path: Path) -> None:
    base, _ = family(tmp_path)
    data = pickle.dumps(weft.load(base))
    path = tmp_path / "base/model.safetensors"
    path.write_bytes(path.read_bytes())
    with pytest.raises(weft.DataError, match="changed"):
        pickle.loads(data)
