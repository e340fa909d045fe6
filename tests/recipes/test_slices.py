"""`slices`, `modules` and `frame` in recipes: what is merged with what, how, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems, Problems
from weft.methods.merge import Merge
from weft.recipes import build, check, read

PREFIX = "model.layers."


def model(
    seed: int,
    layers: int = 4,
    width: int = 4,
    prefix: str = "model.",
    head: bool = True,
    tied: bool = False,
    more: dict[str, Any] | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    origin: str = "",
) -> Checkpoint:
    """Three tensors a layer, an embedding, a norm and a head; every value is of its own."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    state = {f"{prefix}embed_tokens.weight": draw(6, width)}
    for i in range(layers):
        state |= {
            f"{prefix}layers.{i}.{n}.weight": draw(width, width) for n in ("self_attn.q_proj", "mlp.up_proj")
        }
        state[f"{prefix}layers.{i}.norm.weight"] = draw(width)
    state[f"{prefix}norm.weight"] = draw(width)
    if head or tied:
        state["lm_head.weight"] = state[f"{prefix}embed_tokens.weight"] if tied else draw(6, width)
    config = {"num_hidden_layers": layers, "hidden_size": width, "vocab_size": 6, "tie_word_embeddings": tied}
    return InCompany(StateDict(state | (extra or {}), origin=origin or f"m{seed}"), config | (more or {}))


def library(**models: Checkpoint) -> Any:
    def load(source: Any) -> Checkpoint:
        return models[str(source)]

    return load


A, B, C = model(1), model(2), model(3)
LOAD = library(a=A, b=B, c=C)


def make(text: str, loader: Any = LOAD, **more: Any) -> Checkpoint:
    return build(text + "\n", loader=loader, **more)


def layer(source: Checkpoint, i: int) -> dict[str, torch.Tensor]:
    """What follows the index in names → value, of one layer."""
    head = f"{PREFIX}{i}."
    return {n[len(head) :]: source.tensor(n).double() for n in source if n.startswith(head)}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


TWO = """
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [1, 4]}]
merge_method: passthrough
"""


def test_layers_of_two_models_one_after_the_other() -> None:
    node = make(TWO)
    expected = [layer(A, 0), layer(A, 1), layer(A, 2), layer(B, 1), layer(B, 2), layer(B, 3)]
    assert all(same(layer(node, i), e) for i, e in enumerate(expected))
    assert node.config is not None and node.config["num_hidden_layers"] == 6
    assert torch.equal(
        node.tensor("model.embed_tokens.weight").float(), A.tensor("model.embed_tokens.weight")
    )
    for name in ("model.norm.weight", "lm_head.weight"):  # what comes after the blocks is the last slice's
        assert torch.equal(node.tensor(name).float(), B.tensor(name))
    assert sorted(node) == sorted({*node}) and len(node) == 3 + 6 * 3


def test_the_order_of_tensors_is_that_of_the_model() -> None:
    names = list(make(TWO))
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    assert [n for n in names if n.endswith("norm.weight")][:6] == [
        f"{PREFIX}{i}.norm.weight" for i in range(6)
    ]


def test_repeated_layers_and_scale() -> None:
    sources = "[{model: a, layer_range: [1, 2], parameters: {scale: %s}}]"
    node = make(
        "merge_method: passthrough\nslices:\n" + "".join(f"- sources: {sources % s}\n" for s in (1, 0.5, -2))
    )
    for i, scale in enumerate((1, 0.5, -2)):
        assert same(layer(node, i), {n: scale * t for n, t in layer(A, 1).items()})


def test_scale_by_filter_makes_a_layer_silent() -> None:
    node = make("""
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources:
  - model: a
    layer_range: [1, 2]
    parameters: {scale: [{filter: up_proj, value: 0.0}, {value: 1.0}]}
""")
    assert float(node.tensor(f"{PREFIX}2.mlp.up_proj.weight").abs().max()) == 0
    assert torch.equal(layer(node, 2)["norm.weight"], layer(A, 1)["norm.weight"])


