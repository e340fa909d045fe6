"""Whatever a recipe holds, only weft's own errors come out."""

from __future__ import annotations

import contextlib
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.errors import WeftError
from weft.methods.registry import METHODS
from weft.methods.step import STEPS, At
from weft.recipes import check, read
from weft.recipes.mergekit import PARAMETERS, SPELLINGS
from weft.recipes.overrides import parse_path
from weft.recipes.rules import KEYS
from weft.recipes.schema import TOP
from weft.recipes.yaml import parse

len(METHODS)
WORDS = [*TOP, *SPELLINGS, *METHODS, *STEPS, *sorted(PARAMETERS), *KEYS, "model", "path", "revision", "lora",
         "sources", "layer_range", "union", "a", "b", "a+b", "a@", "x.density", "carry"]  # fmt: skip


@st.composite
def known_words(draw: Any) -> str:
    """Drawn by number, because Hypothesis prints what it samples from."""
    return WORDS[draw(st.integers(0, len(WORDS) - 1))]


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**30), st.floats(), known_words(), st.text(max_size=5)
)
KEY = st.one_of(known_words(), st.text(max_size=4))
RULE = st.fixed_dictionaries({"value": LEAVES}, optional=dict.fromkeys(KEYS[:-1], LEAVES))
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=4) | st.dictionaries(KEY, v, max_size=4), max_leaves=12
)
SETTING = st.one_of(
    LEAVES,
    st.lists(st.floats(-1, 2), max_size=4),
    st.lists(RULE, max_size=3),
)
PARAMS = st.dictionaries(
    st.sampled_from(sorted(PARAMETERS | {"scope", "tie", "row_wise"})), SETTING, max_size=4
)
MODEL = st.one_of(
    st.sampled_from(["a", "b", "c", "a+b", "n"]),
    st.fixed_dictionaries({"path": LEAVES}, optional={"revision": LEAVES}),
    VALUES,
)
ENTRY = MODEL | st.fixed_dictionaries({"model": MODEL}, optional={"parameters": PARAMS | VALUES})
RECIPE = st.fixed_dictionaries(
    {"merge_method": st.sampled_from([*SPELLINGS, *METHODS]), "models": st.lists(ENTRY, max_size=4)},
    optional={
        "base_model": MODEL, "parameters": PARAMS | VALUES, "dtype": LEAVES, "seed": LEAVES, "compat": LEAVES,
        "name": LEAVES, "tokenizer_source": MODEL, "tokenizer": VALUES, "slices": VALUES, "steps": VALUES,
    },
)  # fmt: skip
FAST = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
PLACES = [
    At("model.embed_tokens.weight", (2, 2), layers=3),
    At("model.layers.1.mlp.w", (2, 2), layer=1, layers=3),
]


def resolve(source: Any, sets: list[str] | None = None) -> None:
    with contextlib.suppress(WeftError):
        for recipe in read(source, sets or []):
            recipe.describe()
            for at in PLACES:
                with contextlib.suppress(WeftError):
                    recipe.method.pipeline(**recipe.params(at))


@FAST
@given(VALUES)
def test_any_structure(data: Any) -> None:
    resolve({"data": data} if not isinstance(data, dict) else data)


@FAST
@given(RECIPE)
def test_almost_recipes(data: dict[str, Any]) -> None:
    resolve(data)


@settings(FAST, max_examples=50)
@given(RECIPE)
def test_check_never_raises(data: dict[str, Any]) -> None:
    report = check(data)
    assert report.ok == (report.exit_status == 0)
    str(report)


@FAST
@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass"))
    )
)
def test_any_bytes(data: bytes) -> None:
    with contextlib.suppress(WeftError):
        parse(data)
    resolve(data)


@FAST
@given(st.text(alphabet="abm:- \n\t[]{}&*!|>'\"#,0.1e?%@`~<\\", max_size=60))
def test_almost_yaml(text: str) -> None:
    with contextlib.suppress(WeftError):
        parse(text)


@FAST
@given(st.text(max_size=20), st.text(alphabet='models[]0123.="a-parameters', max_size=30))
def test_overrides(value: str, path: str) -> None:
    with contextlib.suppress(WeftError):
        parse_path(path)
    resolve({"method": "linear", "models": ["a", {"model": "b"}]}, [f"{path}={value}", path])
