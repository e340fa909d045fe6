"""Rows: every row a sparse combination of rows of sources, exact, whatever the cut."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import weft
from weft.checkpoints import rows as rows_module
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.lazy import Cast
from weft.checkpoints.memory import StateDict
from weft.checkpoints.rowmap import RowMap
from weft.checkpoints.rows import Mapped, Rows
from weft.errors import DataProblems

A, B = 7, 5


def model(seed: int, n: int, width: tuple[int, ...] = (6,), dtype: torch.dtype = torch.bfloat16) -> StateDict:
    g = torch.Generator().manual_seed(seed)
    state = {"embed": torch.randn((n, *width), generator=g).to(dtype), "other": torch.randn(3, generator=g)}
    return StateDict(state, origin=f"model{seed}")


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def dense(rows: RowMap, sources: list[torch.Tensor]) -> torch.Tensor:
    """The definition, in float64, term by term."""
    width = sources[0].shape[1:]
    out = torch.zeros((len(rows), *width), dtype=torch.float64)
    for i in range(len(rows)):
        for j in range(rows.indptr[i], rows.indptr[i + 1]):
            out[i] += float(rows.coefficient[j]) * sources[rows.source[j]][rows.row[j]].double()
    return out


@st.composite
def maps(draw: st.DrawFn) -> RowMap:
    """Runs, scattered rows, zero rows and combinations, from two sources."""
    per_row = []
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from(["run", "term", "zero", "sum"]))
        if kind == "run":
            first = draw(st.integers(0, A - 1))
            per_row += [[(0, r, 1.0)] for r in range(first, draw(st.integers(first, A - 1)) + 1)]
            continue
        terms = {"term": 1, "zero": 0, "sum": draw(st.integers(2, 5))}[kind]
        row = []
        for _ in range(terms):
            source = draw(st.integers(0, 1))
            c = 1.0 if kind == "term" else draw(st.floats(-2, 2, width=32))
            row.append((source, draw(st.integers(0, (A, B)[source] - 1)), c))
        per_row.append(row)
    flat = [t for row in per_row for t in row]
    return RowMap(
        np.cumsum([0, *map(len, per_row)]).astype(np.int64), ints(*(t[0] for t in flat)),
        ints(*(t[1] for t in flat)), np.array([t[2] for t in flat], np.float64),
    )  # fmt: skip


def node(rows: RowMap, *sources: Checkpoint, width: tuple[int, ...] = (6,)) -> Rows:
    return Rows(sources[0], {"embed": Mapped(rows, tuple((s, "embed") for s in sources), width)})


@given(maps(), st.data())
@settings(max_examples=120, deadline=None)
def test_equals_the_definition_however_it_is_cut(rows: RowMap, data: st.DataObject) -> None:
    a, b = model(1, A), model(2, B)
    made = node(rows, a, b)
    assert made.info("embed").shape == (len(rows), 6) and made.info("embed").dtype is torch.bfloat16
    whole = made.read("embed")
    assert torch.allclose(
        whole.double().reshape(-1, 6), dense(rows, [a.tensor("embed"), b.tensor("embed")]), atol=1e-13
    )
    n = len(rows) * 6
    cuts = sorted({0, n, *data.draw(st.lists(st.integers(0, n), max_size=5))})
    stored = [made.read("embed", x, y, dtype=torch.bfloat16) for x, y in itertools.pairwise(cuts)]
    if stored:
        assert torch.equal(torch.cat(stored), made.read("embed", dtype=torch.bfloat16))


def test_single_rows_are_copied_bit_for_bit() -> None:
    a = model(1, 40, dtype=torch.float32)
    order = np.random.default_rng(0).permutation(40)
    made = node(RowMap.pick(0, order), a)
    assert made.tensor("embed").dtype is torch.float32
    assert torch.equal(made.tensor("embed"), a.tensor("embed")[torch.from_numpy(order)])


def test_a_run_is_one_read(monkeypatch: pytest.MonkeyPatch) -> None:
    a = model(1, 40)
    reads: list[tuple[int, int]] = []
    plain = StateDict.read

    def counted(
        self: StateDict, name: str, start: int = 0, stop: int | None = None, **more: object
    ) -> torch.Tensor:
        reads.append((start, -1 if stop is None else stop))
        return plain(self, name, start, stop, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(StateDict, "read", counted)
    node(RowMap.pick(0, np.arange(5, 35)), a).read("embed", 6, 60)
    assert reads == [(36, 90)]
    reads.clear()
    monkeypatch.setattr(rows_module, "NEAR", 0)
    node(RowMap.pick(0, ints(3, 2, 1, 20, 21, 39)), a).read("embed")
    assert reads == [(6, 24), (120, 132), (234, 240)]


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of many terms is the same to the last bit whatever number of terms is added up at a time."""
    a = model(1, 300, dtype=torch.float32)
    rng = np.random.default_rng(0)
    rows = RowMap(ints(0, 250, 250, 300), np.zeros(300, np.int64), rng.permutation(300), rng.normal(size=300))
    expected = node(rows, a).tensor("embed")
    for batch in (6, 30, 600):
        monkeypatch.setattr(rows_module, "BATCH", batch)
        assert torch.equal(node(rows, a).tensor("embed"), expected)
    assert torch.equal(expected[1], torch.zeros(6, dtype=torch.float64))