def test_every_slice_has_its_own_parameters_base_and_curve() -> None:
    node = make("""
merge_method: slerp
parameters: {linear_above: 0.0, t: 0.25}
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  base_model: b
- sources: [{model: a, layer_range: [1, 4]}, {model: c, layer_range: [0, 3]}]
  base_model: a
  parameters: {t: [0, 1]}
""")

    # linear_above 0: everything with an angle below 90 degrees goes along a straight line; compare to the method
    def slerp(x: torch.Tensor, y: torch.Tensor, t: float) -> torch.Tensor:
        return weft.METHODS["slerp"]([x, y], t=t, linear_above=0.0)

    for i in range(2):
        for n, value in layer(node, i).items():
            torch.testing.assert_close(value, slerp(layer(B, i)[n], layer(A, i)[n], 0.25), rtol=0, atol=0)
    for i, t in enumerate((0.0, 0.5, 1.0)):  # the curve runs over the layers of the slice
        for n, value in layer(node, 2 + i).items():
            torch.testing.assert_close(
                value, slerp(layer(A, 1 + i)[n], layer(C, i)[n], t), rtol=0, atol=1e-15
            )
    head = node.tensor("lm_head.weight")  # after the blocks: the last slice's models and last value
    torch.testing.assert_close(head, C.tensor("lm_head.weight").double(), rtol=0, atol=1e-15)


def test_filters_see_output_names() -> None:
    node = make("""
merge_method: linear
parameters: {normalize: false}
slices:
- sources: [{model: a, layer_range: [0, 2], parameters: {weight: [{filter: layers.2., value: 5}, {value: 1}]}}]
- sources: [{model: a, layer_range: [0, 2], parameters: {weight: [{filter: layers.2., value: 5}, {value: 1}]}}]
""")
    factors = [
        float((layer(node, i)["norm.weight"] / layer(A, i % 2)["norm.weight"]).mean()) for i in range(4)
    ]
    assert factors == pytest.approx([1, 1, 5, 1])


TIES = """
merge_method: ties
base_model: c
parameters: {density: 0.5, weight: 1}
slices:
- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}%s]
- sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [2, 4]}]
"""


def test_slices_of_a_task_vector_method_equal_the_whole() -> None:
    whole = make(
        "merge_method: ties\nbase_model: c\nmodels: [a, b]\nparameters: {density: 0.5, scope: tensor}"
    )
    node = make(TIES.replace("weight: 1", "weight: 1, scope: tensor") % "")
    assert node.tensors == whole.tensors
    assert all(torch.equal(node.tensor(n), whole.tensor(n)) for n in whole)
    listed = make(TIES.replace("weight: 1", "weight: 1, scope: tensor") % ", {model: c, layer_range: [0, 2]}")
    assert all(torch.equal(listed.tensor(n), whole.tensor(n)) for n in whole)


def test_one_slice_over_everything_is_the_merge_of_the_models() -> None:
    node = make("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, "
                "layer_range: [0, 4]}]}]")  # fmt: skip
    assert isinstance(node, Merge) and node.models == (A, B)


def test_slices_draw_masks_of_their_own() -> None:
    text = """
merge_method: dare_linear
base_model: b
parameters: {density: 0.5, weight: 1}
slices:
- sources: [{model: a, layer_range: [1, 2]}]
- sources: [{model: a, layer_range: [1, 2]}]
"""
    node, again, other = make(text), make(text), make(text, seed=5)
    kept = [
        layer(node, i)["mlp.up_proj.weight"] != layer(B, 1)["mlp.up_proj.weight"].double() for i in range(2)
    ]
    assert not torch.equal(*kept)
    assert all(torch.equal(node.tensor(n), again.tensor(n)) for n in node)
    assert not all(torch.equal(node.tensor(n), other.tensor(n)) for n in node)


def test_saved_bytes_do_not_depend_on_threads_or_memory(tmp_path: Path) -> None:
    node = make(TIES % "")
    digests = []
    for threads, memory in ((1, None), (2, "24MiB")):
        out = weft.save(
            node, tmp_path / str(threads), threads=threads, **({"memory": memory} if memory else {})
        )
        digests.append((out.path / "model.safetensors").read_bytes())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("first", "last", "tie"),
    [("a", "a", True), ("a", "b", False), ("a", "u", False), ("u", "a", False), ("u", "u", None)],
)
def test_tied_heads(first: str, last: str, tie: bool | None) -> None:
    """The head is tied where embedding and head come from one tied model; else it is a tensor of its own."""
    tied = {"a": model(1, tied=True), "b": model(2, tied=True), "u": model(3)}
    text = ("merge_method: passthrough\nslices:\n- sources: [{model: %s, layer_range: [0, 2]}]\n"
            "- sources: [{model: %s, layer_range: [2, 4]}]")  # fmt: skip
    node = make(text % (first, last), library(**tied))
    assert node.config is not None
    head = tied[last].tensor("lm_head.weight")
    assert torch.equal(node.tensor("lm_head.weight").float(), head)
    assert ("lm_head.weight" in node.aliases) == (tie is True)
    if tie is False:
        assert node.config["tie_word_embeddings"] is False
    mergekit = make("compat: mergekit\n" + text % (first, last), library(**tied))
    assert ("lm_head.weight" in mergekit.aliases) == (first in "ab" and last in "ab")


