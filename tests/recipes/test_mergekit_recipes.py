"""Recipes as people publish them for MergeKit, run unchanged: each resolves to the values it means."""

from __future__ import annotations

from typing import Any

import pytest

from weft.checkpoints.dtypes import F16
from weft.methods.registry import METHODS
from weft.methods.step import At
from weft.recipes import read
from weft.recipes.mergekit import SPELLINGS, differences
from weft.recipes.recipe import Named, Recipe

LAYERS = 9


def at(name: str, layer: int | None = None) -> At:
    return At(name if layer is None else f"model.layers.{layer}.{name}", (4, 4), layer=layer, layers=LAYERS)


ATTN, MLP = "self_attn.q_proj.weight", "mlp.up_proj.weight"
EMBED, HEAD = at("model.embed_tokens.weight"), at("lm_head.weight")


def one(text: str) -> Recipe:
    (recipe,) = read(text)
    recipe.method.pipeline(**recipe.params(HEAD))
    return recipe


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_method_of_mergekit_is_known(name: str) -> None:
    spelling = SPELLINGS[name]
    method = METHODS[spelling.method]
    assert set(spelling.rename.values()) <= set(method.params)
    assert set(method.compat.get("mergekit", {})) <= set(method.params)


def test_linear() -> None:
    recipe = one("""
models:
  - model: org/writer-7b
    parameters:
      weight: 1.0
  - model: org/coder-7b
    parameters:
      weight: 0.3
merge_method: linear
dtype: float16
""")
    assert recipe.models == ("org/writer-7b", "org/coder-7b") and recipe.base is None
    assert recipe.params(HEAD) == {"weight": [1.0, 0.3], "normalize": True}
    assert recipe.dtype == F16
    assert differences(recipe) == [
        "sums are taken in float32 at least and rounded to float16 once; MergeKit computes in float16"
    ]


SLERP = """
slices:
  - sources:
      - model: org/alpha-7b
        layer_range: [0, 9]
      - model: org/beta-7b
        layer_range: [0, 9]
merge_method: slerp
base_model: org/alpha-7b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for rest of tensors
dtype: bfloat16
"""


def test_slerp_with_filters() -> None:
    recipe = one(SLERP)
    assert recipe.models == ("org/alpha-7b", "org/beta-7b")
    t = [recipe.params(at(ATTN, i))["t"] for i in range(LAYERS)]
    assert t == pytest.approx([0, 0.25, 0.5, 0.4, 0.3, 0.5, 0.7, 0.85, 1])
    assert recipe.params(at(MLP, 2))["t"] == 0.5
    assert recipe.params(at("input_layernorm.weight", 2))["t"] == recipe.params(HEAD)["t"] == 0.5
    assert recipe.params(HEAD)["linear_above"] == 1.0
    assert any("linear_above" in d for d in differences(recipe))


def test_slerp_reproducing_mergekit() -> None:
    recipe = one(SLERP + "compat: mergekit\n")
    assert recipe.params(HEAD)["linear_above"] == 0.9995
    assert not any("linear_above" in d or "curves" in d for d in differences(recipe))


def test_slerp_outside_the_blocks() -> None:
    text = "merge_method: slerp\nbase_model: b\nmodels: [{model: a}, {model: b}]\nparameters: {t: [0, 1]}\n"
    assert one(text).models == ("b", "a")
    assert (one(text).params(EMBED)["t"], one(text).params(HEAD)["t"]) == (0, 1)
    assert any("curves" in d for d in differences(one(text)))
    quirk = one(text + "compat: mergekit\n")
    assert (quirk.params(EMBED)["t"], quirk.params(HEAD)["t"], quirk.params(at(MLP, 8))["t"]) == (0, 0, 1)


