"""`Assembled`: tensors put together from ranges of others, read in any ranges."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import weft
from weft.checkpoints.assembled import Assembled, Span, Whole, joined
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Cast
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems, UsageError

LEFT = {"x": torch.arange(24.0).reshape(4, 6), "y": -torch.arange(6.0)}
RIGHT = {"x": 100 + torch.arange(24.0).reshape(4, 6)}


def sources() -> tuple[StateDict, StateDict]:
    return StateDict(LEFT, origin="left"), StateDict(RIGHT, origin="right")


@given(st.data())
def test_any_spans_read_in_any_ranges_are_their_elements_end_to_end(data: st.DataObject) -> None:
    left, right = sources()
    spans, expected = [], []
    for _ in range(data.draw(st.integers(1, 5))):
        source, state = data.draw(st.sampled_from([(left, LEFT), (right, RIGHT)]))
        name = data.draw(st.sampled_from(sorted(state)))
        ends = sorted(data.draw(st.lists(st.integers(0, state[name].numel()), min_size=2, max_size=2)))
        spans.append(Span(source, name, *ends))
        expected.append(state[name].flatten()[slice(*ends)])
    flat = torch.cat(expected)
    node = Assembled({"z": joined(spans, (len(flat),))})
    start, stop = sorted(data.draw(st.lists(st.integers(0, len(flat)), min_size=2, max_size=2)))
    assert torch.equal(node.read("z", start, stop), flat[start:stop])
    assert torch.equal(node.read("z", start, stop, dtype=torch.float64), flat[start:stop].double())


class Coarse(StateDict):
    """Readable in whole rows only, and counting what is held and released."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls: list[tuple[str, str]] = []

    def grain(self, name: str) -> int:
        return self.info(name).shape[-1]

    def read(self, name: str, start: int = 0, stop: int | None = None, *, dtype: Any = None) -> torch.Tensor:
        rows = self.grain(name)
        assert start % rows == 0 and (stop is None or stop % rows == 0 or stop == self.info(name).numel)
        return super().read(name, start, stop, dtype=dtype)

    def hold(self, name: str) -> None:
        self.calls.append(("hold", name))

    def release(self, name: str) -> None:
        self.calls.append(("release", name))


def test_reads_that_fall_between_a_sources_grains_are_widened_and_cut() -> None:
    coarse = Coarse(LEFT)
    node = Assembled({"z": joined([Span(coarse, "x", 3, 15), Span(coarse, "x", 8, 10)], (14,))})
    flat = torch.cat([LEFT["x"].flatten()[3:15], LEFT["x"].flatten()[8:10]])
    for start in range(14):
        for stop in range(start, 15):
            assert torch.equal(node.read("z", start, stop), flat[start:stop])


def test_a_tensor_that_several_outputs_show_is_released_by_the_last() -> None:
    coarse = Coarse(LEFT)
    node = Assembled({"a": Span(coarse, "x"), "b": Span(coarse, "x"), "c": Span(coarse, "y")})
    for name in ("a", "b", "c"):
        node.hold(name)
    node.release("a")
    assert ("release", "x") not in coarse.calls
    node.release("b")
    assert coarse.calls.count(("release", "x")) == 1
    again = pickle.loads(pickle.dumps(node))
    assert torch.equal(again.tensor("b"), LEFT["x"])


def test_fused_experts_and_back() -> None:
    experts = {f"e{i}": torch.randn(3, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    split = StateDict(experts)
    fused = Assembled({"all": joined([Span(split, n) for n in experts], (4, 3, 5))})
    assert torch.equal(fused.tensor("all"), torch.stack(list(experts.values())))
    back = Assembled({f"e{i}": Whole((Span(fused, "all", 15 * i, 15 * i + 15),), (3, 5)) for i in range(4)})
    assert all(torch.equal(back.tensor(n), t) for n, t in experts.items())
    assert fused.bytes_read("all") == 4 * 60 and back.bytes_read("e0") == 60


def test_what_a_lazy_source_computes_is_rounded_once() -> None:
    left, _ = sources()
    third = (1 / 3) * left
    node = Assembled(
        {"z": joined([Span(third, "x", 0, 12)], (12,)), "w": Whole((Span(third, "y"),), None, torch.float16)}
    )
    assert node.info("z").dtype is torch.float32 and node.info("w").dtype is torch.float16
    expected = (LEFT["y"].double() / 3).half()
    assert torch.equal(node.read("w", dtype=torch.float16), expected)


def test_identity_follows_spans_and_sources(tmp_path: Path) -> None:
    weft.save(LEFT, tmp_path / "left")
    stored = weft.load(tmp_path / "left")
    nodes = [Assembled({"z": joined([Span(stored, "x", a, a + 6)], (6,))}) for a in (0, 0, 6)]
    assert nodes[0].identity() == nodes[1].identity() != nodes[2].identity()
    assert Assembled({"z": Span(StateDict(LEFT), "x")}).identity() is None


def test_saving_copies_bytes_whatever_the_dtype(tmp_path: Path) -> None:
    state = {"x": torch.randn(8, 8).bfloat16(), "n": torch.arange(4), "nan": torch.full((2,), torch.nan)}
    source: Checkpoint = StateDict(state)
    node = Assembled({"a": Span(source, "x"), "n": Span(source, "n"), "nan": Span(source, "nan"),
                      "b": joined([Span(source, "x", 32, 64), Span(source, "x", 0, 32)], (8, 8))},
                     aliases={"tied": "a"}, carried={"n": "why"})  # fmt: skip
    saved = weft.save(node, tmp_path / "out")
    out = weft.load(saved.path)
    assert torch.equal(out.tensor("a"), state["x"]) and torch.equal(out.tensor("n"), state["n"])
    assert torch.equal(out.tensor("b"), torch.cat([state["x"][4:], state["x"][:4]]))
    assert out.tensor("nan").isnan().all() and saved.manifest["carried"] == {"n": "why"}
    half = weft.save(Cast(node, torch.float16), tmp_path / "half").path
    assert torch.equal(weft.load(half).tensor("b"), torch.cat([state["x"][4:], state["x"][:4]]).half())


def test_spans_that_do_not_fill_their_shape_or_leave_their_tensor() -> None:
    left, _ = sources()
    with pytest.raises(DataProblems) as error:
        Assembled(
            {"a": Span(left, "x", 20, 30), "b": joined([Span(left, "y")], (2, 4))}, aliases={"c": "gone"}
        )
    told = "\n".join(error.value.problems)
    assert "a: x of left has 24 elements, not [20, 30)" in told
    assert "b: shape [2, 4] has 8 elements, its parts 6" in told and "c: tied to gone" in told
    with pytest.raises(UsageError, match="no tensor 'z'"):
        Assembled({"a": Span(left, "z")})
    with pytest.raises(UsageError, match="no tensor to assemble"):
        Assembled({})