# -- the config ---------------------------------------------------------------------------------------


def test_lists_go_with_their_layers() -> None:
    left = model(1, more={"layer_types": ["s", "s", "f", "s"], "mlp_only_layers": [0, 2]})
    right = model(2, more={"layer_types": ["f", "g", "s", "s"], "mlp_only_layers": []})
    node = make(TWO, library(a=left, b=right))
    assert node.config is not None
    assert node.config["layer_types"] == ["s", "s", "f", "g", "s", "s"]
    assert node.config["mlp_only_layers"] == [0, 2]


def test_what_a_config_does_not_say_of_the_other_models_layers() -> None:
    left = model(1, more={"layer_types": ["s"] * 4})
    with pytest.raises(DataProblems, match=r"layer_types: the config of .*m2.* does not say it"):
        make(TWO, library(a=left, b=model(2)))


def test_layers_of_different_kinds_are_not_merged() -> None:
    left = model(1, more={"layer_types": ["s", "f", "s", "f"]})
    text = ("merge_method: linear\nslices:\n- sources: [{model: a, layer_range: [0, 3]}, "
            "{model: a, layer_range: [1, 4]}]")  # fmt: skip
    with pytest.raises(DataProblems, match="layer_types is 's' in layer 0 of m1 and 'f' in layer 1 of m1"):
        make(text, library(a=left))


# -- bad input ----------------------------------------------------------------------------------------


def test_every_layer_that_is_not_there_is_named_at_once() -> None:
    with pytest.raises(Problems) as error:
        make(TWO.replace("[0, 3]", "[0, 5]").replace("[1, 4]", "[4, 9]"))
    assert len(error.value.problems) == 2
    assert "slices[0]: layer_range [0, 5] of m1 ends behind its last layer: it has 4" in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (TWO.replace("[0, 3]", "[3, 1]"), "slices[0].sources[0].layer_range: must be [first, end)"),
        (TWO.replace("[0, 3]", "[-1, 1]"), "must be [first, end)"),
        (TWO.replace("[0, 3]", "[1]"), "layer_range"),
        (TWO.replace("layer_range: [0, 3]", "layer_rang: [0, 3]"), "did you mean 'layer_range'"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b}]}]",
         "as many layers each, not 2, all"),
        (TIES.replace("a, layer_range: [0, 2]", "a, layer_range: [1, 3]") % "", "the base needs its own"),
        (TWO.replace("passthrough", "linear") + "parameters: {wieght: 2}", "did you mean 'weight'"),
        (TWO.replace("[{model: a, layer_range: [0, 3]}]", "[{model: a, layer_range: [0, 3]}, "
                     "{model: b, layer_range: [0, 3]}]"), "passthrough merges 1 model, got 2"),
    ],
)  # fmt: skip
def test_slices_that_cannot_be_meant(text: str, said: str) -> None:
    with pytest.raises(Problems) as error:
        read(text)
    assert said in str(error.value)


def test_architectures_that_differ_are_named_by_their_configs() -> None:
    wide = model(2, width=8, more={"num_attention_heads": 2}, origin="wide")
    narrow = model(1, more={"num_attention_heads": 4}, origin="narrow")
    for text in ("merge_method: linear\nmodels: [a, b]", "merge_method: linear\nslices:\n- sources: [{model: a, "
                 "layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]"):  # fmt: skip
        with pytest.raises(DataProblems) as error:
            make(text, library(a=narrow, b=wide))
        assert "hidden_size: 4 in narrow" in str(error.value) and "8 in wide" in str(error.value)
        assert "num_attention_heads: 4 in narrow" in str(error.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"num_hidden_layers": 5}, "num_hidden_layers 5, its tensors 4 blocks"),
        ({"hidden_size": 5}, "rows of 4, its config a width of 5"),
        ({"vocab_size": 7}, "has 6 rows, its config vocab_size 7"),
    ],
)
def test_configs_that_contradict_their_tensors(more: dict[str, Any], said: str) -> None:
    wrong = model(1, more=more)
    for text in (TWO, "merge_method: linear\nmodels: [a, b]"):
        with pytest.raises(DataProblems, match="m1") as error:
            make(text, library(a=wrong, b=B))
        assert said in str(error.value)
    text = "merge_method: linear\nmodels: [org/a, org/b]\n"
    assert said in str(check(text, headers=True, loader=library(**{"org/a": wrong, "org/b": B})))


