"""What a recipe may say, and that everything wrong with it is said at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from weft.checkpoints.dtypes import BF16
from weft.checkpoints.refs import Ref
from weft.errors import DataError, Problems, UsageError
from weft.methods.step import At
from weft.recipes import read
from weft.recipes.read import understand
from weft.recipes.recipe import Named, Recipe

AT = At("model.layers.0.mlp.up_proj.weight", (2, 2), layer=0, layers=2)


def one(text: str, **more: object) -> Recipe:
    (recipe,) = read(text + "\n", **more)  # type: ignore[arg-type]
    return recipe


def problems(text: str) -> list[str]:
    with pytest.raises(Problems) as error:
        read(text + "\n")
    return error.value.problems


def only(text: str) -> str:
    (problem,) = problems(text)
    return problem


def test_weft_keys() -> None:
    recipe = one(
        "method: ties\nbase: b\nmodels: [x, {model: y, parameters: {weight: 2}}]\n"
        "parameters: {density: 1e-1}\nseed: 7\nmissing: carry\nmismatch: carry\nnonfinite: allow\ndtype: bf16"
    )
    assert (recipe.method.name, recipe.base, recipe.models) == ("ties", "b", ("x", "y"))
    assert recipe.params(AT)["weight"] == [1.0, 2.0] and recipe.params(AT)["density"] == 0.1
    assert (recipe.seed, recipe.missing, recipe.mismatch, recipe.nonfinite) == (7, "carry", "carry", "allow")
    assert recipe.dtype == BF16


def test_all_problems_at_once() -> None:
    found = problems(
        "merge_method: ties\n"
        "base_model: b\n"
        "dtpye: bfloat16\n"
        "models:\n"
        "  - model: x\n"
        "    parmeters: {density: 0.1}\n"
        "  - model: [y]\n"
        "seed: many"
    )
    assert [f.split(":")[0] for f in found] == [
        "line 6, models[0].parmeters", "line 7, models[1].model", "line 8, seed", "line 3, dtpye",
    ]  # fmt: skip
    assert "did you mean 'parameters'" in found[0] and "did you mean 'dtype'" in found[3]


def test_all_meanings_at_once() -> None:
    found = problems(
        "merge_method: ties\n"
        "models:\n"
        "  - model: x\n"
        "    parameters: {density: 1.5, densty: 1}\n"
        "  - model: a+b+c\n"
        "parameters:\n"
        "  elect: [mass, cuont]\n"
        "dtype: int3\n"
        "base_model: x@\n"
    )
    text = "\n".join(found)
    assert "line 9, base_model" in text and "line 5, models[1].model" in text and "line 8, dtype" in text
    found = problems(
        "merge_method: ties\n"
        "models:\n"
        "  - model: x\n"
        "    parameters: {density: 1.5, densty: 1}\n"
        "parameters:\n"
        "  elect: [mass, cuont]\n"
        "  normalize:\n"
        "    - {filter: a, value: 3}\n"
    )
    assert len(found) == 5
    said = "models[0].parameters.densty: ties has no parameter 'densty'; did you mean 'density'?"
    assert f"line 4, {said}" in found
    assert "line 4, models[0].parameters.density: density must be float in [0, 1], not 1.5" in found
    assert any("parameters.elect[1]" in f for f in found)
    assert any("parameters.normalize[0].value" in f for f in found)
    assert any("needs base_model" in f for f in found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: tis\nmodels: [a]", "did you mean 'ties'"),
        ("models: [a]", "merge_method is missing"),
        ("merge_method: linear", "models is missing"),
        ("merge_method: linear\nmethod: linear\nmodels: [a]", "exclude each other"),
        ("merge_method: linear\nmodels: []", "models: list should have at least 1 item"),
        ("merge_method: linear\nmodels: [a]\nmodules: {}", "exclude each other"),
        ("merge_method: linear\nmodules: {text: {modls: [a]}}", "did you mean 'models'"),
        ("merge_method: linear\nmodules: {}", "at least one part"),
        ("merge_method: linear\nmodules: {text: {parameters: {weight: 1}}}", "models is missing"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [2, 2]}]}]", "[first, end)"),
        ("merge_method: linear\nmodels: [a]\nbase: a\nbase_model: b", "two names of one key"),
        ("merge_method: slerp\nmodels: [a, b, c]", "slerp merges 2 models, got 3"),
        ("merge_method: slerp\nmodels: [a, b]\nbase_model: c", "list both"),
        ("merge_method: nuslerp\nmodels: [a, b]\nbase_model: b", "third model"),
        ("merge_method: task_arithmetic\nmodels: [a]", "needs base_model"),
        ("merge_method: nearswap\nmodels: [a]\nbase_model: b", "nearswap needs t"),
        ("method: linear\nmodels: [{model: a, parameters: {normalize: true}}]", "move it"),
        ("method: linear\nmodels: [a]\nparameters: {density: 0.5}", "linear has no parameter 'density'"),
        ("merge_method: linear\nmodels: [a]\nparameters: {densitee: 0.5}", "linear has no parameter"),
        ("merge_method: linear\nmodels: [a, {model: b, parameters: {weight: -1}}]", "sum to zero"),
        ("merge_method: task_arithmetic\nmodels: [a]\nbase: b\nparameters: {lambda: 1, scale: 1}",
         "given twice"),
        ("merge_method: linear\nmodels: [a]\ndtype: int64", "dtype"),
        ("merge_method: linear\nmodels: [a]\ncompat: mergkit", "must be 'mergekit'"),
        ("merge_method: linear\nmodels: [a]\nname: 3", "must be text, not 3; quote it"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {sorce: a}}}", "did you mean 'source'"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {source: 3}}}", "must be a model, or"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {source: {kind: one}}}}", "'model_token' or"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {source: {kind: model_token, model: a}}}}",
         "either token or token_id"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {tokens: {x: {source: {kind: zero, token: y}}}}",
         "takes no model and no token"),
        ("merge_method: linear\nmodels: [a]\ntokenizer: {pad_to_multiple_of: 0}", "greater than or equal to 1"),
        ("merge_method: linear\nmodels: [a]\ntokenizer_source: base", "no base_model"),
        ("merge_method: linear\nmodels: [a]\ntokenizer_source: a\ntokenizer: {source: a}",
         "exclude each other"),
        ("merge_method: linear\nmodels: [{model: {method: linear, models: [a], name: n}}]", "has no name"),
        ("merge_method: linear\nmodels: [{model: {merge_method: liner, models: [a]}}]",
         "models[0].model.merge_method: there is no method"),
        ("merge_method: linear\nmodels: [{model: {model: a+b, lora: c}}]", "names an adapter already"),
        ("- a\n- b", "a recipe is a mapping"),
        ("steps: [tirm]\nbase: b\nmodels: [a]", "did you mean 'trim'"),
        ("steps: [trim]\nbase: b\nmodels: [a]", "leave the models apart"),
        ("steps: [weighted_sum, trim]\nbase: b\nmodels: [a]", "has merged them"),
        ("steps: [{trim: {densty: 1}}, weighted_sum]\nbase: b\nmodels: [a]", "did you mean 'density'"),
        ("steps: [{trim: 3}, weighted_sum]\nbase: b\nmodels: [a]", "must be a mapping of parameters"),
        ("steps: [{trim: {}, elect_sign: {}}, weighted_sum]\nbase: b\nmodels: [a]", "must be a step's name"),
        ("steps: [weighted_sum]\nmodels: [a]", "needs base_model"),
        ("steps: [{trim: {density: 2}}, weighted_sum]\nbase: b\nmodels: [a]", "steps[0].trim.density"),
    ],
)  # fmt: skip
def test_one_problem(text: str, said: str) -> None:
    found = problems(text)
    assert any(said in f for f in found), found
    assert all("\n" not in f and "pydantic" not in f for f in found)


def test_base_among_the_models_is_left_out() -> None:
    recipe = one("merge_method: ties\nbase_model: b\nmodels: [a, b, c]")
    assert recipe.models == ("a", "c") and recipe.base == "b"
    assert "left out" in recipe.notes[0]


def test_base_of_a_method_without_base() -> None:
    recipe = one("merge_method: linear\nbase_model: b\nmodels: [a, c]")
    assert recipe.models == ("a", "c") and recipe.base is None and recipe.config_from == "b"
    assert "weights only if it is listed" in recipe.notes[0]
    listed = one("merge_method: linear\nbase_model: c\nmodels: [a, c]")
    assert listed.models == ("a", "c") and listed.config_from == "c" and not listed.notes
    assert one("method: karcher\nbase: b\nmodels: [a, c]").base == "b"
    assert one("merge_method: karcher\nbase_model: b\nmodels: [a, c]").base is None


def test_slerp_begins_at_the_base() -> None:
    assert one("merge_method: slerp\nbase_model: b\nmodels: [a, b]").models == ("b", "a")
    assert one("merge_method: slerp\nbase_model: b\nmodels: [a]").models == ("b", "a")
    recipe = one("merge_method: slerp\nmodels: [a, b]")
    assert recipe.models == ("a", "b") and "t = 0 gives the first" in recipe.notes[0]


def test_twice_counts_twice() -> None:
    recipe = one("merge_method: linear\nmodels: [a, a, b]")
    assert recipe.models == ("a", "a", "b") and "counts twice" in recipe.notes[0]


def test_references() -> None:
    recipe = one(
        "merge_method: linear\nmodels:\n"
        "  - model: {path: org/m@x, revision: main}\n"
        "  - model: {model: {path: org/m, revision: v1}, lora: {path: org/l}}\n"
        "  - model: {model: org/m@v2, lora: org/l@v3}\n"
        "  - model: org/m@v1+org/l\n"
    )
    m = Ref("org/m", "v1", Ref("org/l"))
    assert recipe.models[0] == Ref("org/m@x", "main")
    assert recipe.models[1] == m
    assert recipe.models[2] == Ref("org/m", "v2", Ref("org/l", "v3"))
    assert "counts twice" in recipe.notes[0]  # the last is the second, written otherwise


def test_steps_with_schedules() -> None:
    recipe = one(
        "steps:\n  - trim: {density: [0.2, 0.4]}\n  - elect_sign\n  - disjoint_mean\n"
        "  - scaled: {scale: 0.5}\n  - scaled: {scale: 2}\n"
        "base: b\nmodels:\n  - {model: x, parameters: {weight: 2}}\n"
        "  - {model: y, parameters: {trim.density: 1}}\n"
    )
    last = At("model.layers.1.x", (4,), layer=1, layers=2)
    params = recipe.params(last)
    assert params["trim.density"] == [0.4, 1.0]
    assert params["elect_sign.weight"] == params["disjoint_mean.weight"] == [2.0, 1.0]
    assert (params["scaled.scale"], params["scaled2.scale"]) == (0.5, 2.0)
    pipeline = recipe.method.pipeline(**params)
    names = [b.step.name for b in pipeline.steps]
    assert names == ["trim", "elect_sign", "disjoint_mean", "scaled", "scaled"]
    x, y = torch.tensor([1.0, -2.0, 3.0, 4.0]), torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert pipeline([x, y]).tolist() == pytest.approx([1.0, 1.0, 1.0, 3.0])


def test_nested_recipes_and_names() -> None:
    first, last = read(
        "name: math\nmerge_method: linear\nmodels: [a, b]\ndtype: float32\n---\n"
        "merge_method: slerp\nmodels:\n  - model: math\n"
        "  - model: {method: task_arithmetic, base: c, models: [d]}\nparameters: {t: 0.5}\n"
    )
    assert last.models[0] == Named("math") and last.documents["math"] is first
    inner = last.models[1]
    assert isinstance(inner, Recipe) and inner.method.name == "task_arithmetic" and inner.base == "c"


def test_documents() -> None:
    text = "\n---\n".join(
        ["name: a\nmethod: linear\nmodels: [b]", "name: b\nmethod: linear\nmodels: [c]",
         "name: c\nmethod: linear\nmodels: [{model: {method: linear, models: [a]}}]"]
    )  # fmt: skip
    assert only(text) == "'a' is merged from itself: a → b → c → a"
    assert "two documents named 'x'" in "\n".join(
        problems("name: x\nmethod: linear\nmodels: [b]\n---\nname: x\nmethod: linear\nmodels: [b]")
    )
    assert "only one document may have no name" in "\n".join(
        problems("method: linear\nmodels: [b]\n---\nmethod: linear\nmodels: [b]")
    )
    found = only("name: x\nmethod: linear\nmodels: [b]\n---\nname: y\nmethod: linar\nmodels: [b]")
    assert found.startswith("document 2 (y), line 6, method: ")


def test_slices() -> None:
    whole = (
        "slices:\n  - sources:\n    - {model: a, layer_range: [0, 4]}\n"
        "    - {model: b, layer_range: [0, %d]}\n"
    )
    recipe = one("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n" + whole % 4)
    assert recipe.models == ("a", "b") and recipe.slices[0].ranges == ((0, 4), (0, 4))
    assert "as many layers each, not 4, 3" in only("merge_method: slerp\nbase_model: a\n" + whole % 3)
    no_range = "slices: [{sources: [{model: a}, {model: b}], parameters: {t: 0.25}}]"
    recipe = one("merge_method: slerp\nparameters: {t: 0.5}\n" + no_range)
    assert not recipe.slices and recipe.params(AT)["t"] == 0.25


def test_scope_follows_a_varying_density() -> None:
    recipe = one("method: ties\nbase: b\nmodels: [a]\nparameters: {density: [0.1, 0.9]}")
    assert recipe.params(AT)["scope"] == "tensor" and "density varies" in " ".join(recipe.notes)
    said = only("method: ties\nbase: b\nmodels: [a]\nparameters: {density: [0.1, 0.9], scope: model}")
    assert "density cannot vary" in said
    recipe = one("method: ties\nbase: b\nmodels: [a]\nparameters: {weight: [0.1, 0.9]}")
    assert recipe.params(AT)["scope"] == "model"


def test_a_list_is_a_curve_and_says_so() -> None:
    recipe = one("method: linear\nmodels: [a, b]\nparameters: {weight: [0.1, 0.9]}")
    assert recipe.params(AT)["weight"] == 0.1
    assert "curve over the blocks" in recipe.notes[0]


def test_tokenizer() -> None:
    assert one("method: linear\nmodels: [a, b]\ntokenizer_source: b").tokenizer_from == "b"
    assert one("method: linear\nmodels: [a, b]\ntokenizer: {source: union}").tokenizer_from == "union"
    recipe = one("method: ties\nbase: b\nmodels: [a]\ntokenizer_source: base\nchat_template: auto")
    assert recipe.tokenizer_from is None and recipe.tokenizer is not None and recipe.tokenizer.source == "b"
    assert recipe.chat_template == "auto" and recipe.describe()["tokenizer"] == {"source": "base"}
    assert one("method: linear\nmodels: [a]\ntokenizer: {pad_to_multiple_of: 8}").tokenizer_from == "union"
    rows = (
        "{x: {source: c}, y: {source: {kind: zero}}, z: {source: {kind: model_token, model: d, token_id: 3}}}"
    )
    recipe = one(f"method: linear\nmodels: [a, b]\ntokenizer: {{source: a, tokens: {rows}}}")
    assert recipe.references == ("a", "b", "c", "d")


def test_out_dtype_wins() -> None:
    assert one("method: linear\nmodels: [a]\ndtype: float32\nout_dtype: bfloat16").dtype == BF16


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text("method: linear\nmodels: [a]")
    assert read(path)[0].models == read(str(path))[0].models == ("a",)
    assert read({"method": "linear", "models": ["a"]})[0].models == ("a",)
    assert read("{method: linear, models: [a]}")[0].models == ("a",)
    with pytest.raises(UsageError, match=r"did you mean 'mine\.yml'"):
        read(tmp_path / "mime.yml")
    with pytest.raises(UsageError, match="is a folder"):
        read(tmp_path)
    with pytest.raises(UsageError, match="is empty"):
        read("\n# nothing\n")
    with pytest.raises(DataError, match="no regular file"):
        read("/dev/zero")
    with pytest.raises(UsageError):
        read("no\0path")


def test_data_made_in_python() -> None:
    data = {"method": "linear", "models": ({"model": Path("a")}, "b"), "parameters": {"weight": 1}}
    (recipe,) = read(data, ["parameters.weight=2"])
    assert recipe.models == ("a", "b") and recipe.params(AT)["weight"] == 2
    assert data["parameters"] == {"weight": 1}
    circular: dict[str, object] = {"method": "linear"}
    circular["models"] = [{"model": circular}]
    with pytest.raises(UsageError, match="nested more than"):
        read(circular)
    with pytest.raises(UsageError, match="keys of a recipe are text, not 3"):
        read({"method": "linear", "parameters": {3: 4}})


def test_what_is_right_is_understood_beside_what_is_not() -> None:
    reading = understand("name: x\nmethod: linear\nmodels: [b]\n---\nname: y\nmethod: linar\nmodels: [b]\n")
    assert [r.name for r in reading.recipes] == ["x"] and len(reading.problems) == 1