TIES = """
models:
  - model: org/base-13b
    # no parameters necessary for base model
  - model: org/chat-13b
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: org/math-13b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: org/code-13b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base-13b
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""


def test_ties_with_gradients() -> None:
    recipe = one(TIES)
    assert recipe.base == "org/base-13b" and len(recipe.models) == 3
    values = recipe.params(at(MLP, 4))
    assert values["density"] == pytest.approx([0.7, 0.5, 0.33])
    assert values["weight"] == pytest.approx([1, 0.5, 0.5])
    assert recipe.params(at(ATTN, 8))["weight"] == [1, 1, 0]
    assert (values["scope"], values["tie"]) == ("tensor", "none")  # per tensor, as the density varies
    assert any("tie is 'none'" in d for d in differences(recipe))
    assert any("int8_mask" in n for n in recipe.notes)


def test_ties_reproducing_mergekit() -> None:
    recipe = one(TIES + "compat: mergekit\n")
    assert recipe.params(HEAD)["tie"] == "plus" and recipe.params(HEAD)["density"] == [1, 0.5, 0.33]
    assert recipe.params(HEAD)["weight"] == [1, 0, 0]
    assert [d for d in differences(recipe) if d.startswith("ties")] == []


def deltas(method: str, shared: str = "", compat: str = "") -> Recipe:
    return one(f"""
models:
  - model: org/base
  - model: org/one
    parameters:
      density: 0.53
      weight: 0.4
  - model: org/two
    parameters:
      density: 0.47
      weight: -0.3
merge_method: {method}
base_model: org/base
parameters: {{int8_mask: true{shared}}}
dtype: bfloat16
{compat}""")


def test_dare_ties() -> None:
    recipe = deltas("dare_ties")
    values = recipe.params(HEAD)
    assert (values["density"], values["weight"], values["rescale"]) == ([0.53, 0.47], [0.4, -0.3], "inverse")
    assert values["normalize"] is True
    theirs = deltas("dare_ties", ", rescale: true", "compat: mergekit\n").params(HEAD)
    assert (theirs["rescale"], theirs["tie"], theirs["normalize"]) == ("l1", "plus", False)
    assert deltas("dare_ties", ", rescale: false").params(HEAD)["rescale"] == "none"


def test_dare_linear() -> None:
    recipe = deltas("dare_linear", ", lambda: 0.9")
    assert recipe.method is METHODS["dare"] and recipe.params(HEAD)["scale"] == 0.9
    assert any("another draw" in d for d in differences(recipe))


def test_della_with_lambda() -> None:
    values = deltas("della", ", epsilon: 0.1, lambda: 1.1").params(HEAD)
    assert (values["epsilon"], values["scale"]) == (0.1, 1.1)
    assert deltas("della_linear", "", "compat: mergekit\n").params(HEAD)["epsilon"] == 0.15


def test_breadcrumbs() -> None:
    values = deltas("breadcrumbs", ", gamma: 0.02, lambda: 1").params(HEAD)
    assert (values["gamma"], values["density"], values["scale"]) == (0.02, [0.53, 0.47], 1)
    assert deltas("breadcrumbs_ties", ", gamma: 0.02").method.name == "breadcrumbs_ties"


def test_task_arithmetic() -> None:
    recipe = deltas("task_arithmetic", ", normalize: false, rescale: true")
    assert recipe.params(HEAD) == {"weight": [0.4, -0.3], "scale": 1.0, "normalize": False}
    notes = " ".join(recipe.notes)
    assert "ignored: task_arithmetic has no parameter 'density'" in notes and "L1 norm" in notes


def test_model_stock() -> None:
    recipe = one("""
models:
  - model: org/base
  - model: org/a
  - model: org/b
  - model: org/c
merge_method: model_stock
base_model: org/base
parameters:
  filter_wise: true
  normalize: true