def test_a_model_with_a_missing_layer() -> None:
    whole = {n: A.tensor(n) for n in A if not n.startswith(f"{PREFIX}2.")}
    torn = InCompany(StateDict(whole, origin="torn"), A.config)
    with pytest.raises(DataProblems, match=r"no tensor of block 2 of model\.layers\."):
        make(TWO, library(a=torn, b=B))


# -- parts --------------------------------------------------------------------------------------------


def tower(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    names = [*(f"model.vision_tower.layers.{i}.w.weight" for i in range(3)), "model.vision_tower.post_norm.weight",
             "model.multi_modal_projector.linear.weight"]  # fmt: skip
    return {n: torch.randn(4, 4, generator=generator) for n in names}


def seeing(seed: int) -> Checkpoint:
    config = {"text_config": {"num_hidden_layers": 4, "hidden_size": 4, "vocab_size": 6},
              "vision_config": {"num_hidden_layers": 3, "hidden_size": 4}}  # fmt: skip
    inner = model(seed, prefix="model.language_model.", extra=tower(seed), origin=f"v{seed}")
    return InCompany(StateDict({n: inner.tensor(n) for n in inner}, origin=f"v{seed}"), config)


V, W = seeing(4), seeing(5)
SEEING = library(a=A, b=B, v=V, w=W)


def test_a_text_model_merges_into_the_trunk_of_a_vision_model() -> None:
    node = make("merge_method: linear\nmodels: [v, a, b]", SEEING)
    assert set(node) == set(V) and node.config == V.config
    for name in V:
        text = name.replace("language_model.", "")
        expected = V.tensor(name)
        if "vision" not in name and "projector" not in name:
            expected = (expected.double() + A.tensor(text).double() + B.tensor(text).double()) / 3
        torch.testing.assert_close(node.tensor(name).double(), expected.double(), rtol=0, atol=1e-15)
    carried = getattr(node, "carried", {})
    assert len(carried) == 5 and carried["model.multi_modal_projector.linear.weight"] == "kept from v4"


def test_the_frame_may_be_the_base_or_no_model_of_the_merge_at_all() -> None:
    text = "merge_method: task_arithmetic\nbase_model: a\nmodels: [b]\nparameters: {weight: 0.5}\n"
    trunk, framed = make(text), make(text + "frame: v", SEEING)
    name = "layers.2.mlp.up_proj.weight"
    assert torch.equal(framed.tensor(f"model.language_model.{name}"), trunk.tensor(f"model.{name}"))
    assert torch.equal(framed.tensor("lm_head.weight"), trunk.tensor("lm_head.weight"))
    assert torch.equal(
        framed.tensor("model.vision_tower.layers.1.w.weight"),
        V.tensor("model.vision_tower.layers.1.w.weight"),
    )
    base = make("merge_method: task_arithmetic\nbase_model: v\nmodels: [b]\nparameters: {weight: 1}", SEEING)
    torch.testing.assert_close(base.tensor(f"model.language_model.{name}").float(), B.tensor(f"model.{name}"))


def test_slices_within_a_frame() -> None:
    node = make(TWO + "frame: v", SEEING)
    assert node.config is not None and node.config["text_config"]["num_hidden_layers"] == 6
    assert node.config["vision_config"] == {"num_hidden_layers": 3, "hidden_size": 4}
    got = {n.removeprefix("model.language_model.layers.4."): node.tensor(n).double()
           for n in node if n.startswith("model.language_model.layers.4.")}  # fmt: skip
    assert same(got, layer(B, 2))
    assert sum("vision_tower" in n for n in node) == 4


def test_what_is_no_trunk_of_the_frame() -> None:
    other = StateDict({f"h.{i}.c_attn.weight": torch.ones(4, 4) for i in range(4)}, origin="gpt")
    with pytest.raises(DataProblems, match="gpt: none of its stacks of blocks is one of v4"):
        make("merge_method: linear\nmodels: [g, g]\nframe: v", library(g=other, v=V))


MODULES = """
merge_method: linear
base_model: v
modules:
  text_decoder:
    slices:
    - sources: [{model: v, layer_range: [0, 2]}]
    - sources: [{model: w, layer_range: [0, 3]}]
  vision_tower:
    models:
    - {model: v, parameters: {weight: 0.25}}
    - {model: w, parameters: {weight: 0.75}}
"""


def test_modules() -> None:
    node = make(MODULES, SEEING)
    assert node.config is not None
    assert (
        node.config["text_config"]["num_hidden_layers"] == 5
        and node.config["vision_config"]["num_hidden_layers"] == 3
    )
    head = "model.language_model.layers."
    for i, (source, j) in enumerate([(V, 0), (V, 1), (W, 0), (W, 1), (W, 2)]):
        name = f"{head}{i}.norm.weight"
        assert torch.equal(node.tensor(name).float(), source.tensor(f"{head}{j}.norm.weight"))
    name = "model.vision_tower.layers.2.w.weight"
    torch.testing.assert_close(
        node.tensor(name), 0.25 * V.tensor(name).double() + 0.75 * W.tensor(name).double()
    )
    name = "model.multi_modal_projector.linear.weight"
    assert torch.equal(node.tensor(name), V.tensor(name)) and name in getattr(node, "carried", {})


def test_a_module_may_take_a_text_model_and_a_method_of_its_own() -> None:
    node = make("""
merge_method: linear
modules:
  language_model: {merge_method: slerp, models: [v, a], parameters: {t: 1}}
  vision_tower: {models: [w]}
frame: v
""", SEEING)  # fmt: skip
    name = "layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(node.tensor(f"model.language_model.{name}").float(), A.tensor(f"model.{name}"))
    name = "model.vision_tower.layers.0.w.weight"
    assert torch.equal(node.tensor(name).float(), W.tensor(name))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("vision_tower:", "vison_tower:", "did you mean 'vision_tower'"),
        ("vision_tower:", "decoder:", "it has language_model, vision_tower, multi_modal_projector"),
        ("vision_tower:", "vision:\n    models: [v]\n  visual:", "which is given already"),
        ("[0, 3]", "[0, 7]", "ends behind its last layer"),
        ("{model: w, parameters: {weight: 0.75}}", "{model: a}", "m1 has nothing of the part vision_tower"),
    ],
)
def test_modules_that_cannot_be_had(old: str, new: str, said: str) -> None:
    with pytest.raises(weft.WeftError) as error:
        make(MODULES.replace(old, new), SEEING)
    assert said in str(error.value)