def test_biases_and_leading_axes() -> None:
    g = torch.Generator().manual_seed(0)
    state = StateDict({"embed": torch.randn(5, generator=g), "lead": torch.randn((1, 5), generator=g)})
    rows = RowMap.pick(0, ints(4, -1, 0))
    made = Rows(state, {
        "embed": Mapped(rows, ((state, "embed"),)), "lead": Mapped(rows, ((state, "lead"),), (), (1,)),
    })  # fmt: skip
    assert made.tensor("embed").tolist() == [
        float(state.tensor("embed")[4]),
        0,
        float(state.tensor("embed")[0]),
    ]
    assert made.info("lead").shape == (1, 3)
    assert made.tensor("lead")[0, 0] == state.tensor("lead")[0, 4]


def test_choosing_and_means() -> None:
    mean = RowMap.mean(3, ints(2, 0, 2), ints(1, 0, 0), ints(3, 1, 2))
    assert (mean.counts == [1, 0, 2]).all()
    assert (mean.row == [1, 3, 2]).all() and (mean.coefficient == [1, 0.5, 0.5]).all()
    chosen = RowMap.chosen([RowMap.pick(0, ints(4, 5, 6)), mean], ints(1, 0, 1))
    assert (chosen.indptr == [0, 1, 2, 4]).all() and (chosen.row == [1, 5, 3, 2]).all()


def test_rows_that_are_not_there() -> None:
    with pytest.raises(DataProblems, match="embed of model1 has 7 rows, not row 9"):
        node(RowMap.pick(0, ints(2, 9)), model(1, A))
    with pytest.raises(DataProblems, match=r"a row has shape \[6\], embed of model2 is \[5, 4\]"):
        node(RowMap.pick(0, ints(2)), model(1, A), model(2, B, (4,)))


class Coarse(Cast):
    """A source that can only be read whole."""

    def grain(self, name: str) -> int:
        return self.info(name).numel


def test_a_source_that_must_be_read_whole() -> None:
    a = model(1, A)
    made = node(RowMap.pick(0, ints(6, 0, 3)), Coarse(a, torch.bfloat16))
    assert made.grain("embed") == 18
    assert torch.equal(made.tensor("embed"), a.tensor("embed")[[6, 0, 3]])


def test_saved_pickled_and_known_again(tmp_path: Path) -> None:
    for seed, n in ((1, A), (2, B)):
        weft.save(model(seed, n), tmp_path / f"{seed}.safetensors")
    a, b = weft.load(tmp_path / "1.safetensors"), weft.load(tmp_path / "2.safetensors")
    rows = RowMap.mean(4, ints(0, 1, 1, 3), ints(0, 0, 1, 1), ints(6, 2, 4, 0))
    made = node(rows, a, b)
    again = pickle.loads(pickle.dumps(made))
    assert made.identity() == again.identity() is not None
    assert made.identity() != node(RowMap.pick(0, ints(1)), a, b).identity()
    weft.save(again, tmp_path / "out.safetensors", threads=2)
    out = weft.load(tmp_path / "out.safetensors")
    expected = dense(rows, [a.tensor("embed"), b.tensor("embed")]).bfloat16()
    assert torch.equal(out.tensor("embed"), expected) and torch.equal(out.tensor("other"), a.tensor("other"))


def test_a_table_that_is_read_all_over_is_held_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held or not, the same bytes; held, one reading of the source."""
    a, b = model(1, 400), model(2, B)
    rng = np.random.default_rng(0)
    rows = RowMap(
        np.cumsum([0, *([1] * 300), *([7] * 50)]), np.zeros(650, np.int64), rng.integers(0, 400, 650),
        np.concatenate([np.ones(300), rng.normal(size=350)]),
    )  # fmt: skip
    made = node(rows, a, b)
    assert made.held_bytes("embed") == 400 * 6 * 2 and made.held_bytes("other") == 0
    assert node(RowMap.pick(0, np.arange(400)), a).held_bytes("embed") == 0
    plain = made.read("embed")
    reads: list[str] = []
    read = StateDict.read
    monkeypatch.setattr(
        StateDict, "read", lambda self, *args, **more: reads.append(args[0]) or read(self, *args, **more)
    )
    made.hold("embed")
    assert torch.equal(made.read("embed"), plain) and reads == ["embed"]
    made.release("embed")
    assert torch.equal(made.read("embed"), plain) and len(reads) > 1
