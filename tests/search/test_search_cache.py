"""Inputs are read once, unchanged tensors are not computed again, and no stale value is ever given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from three_models import NAMES, RECIPE

import weft
from weft.checkpoints.base import Checkpoint
from weft.methods.merge import Merge
from weft.recipes.build import build
from weft.search.cache import Keys, Remembered, Resident, Store
from weft.search.candidates import RecipeSource
from weft.search.evaluate import Evaluator

BIG = 1 << 30


def counted(checkpoint: Checkpoint, reads: list[str]) -> Checkpoint:
    real = checkpoint.read

    def read(name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        reads.append(name)
        return real(name, *args, **kwargs)

    checkpoint.read = read  # type: ignore[method-assign]
    return checkpoint


def test_inputs_are_read_once_for_all_candidates(models: Path) -> None:
    reads: list[str] = []
    evaluator = Evaluator(RecipeSource(RECIPE), (), BIG, 1, lambda ref: counted(weft.load(ref), reads))
    for w in (0.1, 0.5, 0.9):
        made = evaluator.candidate({"models[0].parameters.weight": w}).state_dict()
        alone = weft.build(
            RECIPE.replace("model: a, parameters: {weight: 0.3}", f"model: a, parameters: {{weight: {w}}}")
        )
        assert all(torch.equal(made[n], v) for n, v in alone.state_dict().items())
    assert sorted(reads) == sorted(NAMES * 3)


def test_without_memory_the_values_are_the_same(models: Path) -> None:
    for memory in (0, 300, BIG):
        evaluator = Evaluator(RecipeSource(RECIPE), (), memory, 2)
        made = evaluator.candidate({}).state_dict()
        expected = weft.build(RECIPE).state_dict()
        assert all(torch.equal(made[n], expected[n]) for n in NAMES)
        assert evaluator.store.inputs + evaluator.store.results <= memory


def test_only_tensors_whose_parameters_changed_are_computed(models: Path) -> None:
    def curve(last: float) -> list[dict[str, Any]]:
        return [{"layers": [3, 4], "value": last}, {"value": 0.5}]

    evaluator = Evaluator(RecipeSource(RECIPE), (), BIG, 1)
    key = "models[0].parameters.weight"
    evaluator.candidate({key: curve(0.1)}).state_dict()
    before = evaluator.store.computed
    evaluator.candidate({key: curve(0.2)}).state_dict()
    assert evaluator.store.computed - before == 8 * 8 * 4  # the last block alone
    assert evaluator.store.reused == 3 * 8 * 8 * 4 + 8 * 4
    evaluator.candidate({key: curve(0.1)}).state_dict()
    assert evaluator.store.computed - before == 8 * 8 * 4


def test_a_statistic_of_the_model_makes_every_tensor_depend_on_all(models: Path) -> None:
    text = RECIPE.replace("task_arithmetic", "ties").replace(
        "{normalize: false}", "{scope: model, density: 0.5}"
    )
    evaluator = Evaluator(RecipeSource(text), (), BIG, 1)
    for density in (0.5, 0.2):
        made = evaluator.candidate({"parameters.density": density}).state_dict()
        expected = weft.build(text.replace("density: 0.5", f"density: {density}")).state_dict()
        assert all(torch.equal(made[n], expected[n]) for n in NAMES)
    assert evaluator.store.reused == 0


recipes = st.fixed_dictionaries({
    "merge_method": st.sampled_from(["ties", "dare_linear", "task_arithmetic", "breadcrumbs"]),
    "seed": st.sampled_from([0, 1]),
    "dtype": st.sampled_from([None, "bfloat16"]),
    "parameters": st.fixed_dictionaries({
        "weight": st.sampled_from([0.5, 1.0, [0.1, 0.9]]), "density": st.sampled_from([0.3, 0.7, [0.3, 0.9]]),
    }),
    "models": st.permutations(["a", "b"]),
})  # fmt: skip


@given(st.lists(recipes, min_size=2, max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shared_store_never_gives_a_stale_value(
    states: dict[str, dict[str, torch.Tensor]], tried: list[dict[str, Any]]
) -> None:
    store = Store(BIG)
    loaded = {n: weft.load(s) for n, s in states.items()}
    for data in tried:
        recipe = {k: v for k, v in data.items() if v is not None} | {"base_model": "base"}
        plain = build(recipe, loader=lambda ref: loaded[str(ref)])
        made = Remembered(plain, store).state_dict()
        again = build(recipe, loader=lambda ref: loaded[str(ref)]).state_dict()
        assert all(torch.equal(made[n], again[n]) for n in NAMES), recipe


def test_first_passes_are_not_repeated_where_nothing_before_them_changed(models: Path) -> None:
    text = RECIPE.replace("task_arithmetic", "ties").replace(
        "{normalize: false}", "{density: 0.5, scope: model}"
    )
    evaluator = Evaluator(RecipeSource(text), (), BIG, 1)
    reads: list[str] = []
    real = evaluator.load
    evaluator.load = lambda ref: counted(real(ref), reads) if ref not in seen else real(ref)  # type: ignore[method-assign]
    seen: set[Any] = set()
    counts = []
    for changed in ({}, {"models[0].parameters.weight": 0.9}, {"parameters.density": 0.2}):
        reads.clear()
        made = evaluator.candidate(changed)  # type: ignore[arg-type]
        seen |= set(evaluator._loaded)
        values = made.state_dict()
        counts.append(len(reads))
        expected = RecipeSource(text).build(changed).state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(values[n], expected[n]) for n in NAMES)
    # weights are applied after the trim, so its thresholds hold; another density needs new ones
    assert counts[1] == 3 * len(NAMES) < counts[0] and counts[2] == counts[0]


def test_keys_tell_nodes_apart_and_know_the_same_merge(states: dict[str, dict[str, torch.Tensor]]) -> None:
    base, a, b = (weft.load(states[k]) for k in ("base", "a", "b"))
    keys = Keys(Store(BIG))

    def merged(**how: Any) -> Checkpoint:
        return weft.merge([a, b], "task_arithmetic", base=base, **{"weight": 0.5, **how})

    nodes: dict[str, Checkpoint] = {
        "merge": merged(), "weight": merged(weight=0.4), "other weight": merged(weight=[0.5, 0.4]),
        "cast": merged(dtype=torch.bfloat16), "affine": base + 0.5 * (a - base), "a": a, "b": b,
        "nested": weft.merge([merged(), b], "linear"), "deeper": weft.merge([merged(weight=0.1), b], "linear"),
    }  # fmt: skip
    made = {label: keys.of(node, NAMES[0]) for label, node in nodes.items()}
    assert len(set(made.values())) == len(made)
    assert keys.of(merged(), NAMES[0]) == made["merge"]
    assert keys.of(weft.merge([merged(), b], "linear"), NAMES[0]) == made["nested"]
    assert keys.of(merged(), NAMES[1]) != made["merge"]
    assert isinstance(nodes["merge"], Merge)


def test_results_go_before_inputs_do() -> None:
    store = Store(100)
    store.keep("r1", torch.zeros(40, dtype=torch.uint8))
    store.keep("r2", torch.zeros(40, dtype=torch.uint8))
    assert store.result("r1") is not None  # used last, so it stays longest
    store.input("i", lambda: torch.zeros(50, dtype=torch.uint8))
    assert store.result("r2") is None and store.result("r1") is not None
    assert store.input("i", lambda: pytest.fail("read twice")) is not None
    store.keep("r3", torch.zeros(60, dtype=torch.uint8))
    assert store.result("r3") is None and store.inputs + store.results <= 100


def test_a_resident_model_reads_ranges_and_dtypes_as_its_source(models: Path) -> None:
    source = weft.load("a")
    kept = Resident(source, Store(BIG))
    for start, stop, dtype in ((0, None, None), (3, 17, None), (8, 9, torch.bfloat16), (0, 0, torch.float64)):
        x, y = (c.read(NAMES[0], start, stop, dtype=dtype) for c in (source, kept))
        assert x.dtype == y.dtype and torch.equal(x, y)
    with pytest.raises(weft.UsageError, match="do not lie in tensor"):
        kept.read(NAMES[0], 0, 1000)


def test_values_are_those_that_saving_writes(models: Path, loss: Callable[[Checkpoint], float]) -> None:
    text = RECIPE + "dtype: bfloat16\n"
    made = Evaluator(RecipeSource(text), (), BIG, 1).candidate({})
    weft.save(weft.build(text), models / "out")
    saved = weft.load(models / "out")
    assert all(torch.equal(made.tensor(n), saved.tensor(n)) for n in NAMES)
    assert loss(made) == loss(saved)
