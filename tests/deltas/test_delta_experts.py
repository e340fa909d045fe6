"""Packs of the demo's real experts: what they take, and what is left of the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from packs import base_model, tuned

import weft
from weft.deltas.node import Delta
from weft.demo.evaluate import accuracy
from weft.demo.tasks import TASKS
from weft.errors import DataError

EXPERTS = Path(weft.__file__).parent / "demo" / "experts"
BASE = EXPERTS / "base.safetensors"


def expert(task: str) -> Path:
    return EXPERTS / f"{task}.safetensors"


def stored(*packs: Path) -> int:
    return sum(i.nbytes for p in packs for i in weft.load(p / "delta.safetensors").tensors.values())


WHOLE = sum(i.nbytes for i in weft.load(BASE).tensors.values())


@pytest.mark.parametrize(
    ("way", "share", "points"),
    [
        ({"scheme": "exact"}, 0.8, 0.0),
        ({"scheme": "quantised", "bits": 4}, 0.28, 0.005),
        ({"scheme": "quantised", "bits": 3, "group": "tensor"}, 0.2, 0.01),
        ({"scheme": "quantised", "bits": 2}, 0.16, 0.015),
        ({"scheme": "lowrank", "rank": 8}, 0.08, 0.035),
        ({"scheme": "sign"}, 0.07, 0.035),
        ({}, 0.22, 0.01),
    ],
    ids=["exact", "4 bits", "3 bits", "2 bits", "low rank", "sign", "auto"],
)
def test_experts_keep_their_accuracy(
    tmp_path: Path, way: dict[str, Any], share: float, points: float
) -> None:
    """`points`: the most that any of the five loses; the base without its difference loses 0.3."""
    for task in TASKS:
        weft.save(weft.pack_delta(expert(task), BASE, **way), tmp_path / task)
        lost = accuracy(expert(task), task) - accuracy(weft.load(tmp_path / task, base=BASE), task)
        assert lost <= points < accuracy(expert(task), task) - accuracy(BASE, task), task
    assert stored(*(tmp_path / t for t in TASKS)) < share * WHOLE * len(TASKS)


def test_a_family_of_experts_takes_less_than_one_model_and_keeps_its_accuracy(tmp_path: Path) -> None:
    weft.pack_family({t: expert(t) for t in TASKS}, BASE, tmp_path, group="tensor")
    assert stored(*(tmp_path / n for n in ("shared", *TASKS))) < WHOLE
    for task in TASKS:
        pack = weft.load(tmp_path / task)  # finds the shared pack and the base by itself
        assert accuracy(pack, task) > accuracy(expert(task), task) - 0.035


def test_merged_packs_are_no_worse_than_merged_experts(tmp_path: Path) -> None:
    packs = []
    for task in TASKS:
        weft.save(weft.pack_delta(expert(task), BASE, scheme="quantised", bits=3), tmp_path / task)
        packs.append(weft.load(tmp_path / task, base=BASE))

    def mean(models: list[Any]) -> float:
        merged = weft.merge(models, "ties", base=BASE, density=0.3)
        return sum(accuracy(merged, t) for t in TASKS) / len(TASKS)

    assert mean(packs) >= mean([expert(t) for t in TASKS]) - 0.01  # measured: 0.012 better


def test_a_broken_off_pack_goes_on_where_it_was(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Any) -> None:
        if event["event"] == "tensor" and event["name"] != first:
            raise Stop

    def pack() -> weft.Checkpoint:
        return weft.pack_delta(expert("rotated"), BASE, scheme="quantised", bits=3)

    first = next(iter(pack()))
    weft.save(pack(), tmp_path / "whole")
    with pytest.raises(Stop):
        weft.save(pack(), tmp_path / "out", threads=1, on_event=stop)
    assert not (tmp_path / "out").exists()
    assert weft.save(pack(), tmp_path / "out").resumed > 0
    for name in ("delta.safetensors", "weft_delta.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(Stop):
        weft.save(pack(), tmp_path / "other", threads=1, on_event=stop)
    other = weft.pack_delta(expert("rotated"), BASE, scheme="quantised", bits=4)
    assert weft.save(other, tmp_path / "other").resumed == 0  # another way is another request


def test_a_shared_pack_of_another_family_is_refused(tmp_path: Path) -> None:
    """Its names, shapes and base are the same: only the stored values tell."""
    weft.save(weft.load(base_model()), tmp_path / "base")
    for family, seeds in (("a", (1, 2)), ("b", (3, 4))):
        models = {f"m{s}": tuned(base_model(), s) for s in seeds}
        weft.pack_family(models, tmp_path / "base", tmp_path / family)
    assert isinstance(weft.load(tmp_path / "a" / "m1"), Delta)
    with pytest.raises(DataError, match=r"made for another base.*other values"):
        weft.load(tmp_path / "a" / "m1", base=tmp_path / "b" / "shared")
    (tmp_path / "a" / "shared").rename(tmp_path / "kept")
    (tmp_path / "b" / "shared").rename(tmp_path / "a" / "shared")
    with pytest.raises(DataError, match="made for another base"):
        weft.load(tmp_path / "a" / "m1")
    moved = weft.load(tmp_path / "a" / "m1", base=weft.load(tmp_path / "kept", base=base_model()))
    assert torch.isfinite(moved.tensor("layers.0.weight")).all()


@pytest.mark.parametrize("other", [{"fast": True, "seed": 3}, {"fast": True, "seed": 1}, {"fast": False}])
def test_factors_of_two_decompositions_are_never_mixed(tmp_path: Path, other: dict[str, Any]) -> None:
    """They have one shape and one document, so only what was asked for tells them apart."""

    class Stop(Exception):
        pass

    seen: list[str] = []

    def stop(event: Any) -> None:
        if event["event"] == "tensor":
            seen.append(event["name"])
            if len(seen) == 2:
                raise Stop

    def pack(**how: Any) -> weft.Checkpoint:
        return weft.pack_delta(expert("rotated"), BASE, scheme="lowrank", rank=4, **how)

    with pytest.raises(Stop):
        weft.save(pack(fast=True, seed=3), tmp_path / "out", threads=1, on_event=stop)
    assert (weft.save(pack(**other), tmp_path / "out").resumed > 0) == (other == {"fast": True, "seed": 3})
    weft.save(pack(**other), tmp_path / "whole")
    assert (tmp_path / "out" / "delta.safetensors").read_bytes() == (
        tmp_path / "whole" / "delta.safetensors"
    ).read_bytes()