dtype: bfloat16
""")
    assert recipe.models == ("org/a", "org/b", "org/c") and recipe.params(HEAD)["row_wise"] is True


@pytest.mark.parametrize(
    ("shared", "row_wise"),
    [("", False), ("nuslerp_row_wise: true", False), ("nuslerp_flatten: false", True),
     ("nuslerp_flatten: true\n  nuslerp_row_wise: true", False), ("row_wise: true", True)],
)  # fmt: skip
def test_nuslerp(shared: str, row_wise: bool) -> None:
    recipe = one(f"""
merge_method: nuslerp
base_model: org/base
models:
  - model: org/a
    parameters: {{weight: [0.8, 0.2]}}
  - model: org/b
    parameters: {{weight: 1}}
parameters:
  int8_mask: false
  {shared}
""")
    assert recipe.base == "org/base"
    expected = {"weight": [0.5, 1.0], "row_wise": row_wise, "column_wise": False}
    assert recipe.params(at(MLP, 4)) == expected


def test_karcher() -> None:
    recipe = one("""
models:
  - model: org/a
  - model: org/b
  - model: org/c
merge_method: karcher
parameters:
  max_iter: 1000
  tol: 1e-9
dtype: bfloat16
tokenizer_source: org/a
""")
    assert recipe.params(HEAD)["max_iter"] == 1000 and recipe.params(HEAD)["tol"] == 1e-9
    assert recipe.tokenizer_from == "org/a"


@pytest.mark.parametrize(
    ("method", "parameters", "expected"),
    [
        ("sce", "select_topk: 0.1", {"select_topk": 0.1}),
        ("ram", "epsilon: 1e-5", {"epsilon": 1e-5}),
        ("ramplus_tl", "r: 0.2\n  alpha: 0.1", {"r": 0.2, "alpha": 0.1}),
        ("multislerp", "eps: 1e-8\n  normalize_weights: true", {"weight": 1.0}),
    ],
)
def test_others(method: str, parameters: str, expected: dict[str, Any]) -> None:
    recipe = one(f"""
merge_method: {method}
base_model: org/base
models: [{{model: org/base}}, {{model: org/a}}, {{model: org/b}}]
parameters:
  {parameters}
dtype: bfloat16
""")
    assert recipe.models == ("org/a", "org/b")
    assert expected.items() <= recipe.params(HEAD).items()


@pytest.mark.parametrize(("method", "parameters"), [("nearswap", "{t: 1e-4}"), ("arcee_fusion", "{}")])
def test_two_models(method: str, parameters: str) -> None:
    models = "base_model: b\nmodels: [{model: b}, {model: a}]\n"
    recipe = one(f"merge_method: {method}\n{models}parameters: {parameters}")
    assert (recipe.base, recipe.models) == ("b", ("a",))


def test_passthrough() -> None:
    recipe = one("merge_method: passthrough\nmodels: [{model: a+lora}]\nparameters:\n  scale: null\n")
    assert recipe.params(HEAD) == {"scale": 1.0}


def test_parameters_of_other_methods_are_let_pass_in_mergekit_s_dialect() -> None:
    recipe = one("""
merge_method: slerp
base_model: a
models:
  - model: a
    parameters: {weight: 0.5}
  - model: b
    parameters: {t: 0.3}
parameters: {t: 0.5, normalize: true}
""")
    assert recipe.params(HEAD)["t"] == 0.5 and len(recipe.notes) == 3


def test_many_documents() -> None:
    recipes = read("""
name: instruct
merge_method: task_arithmetic
base_model: org/base
models:
  - model: org/base
  - model: org/instruct
    parameters: {weight: 0.6}
dtype: float32
---
name: coder
merge_method: linear
models:
  - model: org/code-a
    parameters: {weight: 0.5}
  - model: org/code-b
    parameters: {weight: 0.5}
---
merge_method: slerp
base_model: instruct
models:
  - model: instruct
  - model: coder
parameters: {t: 0.4}
dtype: bfloat16
""")
    assert [r.name for r in recipes] == ["instruct", "coder", None]
    assert recipes[2].models == (Named("instruct"), Named("coder"))
