"""From a recipe to one lazy graph."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from weft.checkpoints.base import Asset, Checkpoint
from weft.checkpoints.lazy import Cast
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.checkpoints.refs import Ref
from weft.errors import DataError, UsageError
from weft.methods.merge import Merge
from weft.recipes import build, read

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.mlp.w.weight",
    "model.layers.1.mlp.w.weight",
    "lm_head.weight",
]


def asset(name: str, data: bytes) -> Asset:
    return Asset(name, lambda: data)


class Library:
    """Models by name: all tensors of model `a` are 1, of `b` 2, and so on. Counts what it is asked for."""

    def __init__(self, vocabularies: dict[str, Any] | None = None) -> None:
        self.asked: list[str] = []
        self.vocabularies = vocabularies or {}

    def __call__(self, source: Any) -> Checkpoint:
        key = source.path if isinstance(source, Ref) else source
        self.asked.append(key)
        value = float(ord(key[-1]) - ord("a") + 1)
        weights = StateDict({n: torch.full((2, 3), value) for n in NAMES}, origin=key)
        words = self.vocabularies.get(key, {"hi": 0})
        tokenizer = json.dumps({"model": {"vocab": words}, "added_tokens": []}).encode()
        generation = json.dumps({"of": key}).encode()
        files = (asset("tokenizer.json", tokenizer), asset("generation_config.json", generation))
        return Model(weights, {"of": key}, files, key)


def values(node: Checkpoint) -> list[float]:
    return [float(node.tensor(n).mean()) for n in NAMES]


def make(text: str, library: Library | None = None, **more: Any) -> Checkpoint:
    return build(text + "\n", loader=library or Library(), **more)


def test_linear() -> None:
    node = make("method: linear\nmodels: [a, {model: c, parameters: {weight: 3}}]")
    assert isinstance(node, Merge) and values(node) == [2.5] * 4


def test_values_by_layer() -> None:
    node = make("method: slerp\nmodels: [a, c]\nparameters: {t: [0, 1]}")
    assert values(node) == pytest.approx([1, 1, 3, 3])
    assert values(
        make("method: slerp\nmodels: [a, c]\nparameters: {t: [0, 1]}\ncompat: mergekit")
    ) == pytest.approx([1, 1, 3, 1])


def test_base_and_dtype() -> None:
    node = make("merge_method: task_arithmetic\nbase_model: a\nmodels: [a, b, d]\ndtype: bfloat16")
    assert isinstance(node, Cast) and node.info(NAMES[0]).dtype is torch.bfloat16
    assert values(node) == [5.0] * 4


def test_steps() -> None:
    node = make("steps: [weighted_sum, {scaled: {scale: [0, 1]}}]\nbase: a\nmodels: [b, c]")
    assert values(node) == pytest.approx([1, 1, 4, 4])


def test_nested_recipes_are_one_graph() -> None:
    library = Library()
    node = make(
        "method: linear\nmodels:\n  - {method: linear, models: [a, c]}\n".replace(
            "- {method", "- model: {method"
        )
        + "  - model: {method: task_arithmetic, base: a, models: [b]}\n  - a",
        library,
    )
    assert values(node) == pytest.approx([5 / 3] * 4)
    assert sorted(library.asked) == ["a", "b", "c"]
    assert [type(i) for i in node.inputs] == [Merge, Merge, Model]


TWO = """
name: mean
method: linear
models: [a, c]
---
name: other
method: linear
models: [mean, d, mean]
---
method: slerp
models: [mean, other]
"""


def test_documents_are_built_once() -> None:
    library = Library()
    node = make(TWO, library)
    assert sorted(library.asked) == ["a", "c", "d"]
    mean, other = node.inputs
    assert other.inputs[0] is mean is other.inputs[2] and mean.origin == "mean"
    assert values(node) == pytest.approx([(2 + 8 / 3) / 2] * 4)


def test_one_document_by_name() -> None:
    library = Library()
    assert values(make(TWO, library, name="mean")) == [2.0] * 4
    assert library.asked == ["a", "c"]
    with pytest.raises(UsageError, match="did you mean 'mean'"):
        make(TWO, name="maen")


def test_the_last_document_where_all_have_names() -> None:
    named = TWO.replace("---\nmethod: slerp", "---\nname: last\nmethod: slerp")
    assert make(named).origin == "last"


def test_the_same_model_written_differently_is_loaded_once() -> None:
    library = Library()
    node = make("method: linear\nmodels: [a, a, {model: {path: a}}, {model: {model: a}}, d]", library)
    assert library.asked == ["a", "d"] and values(node) == pytest.approx([8 / 5] * 4)


def test_circle_made_by_hand() -> None:
    first, _ = read("name: x\nmethod: linear\nmodels: [y]\n---\nname: y\nmethod: linear\nmodels: [a]\n")
    first.documents["y"] = first
    with pytest.raises(UsageError, match="merged from itself: x → x"):
        build(first, loader=Library())


def test_seed() -> None:
    text = "method: dare\nbase: a\nmodels: [b, {model: {method: dare, base: a, models: [c]%s}}]\nseed: 3"
    node = make(text % "")
    assert (node.seed, node.inputs[2].seed) == (3, 3)  # type: ignore[attr-defined]
    node = make(text % ", seed: 4")
    assert (node.seed, node.inputs[2].seed) == (3, 4)  # type: ignore[attr-defined]
    assert make(text % "", seed=9).seed == 9  # type: ignore[attr-defined]


def test_policies() -> None:
    node = make("method: linear\nmodels: [a, b]\nmissing: available\nmismatch: carry\nnonfinite: allow")
    assert isinstance(node, Merge)
    assert (node.missing, node.mismatch, node.nonfinite) == ("available", "carry", "allow")


def test_whole_slices() -> None:
    sources = "[{model: a, layer_range: [0, %d]}, {model: c, layer_range: [0, %d]}]"
    text = f"merge_method: linear\nslices:\n- sources: {sources}"
    assert values(make(text % (2, 2))) == [2.0] * 4
    with pytest.raises(UsageError, match=r"layer_range \[0, 3\] of a ends behind its last layer: it has 2"):
        make(text % (3, 3))


def test_config_and_tokenizer() -> None:
    node = make("merge_method: linear\nbase_model: c\nmodels: [a, b]")
    assert values(node) == [1.5] * 4 and node.config == {"of": "c"}
    assert json.loads([a.read() for a in node.assets][1]) == {"of": "c"}
    library = Library({"b": {"yo": 0}})
    node = make("method: linear\nmodels: [a, b]\ntokenizer_source: b", library)
    assert node.config == {"of": "a"}
    files = {a.name: a.read() for a in node.assets}
    assert b"yo" in files["tokenizer.json"] and json.loads(files["generation_config.json"]) == {"of": "a"}


def test_union_of_tokenizers() -> None:
    text = "method: linear\nmodels: [a, b]\ntokenizer_source: union"
    assert values(make(text)) == [1.5] * 4
    node = make(text, Library({"b": {"yo": 0}}))
    # "hi" is a's first row, "yo" b's; the row without a token is each one's own
    assert node.tensor(NAMES[0])[:, 0].tolist() == [1, 2] and node.tensor(NAMES[3])[:, 0].tolist() == [1, 2]
    tokenizer = json.loads(next(a.read() for a in node.assets if a.name == "tokenizer.json"))
    assert [t["content"] for t in tokenizer["added_tokens"]] == ["yo"]


def test_vocabularies_that_differ_need_a_tokenizer() -> None:
    library = Library({"b": {"yo": 0}})
    with pytest.raises(DataError, match="token 0 is 'hi' in a and 'yo' in b"):
        make("method: linear\nmodels: [a, b]", library)
    assert values(make("method: linear\nmodels: [a, b]\nmismatch: carry", library)) == [1.5] * 4


def test_overrides_and_files(tmp_path: Any) -> None:
    path = tmp_path / "r.yml"
    path.write_text("method: linear\nmodels: [a, {model: c}]")
    assert values(build(path, loader=Library())) == [2.0] * 4
    changed = read(path, ["models[1].parameters.weight=3"])
    assert values(build(changed, loader=Library())) == [2.5] * 4
    assert values(build(changed[0], loader=Library())) == [2.5] * 4


def test_default_loader(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    for name, value in (("a", 1.0), ("b", 3.0)):
        save_file({"w": torch.full((2,), value)}, tmp_path / f"{name}.safetensors")
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    node = build({"method": "linear", "models": [str(a), {"model": {"path": str(b)}}]})
    assert node.tensor("w").tolist() == [2.0, 2.0]
