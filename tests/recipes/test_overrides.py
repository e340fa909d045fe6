"""`--set key=value`."""

from __future__ import annotations

import pytest

from weft.errors import Problems, UsageError
from weft.methods.step import At
from weft.recipes import read
from weft.recipes.overrides import parse_path

TEXT = """
method: ties
base: b
models: [x, {model: y, parameters: {weight: 1}}]
"""
AT = At("model.layers.1.w", (2,), layer=1, layers=2)


def test_paths() -> None:
    assert parse_path("models[1].parameters.weight") == ("models", 1, "parameters", "weight")
    assert parse_path('parameters."trim.density"') == ("parameters", "trim.density")
    for bad in ("", "[0]", ".a", "a..b", "a[", "a[x]", "a.b c", "a]"):
        with pytest.raises(UsageError, match="--set"):
            parse_path(bad)


def test_values() -> None:
    (recipe,) = read(
        TEXT,
        ["parameters.density=[0.1, 0.3]", "models[1].parameters.weight=1e-1", "models[0].parameters.weight=2",
         "seed=5", "models[1].model=z@v1", "parameters.normalize=false"],
    )  # fmt: skip
    values = recipe.params(AT)
    assert values["density"] == 0.3 and values["weight"] == [2.0, 0.1] and values["normalize"] is False
    assert recipe.seed == 5 and recipe.models == ("x", "z@v1")


def test_later_ones_win_and_null_takes_away() -> None:
    (recipe,) = read(TEXT, ["seed=1", "seed=2", "models[1].parameters=null"])
    assert recipe.seed == 2 and recipe.params(AT)["weight"] == 1.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("paramters.density=1", "the recipe has no 'paramters'; did you mean 'parameters'"),
        ("models[2].model=a", "models has 2 items"),
        ("models[1].wieght=1", "models[1] has no 'wieght'"),
        ("models.x=1", "models is no mapping"),
        ("seed[0]=1", "seed is no list"),
        ("base.path.x=1", "base is no mapping"),
        ("[other].seed=1", "no document named 'other'"),
        ("parameters.density=[1", "did not find"),
        ("parameters.density=&a 1", "anchors"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        read(TEXT, [text])
    assert said in str(error.value) and "--set" in str(error.value)


def test_messages_about_a_changed_value_say_so() -> None:
    with pytest.raises(Problems) as error:
        read(TEXT, ["parameters.densty=0.5"])
    (problem,) = error.value.problems
    assert problem.startswith("--set, parameters.densty: ties has no parameter")
    assert "did you mean 'density'" in problem


def test_documents() -> None:
    text = "name: x\nmethod: linear\nmodels: [a]\n---\nname: y\nmethod: linear\nmodels: [x]\n"
    first, last = read(text, ["seed=1", "[x].seed=2"])
    assert (first.seed, last.seed) == (2, 1)
    first, last = read(text.replace("name: y\n", ""), ["seed=1"])
    assert (first.seed, last.seed) == (None, 1)


def test_steps_and_nested() -> None:
    text = (
        "steps: [{trim: {density: 0.1}}, weighted_sum]\nbase: {model: {path: b}}\n"
        "models: [{model: {path: m}}]\n"
    )
    (recipe,) = read(text, ["steps[0].trim.density=0.4", "models[0].model.revision=v2"])
    assert recipe.params(AT)["trim.density"] == 0.4 and str(recipe.models[0]) == "m@v2"