def test_several_stacks_need_modules() -> None:
    sides = {
        f"{side}.block.{i}.w.weight": torch.ones(2, 2) for side in ("encoder", "decoder") for i in range(3)
    }
    two = InCompany(StateDict(sides, origin="t5"), {"num_layers": 3, "num_decoder_layers": 3})
    with pytest.raises(Problems, match=r"several stacks of blocks .*encoder\.block.*write modules"):
        make(TWO, library(a=two, b=two))


def test_set_reaches_into_modules_and_slices() -> None:
    changed = read(MODULES, ["modules.text_decoder.slices[1].sources[0].layer_range=[0, 2]",
                             "modules.vision_tower.parameters.normalize=false"])  # fmt: skip
    (recipe,) = changed
    assert recipe.modules["text_decoder"].slices[1].ranges == ((0, 2),)
    told = recipe.describe()
    assert told["modules"]["text_decoder"]["slices"][1]["models"] == ["w [0, 2]"]
    assert told["modules"]["vision_tower"]["parameters"]["normalize"] == "False"
    with pytest.raises(weft.UsageError, match="did you mean 'models'"):
        read(MODULES, ["modules.vision_tower.modles=[v]"])


def test_check_follows_models_of_slices_and_modules(tmp_path: Path) -> None:
    report = check(TWO.replace("model: b", f"model: {tmp_path}/gone"))
    assert "gone does not exist" in str(report)
    report = check(MODULES.replace("model: w", f"model: {tmp_path}/gone"))
    assert "gone does not exist" in str(report)


def test_a_document_may_be_sliced() -> None:
    node = make("""
name: mixed
merge_method: linear
models: [a, b]
---
merge_method: passthrough
slices:
- sources: [{model: mixed, layer_range: [0, 3]}]
- sources: [{model: {merge_method: linear, models: [b, c]}, layer_range: [2, 4]}]
""")
    expected = {n: (layer(B, 3)[n] + layer(C, 3)[n]) / 2 for n in layer(B, 3)}
    assert same(layer(node, 4), expected)
