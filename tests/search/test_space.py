"""Spaces: what a point means, how it is sampled, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.errors import Problems, UsageError
from weft.recipes.yaml import parse
from weft.search.candidates import RecipeSource, as_yaml
from weft.search.file import parse_space
from weft.search.space import Axis, Simplex, numbers

RECIPE = {
    "merge_method": "linear",
    "models": [{"model": m, "parameters": {"weight": 1.0}} for m in "abc"],
}
SOURCE = RecipeSource(RECIPE)


def space(raw: dict[str, Any]) -> Any:
    return parse_space(raw, SOURCE)


def test_a_star_stands_for_every_model() -> None:
    made = space({"models[*].parameters.weight": {"low": 0, "high": 1}})
    assert made.paths == tuple(f"models[{i}].parameters.weight" for i in range(3))


def test_dots_before_numbers_are_positions() -> None:
    made = space({"models.1.parameters.weight": {"low": 0, "high": 1}})
    assert made.paths == ("models[1].parameters.weight",)


def test_a_star_in_a_named_document() -> None:
    text = (
        b"name: one\nmerge_method: linear\nmodels: [a, b]\n---\nmerge_method: linear\nmodels: [one, c, d]\n"
    )
    source = RecipeSource(text)
    assert source.expand("[one].models[*].model") == ["[one].models[0].model", "[one].models[1].model"]
    assert len(source.expand("models[*].model")) == 3


def test_a_curve_is_a_list_and_a_number_is_not() -> None:
    made = space(
        {"parameters.t": {"low": 0, "high": 1, "curve": 3}, "seed": {"low": 0, "high": 9, "int": True}}
    )
    raw = made.at(0.5)
    assert made.decode(raw) == {"parameters.t": [0.5, 0.5, 0.5], "seed": raw["seed"]}
    assert isinstance(raw["seed"], int)


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_shares_are_on_the_simplex_and_come_back(u: list[float]) -> None:
    d = Simplex("s", tuple("abcde"))
    raw = dict(zip((a.name for a in d.axes), u, strict=True))
    shares = d.decode(raw)
    assert sum(shares.values()) == pytest.approx(1.0) and min(shares.values()) >= 0
    again = d.decode(d.encode(shares))
    assert list(again.values()) == pytest.approx(list(shares.values()), abs=1e-6)


def test_uniform_axes_give_uniform_points_on_the_simplex() -> None:
    d = Simplex("s", tuple("abcd"))
    u = np.random.default_rng(0).random((20_000, 3))
    points = np.array([list(d.decode({f"s@{i}": x for i, x in enumerate(row)}).values()) for row in u])
    # each share of a uniform point is Beta(1, 3): mean 1/4, variance 3/80, pairwise covariance −1/80
    assert points.mean(0) == pytest.approx(np.full(4, 0.25), abs=0.005)
    expected = np.full((4, 4), -1 / 80) + np.eye(4) * (3 / 80 + 1 / 80)
    assert np.cov(points.T) == pytest.approx(expected, abs=0.002)


@given(st.floats(0, 1), st.booleans(), st.booleans(), st.sampled_from([None, 1, 3]))
def test_the_unit_interval_maps_into_the_axis(u: float, log: bool, integer: bool, step: int | None) -> None:
    axis = Axis("x", 2, 60, log, integer, None if log else step)
    value = axis.from_unit(u)
    assert 2 <= value <= 60 and (not integer or isinstance(value, int))
    assert axis.from_unit(axis.to_unit(value)) == pytest.approx(value)
    if step and not log:
        assert (value - 2) / step == pytest.approx(round((value - 2) / step))


def test_a_logarithmic_axis_is_even_in_the_logarithm() -> None:
    axis = Axis("x", 1e-4, 1.0, log=True)
    assert axis.from_unit(0.5) == pytest.approx(1e-2)
    assert [math.log10(v) for v in axis.grid()] == pytest.approx(np.linspace(-4, 0, 11))


def test_a_grid_is_ascending_and_has_each_setting_once() -> None:
    made = space({
        "merge_method": ["linear", "slerp"],
        "parameters.t": {"low": 0, "high": 0.3, "step": 0.1, "when": {"merge_method": "slerp"}},
    })  # fmt: skip
    settings = [made.decode(raw) for raw in made.grid()]
    assert settings == [{"merge_method": "linear"}] + [
        {"merge_method": "slerp", "parameters.t": t} for t in (0.0, 0.1, 0.2, 0.3)
    ]


def test_too_large_a_grid_is_refused() -> None:
    with pytest.raises(UsageError, match="too many"):
        space({"models[*].parameters.weight": {"low": 0, "high": 1, "curve": 4}}).grid()


def test_start_values_are_points_or_refused() -> None:
    made = space({"parameters.t": {"low": 0, "high": 1, "curve": 2}, "merge_method": ["linear", "slerp"]})
    assert made.encode({"parameters.t": 0.3}) == {"parameters.t@0": 0.3, "parameters.t@1": 0.3}
    assert made.encode({"merge_method": "slerp"}) == {"merge_method": "slerp"}
    for settings, said in (
        ({"parameters.t": 2}, r"in \[0, 1\]"), ({"parameters.t": [0, 1, 0]}, "2 numbers"),
        ({"merge_method": "ties"}, "one of linear, slerp"), ({"parameters.s": 1}, "did you mean 'parameters.t'"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            made.encode(settings)


@pytest.mark.parametrize(("raw", "said"), [
    ({"a": {"low": 1, "high": 0}}, "must be below high"),
    ({"a": {"low": 0, "high": 1, "log": True}}, "must be positive with log"),
    ({"a": {"low": 0, "high": 1, "stp": 1}}, "did you mean 'step'"),
    ({"a": {"low": 0, "high": 1, "choices": [1]}}, "only one of them"),
    ({"a": {"low": 0}}, "must have low and high"),
    ({"a": {"low": "x", "high": 1}}, "must be a number"),
    ({"a": {"low": 0.5, "high": 2, "int": True}}, "whole numbers"),
    ({"a": {"low": 0, "high": 1, "step": 2}}, "no longer than the range"),
    ({"a": {"low": 0, "high": 1, "curve": 1}}, "from 2 on"),
    ({"a": [1, 1]}, "different values"),
    ({"a": {"simplex": ["x"]}}, "two different keys"),
    ({"parameters[*].x": {"low": 0, "high": 1}}, "is no list in the recipe"),
    ({"a": {"low": 0, "high": 1, "when": {"b": 1}}}, "no choice of this space"),
    ({"m": ["x", "y"], "a": {"low": 0, "high": 1, "when": {"m": "z"}}}, "none of its values"),
    ({"models[0].model": ["a"], "models.0.model": ["b"]}, "varied twice"),
    ({"a": 3}, r"must be \{low, high\}"),
    ({}, "not be empty"),
])  # fmt: skip
def test_what_a_space_cannot_be(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(Problems, match=said):
        space(raw)


def test_all_problems_come_at_once() -> None:
    with pytest.raises(Problems) as caught:
        space({"a": {"low": 1, "high": 0}, "b": {"lo": 1}, "c": [1, 1]})
    assert len(caught.value.problems) >= 3


words = st.text(st.characters(codec="utf-8", exclude_categories=("C",)), max_size=12) | st.sampled_from(
    [
        "1e-5",
        "010",
        "yes",
        "null",
        "1:30",
        "2001-01-01",
        "~",
        "-",
        "0x1f",
        ".5",
        "a: b",
        "#c",
        "[x]",
        "*a",
        "&b",
        "!c",
    ]
)
leaves = (
    words
    | st.integers(-(10**9), 10**9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.none()
)


@given(
    st.recursive(
        leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(words, x, max_size=3), max_leaves=8
    )
)
def test_yaml_reads_back_as_it_was(data: Any) -> None:
    (document,) = parse(as_yaml({"key": data}))
    assert document.data == {"key": data}


def test_numbers_name_their_axes_after_the_path() -> None:
    assert [a.name for a in numbers("p", 0, 1, curve=2).axes] == ["p@0", "p@1"]
