"""Packs from strangers: every field wrong in turn, forged parts, and documents made at random."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import base_model, tuned
from safetensors.torch import load_file, save_file

import weft
from weft.deltas.format import Document, parse_document
from weft.errors import DataError, UnsafeFile

W = "layers.0.weight"
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packs")
    base, model = base_model(), tuned(base_model())
    for scheme in ("exact", "sparse", "lowrank", "sign", "quantised"):
        weft.save(weft.pack_delta(model, base, scheme=scheme), folder / scheme)
    return folder


def forged(packs: Path, scheme: str, out: Path, change: Change, parts: Change | None = None) -> Path:
    told = json.loads((packs / scheme / "weft_delta.json").read_text())
    change(told)
    stored = load_file(packs / scheme / "delta.safetensors")
    if parts is not None:
        parts(stored)
    out.mkdir()
    (out / "weft_delta.json").write_text(json.dumps(told))
    save_file(stored, out / "delta.safetensors")
    return out


DOCUMENTS: list[tuple[str, str, Change]] = [
    ("exact", "is no delta of weft's", lambda d: d.update(format="other")),
    ("exact", "is of version 2, which this weft does not read", lambda d: d.update(version=2)),
    ("exact", "is of version True", lambda d: d.update(version=True)),
    ("exact", "'more' is not known", lambda d: d.update(more=1)),
    ("exact", "base is missing", lambda d: d.pop("base")),
    ("exact", "base must have just ref", lambda d: d.update(base={"ref": None})),
    ("exact", "removed must be a list of names", lambda d: d.update(removed="x")),
    ("exact", "aliases must map names to names", lambda d: d.update(aliases={"a": 1})),
    ("exact", "config must be an object", lambda d: d.update(config=[])),
    ("exact", "the scheme 'zip' is not known", lambda d: d["tensors"][W].update(scheme="zip")),
    ("exact", "is not known", lambda d: d["tensors"][W].update(dtype="F77")),
    ("exact", "exact must say just bits, count, index", lambda d: d["tensors"][W].pop("bits")),
    ("exact", "bits = -1 is no count", lambda d: d["tensors"][W].update(bits=-1)),
    ("exact", "bits = True is no count", lambda d: d["tensors"][W].update(bits=True)),
    ("exact", "exact cannot hold codes of 99 bits", lambda d: d["tensors"][W].update(bits=99)),
    ("exact", "cannot hold 999999 of 1920 elements", lambda d: d["tensors"][W].update(count=999999)),
    ("exact", "the base has no such tensor", lambda d: d.update(tensors={"other": d["tensors"][W]})),
    ("exact", "is removed, but the base has no such tensor", lambda d: d["removed"].append("nowhere")),
    ("exact", "is removed and stored", lambda d: d["removed"].append(W)),
    ("exact", "is tied to", lambda d: d.update(aliases={"head": "nowhere"})),
    ("sparse", "count = 4611686018427387904 is no count", lambda d: d["tensors"][W].update(count=2**62)),
    ("sparse", "is not list or bitmap", lambda d: d["tensors"][W].update(index="tree")),
    ("sparse", "sparse cannot hold values of dtype 'int8'", lambda d: d["tensors"][W].update(values="int8")),
    ("sparse", "an inexact difference of torch.int64",
     lambda d: d["tensors"].update(steps=d["tensors"][W] | {"count": 1})),
    ("lowrank", "lowrank cannot hold", lambda d: d["tensors"][W].update(rank=41)),
    ("lowrank", "lowrank cannot hold", lambda d: d["tensors"][W].update(rank=0)),
    ("sign", "sign cannot hold groups of 0", lambda d: d["tensors"][W].update(group=0)),
    ("quantised", "quantised cannot hold codes of 9 bits", lambda d: d["tensors"][W].update(bits=9)),
    ("quantised", r"codes' is torch.uint8 \[960\]", lambda d: d["tensors"][W].update(bits=2)),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(DOCUMENTS)))
def test_a_forged_document_is_one_clear_error(packs: Path, tmp_path: Path, case: int) -> None:
    scheme, words, change = DOCUMENTS[case]
    with pytest.raises(DataError, match=words):
        weft.load(forged(packs, scheme, tmp_path / "f", change), base=base_model())


PARTS: list[tuple[str, str, Change]] = [
    ("sparse", f"'{W}.value' is missing", lambda p: p.pop(f"{W}.value")),
    ("sparse", "belongs to no tensor", lambda p: p.update(stray=torch.ones(3))),
    ("sparse", f"'{W}.value' is", lambda p: p.update({f"{W}.value": p[f"{W}.value"][:-1].clone()})),
    ("lowrank", f"'{W}.left' is", lambda p: p.update({f"{W}.left": p[f"{W}.left"].float()})),
    ("sign", f"'{W}.scale' is", lambda p: p.update({f"{W}.scale": torch.ones(2)})),
]


@pytest.mark.parametrize("case", range(len(PARTS)))
def test_parts_that_are_not_what_the_document_says(packs: Path, tmp_path: Path, case: int) -> None:
    scheme, words, change = PARTS[case]
    with pytest.raises(DataError, match=words):
        weft.load(forged(packs, scheme, tmp_path / "f", lambda d: None, change), base=base_model())


POSITIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "beyond the end": lambda at: at.to(torch.int64).index_fill(0, torch.tensor([len(at) - 1]), 60000).to(at.dtype),
    "twice": lambda at: at.to(torch.int64).index_fill(0, torch.tensor([1]), int(at[0])).to(at.dtype),
    "falling": lambda at: at.to(torch.int64).flip(0).to(at.dtype),
}  # fmt: skip


@pytest.mark.parametrize("how", POSITIONS)
def test_positions_that_lie_write_nowhere_else(packs: Path, tmp_path: Path, how: str) -> None:
    def change(parts: dict[str, Any]) -> None:
        parts[f"{W}.at"] = POSITIONS[how](parts[f"{W}.at"])

    document = json.loads((packs / "sparse" / "weft_delta.json").read_text())
    if document["tensors"][W]["index"] != "list":
        base, model = base_model(), tuned(base_model())
        weft.save(weft.pack_delta(model, base, scheme="sparse", density=0.02), tmp_path / "sparse")
        packs = tmp_path
    delta = weft.load(forged(packs, "sparse", tmp_path / "f", lambda d: None, change), base=base_model())
    with pytest.raises(DataError, match=W):
        delta.tensor(W)


def test_block_counts_that_lie_are_found(packs: Path, tmp_path: Path) -> None:
    for i, lie in enumerate(([0, 10**9], [5, 192], [0, -3])):

        def change(parts: dict[str, Any], lie: list[int] = lie) -> None:
            parts[f"{W}.blocks"] = torch.tensor(lie)

        delta = weft.load(
            forged(packs, "sparse", tmp_path / str(i), lambda d: None, change), base=base_model()
        )
        with pytest.raises(DataError, match=W):
            delta.tensor(W)


def test_a_pack_that_names_a_web_address_fetches_nothing(packs: Path, tmp_path: Path) -> None:
    def change(told: dict[str, Any]) -> None:
        told["base"]["ref"] = "http://127.0.0.1:9/model"

    with pytest.raises(weft.UsageError, match="pass it as base= if you trust it"):
        weft.load(forged(packs, "sign", tmp_path / "f", change))


@pytest.mark.parametrize("ref", ["a" * 5000, "a/" * 3000, "~nobody/model", "x\0y", "/nowhere/at/all"])
def test_a_pack_that_names_no_path_is_one_clear_error(packs: Path, tmp_path: Path, ref: str) -> None:
    with pytest.raises(weft.UsageError) as caught:
        weft.load(forged(packs, "sign", tmp_path / "f", lambda d: d["base"].update(ref=ref)))
    assert len(str(caught.value)) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_document_is_read_or_refused(data: st.DataObject) -> None:
    told: Any = {
        "format": "weft-delta", "version": 1, "base": {"ref": None, "signature": "x", "sample": None},
        "config": None, "aliases": None, "removed": [], "dropped_files": [],
        "tensors": {"w": {"scheme": "sign", "group": 3}},
    }  # fmt: skip
    told = copy.deepcopy(told)
    spot = data.draw(
        st.sampled_from(["base", "config", "aliases", "removed", "tensors", "entry", "group", "more"])
    )
    value = data.draw(JSON)
    if spot == "entry":
        told["tensors"]["w"] = value
    elif spot == "group":
        told["tensors"]["w"]["group"] = value
    else:
        told[spot] = value
    with contextlib.suppress(DataError):
        assert isinstance(parse_document(json.dumps(told).encode(), "x"), Document)


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_bytes_that_are_no_document(data: bytes) -> None:
    with pytest.raises(UnsafeFile):
        parse_document(data, "x")
