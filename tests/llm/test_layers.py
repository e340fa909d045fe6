"""Layers in Python: picked, stacked, shuffled, up-scaled; and what configs say of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from zoo import answer, born, housed, woken

import weft
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.company import InCompany
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems, UsageError
from weft.llm.depth import aspects
from weft.llm.layout import layout
from weft.llm.parts import parts
from weft.llm.shuffle import shuffled
from weft.llm.slices import layers, stacked
from weft.llm.upscale import expanded, upscaled


def model(seed: int, count: int = 6, **config: Any) -> Checkpoint:
    """A tensor a layer, whose value tells model and layer."""
    state = {"model.embed.weight": torch.full((2, 2), float(seed))}
    state |= {
        f"model.layers.{i}.mlp.down_proj.weight": torch.full((2, 2), seed + i / 100) for i in range(count)
    }
    state["model.norm.weight"] = torch.full((2,), float(seed))
    return InCompany(StateDict(state, origin=f"m{seed}"), {"num_hidden_layers": count, **config})


def values(made: Checkpoint) -> list[float]:
    names = [n for n in made if ".layers." in n]
    assert [int(n.split(".")[2]) for n in names] == list(range(len(names)))
    return [round(float(made.tensor(n).flatten()[0]), 4) for n in names]


def test_layers_are_a_sequence() -> None:
    a, b = layers(model(1)), layers(model(2))
    assert len(a) == 6 and len(a[2:]) == 4 and len(a + b) == 12 and len(a[1] * 3) == 3
    assert values(stacked(a[:2] + b[-1] + a[[5, 0]] * 2)) == [1.0, 1.01, 2.05, 1.05, 1.0, 1.05, 1.0]
    with pytest.raises(UsageError, match="there is no layer 6, -9: there are 6"):
        a[[0, 6, -9]]
    with pytest.raises(UsageError, match="no layers to stack"):
        stacked(a[3:3])
    assert repr(a[:1] + b[2]) == "m1[0] + m2[2]"


def test_what_stands_around_the_blocks() -> None:
    a, b = model(1), model(2)
    made = weft.stacked(weft.layers(a)[:1] + weft.layers(b)[1:])
    assert made.tensor("model.embed.weight")[0, 0] == 1 and made.tensor("model.norm.weight")[0] == 2
    inner = stacked(layers(a)[2:4], before=False, after=False)
    assert list(inner) == [f"model.layers.{i}.mlp.down_proj.weight" for i in range(2)]
    assert made.config == {"num_hidden_layers": 6} and a.config == {"num_hidden_layers": 6}


def test_merging_is_lazy_over_picked_layers() -> None:
    merged = weft.merge([stacked(layers(model(1))[:3]), stacked(layers(model(3))[3:])])
    made = stacked(layers(merged) + layers(model(5))[:1])
    assert values(made) == pytest.approx([2.015, 2.025, 2.035, 5.0])


# -- configs --------------------------------------------------------------------------------------------

RULES: list[tuple[dict[str, Any], list[int], dict[str, Any]]] = [
    ({"first_k_dense_replace": 2}, [0, 1, 2, 3, 4, 5, 2, 3], {"first_k_dense_replace": 2}),
    ({"first_k_dense_replace": 2}, [1, 2, 3], {"first_k_dense_replace": 1}),
    ({"first_k_dense_replace": 2}, [0, 1, 0, 1, 2], {"first_k_dense_replace": 4}),
    ({"sliding_window_pattern": 3}, [0, 1, 2, 0, 1, 2], {"sliding_window_pattern": 3}),
    ({"sliding_window_pattern": 3}, [0, 2, 3, 5], {"sliding_window_pattern": 2}),
    ({"sliding_window_pattern": 3}, [2, 0], {"layer_types": ["full_attention", "sliding_attention"]}),
    ({"full_attention_interval": 2}, [1, 0, 1],
     {"layer_types": ["full_attention", "linear_attention", "full_attention"]}),
    ({"max_window_layers": 4, "use_sliding_window": True}, [0, 1, 4, 5], {"max_window_layers": 2}),
    ({"max_window_layers": 4, "use_sliding_window": True}, [5, 0],
     {"layer_types": ["sliding_attention", "full_attention"]}),
    ({"max_window_layers": 6, "use_sliding_window": False}, [0, 1, 2] * 3, {"max_window_layers": 9}),
    ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [1, 3, 0],
     {"decoder_sparse_step": 1, "mlp_only_layers": [2]}),
    ({"decoder_sparse_step": 1, "mlp_only_layers": [0, 5]}, [1, 5, 5, 2], {"mlp_only_layers": [1, 2]}),
    ({"attn_layer_period": 3, "attn_layer_offset": 1}, [1, 2, 3, 4, 5],
     {"attn_layer_period": 3, "attn_layer_offset": 0}),
    ({"num_kv_shared_layers": 2}, [0, 1, 4, 5], {"num_kv_shared_layers": 2}),
    ({"num_kv_shared_layers": 2}, [0, 3, 5], {"num_kv_shared_layers": 1}),
    ({"hybrid_override_pattern": "M-M*-M"}, [3, 0, 1], {"hybrid_override_pattern": "*M-"}),
    ({"block_types": list("abcdef")}, [5, 0, 0], {"block_types": ["f", "a", "a"]}),
    ({"no_rope_layer_interval": 3}, [2, 2], {"no_rope_layer_interval": 1}),
    ({"no_rope_layer_interval": 3}, [2, 0], {"no_rope_layers": [0, 1]}),
    ({"interleave_moe_layer_step": 2}, [0, 0, 1], {"interleave_moe_layer_step": 3}),
    ({"moe_layers": [1, 3, 5], "interleave_moe_layer_step": 2}, [0, 5], {"moe_layers": [1]}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "picks", "expected"), RULES)
def test_a_config_says_of_every_layer_what_it_said(
    config: dict[str, Any], picks: list[int], expected: dict[str, Any]
) -> None:
    before = model(1, **config)
    made = stacked(layers(before)[picks])
    assert made.config is not None
    assert {k: made.config[k] for k in expected} == expected
    assert made.config["num_hidden_layers"] == len(picks)
    (old,), (new,) = layout(before).stacks.values(), layout(made).stacks.values()
    was, now = aspects(before.config or {}, old), aspects(made.config, new)
    if "decoder_sparse_step" in config:  # the one field may come to say what the other said
        del was["mlp_only_layers"]
    for aspect in was.keys() & now.keys():
        assert now[aspect] == [was[aspect][i] for i in picks]


def test_what_no_config_can_say() -> None:
    with pytest.raises(
        DataProblems, match=r"no first_k_dense_replace makes sparse layers \['sparse', 'dense'\]"
    ):
        stacked(layers(model(1, first_k_dense_replace=2))[[3, 0]])
    with pytest.raises(UsageError, match="predict further tokens"):
        layers(model(1, num_hidden_layers=5, num_nextn_predict_layers=1))
    with pytest.raises(UsageError, match=r"no stack of blocks decoder; it has model\.layers"):
        layers(model(1), "decoder")
    with pytest.raises(UsageError, match="no stack of blocks"):
        layers({"w": torch.ones(2)})


def test_parts_of_models_are_named_by_their_prefixes() -> None:
    def named(*names: str, **config: Any) -> list[str]:
        state = {n: torch.ones(1) for n in names}
        return list(parts(InCompany(StateDict(state), config)))

    assert named("model.layers.0.w", "lm_head.weight") == ["model"]
    assert named("encoder.block.0.w", "decoder.block.0.w", "shared.weight") == ["encoder", "decoder"]
    assert named("model.visual.blocks.0.w", "model.visual.merger.mlp.0.w", "model.visual.merger.mlp.2.w",
                 "model.language_model.layers.0.w", "lm_head.weight") == ["visual", "language_model"]  # fmt: skip


# -- shuffle and up-scaling --------------------------------------------------------------------------


def test_shuffle() -> None:
    models = [model(1, 40), model(2, 40), model(3, 40)]
    made = shuffled(models, seed=0, weights=[1, 3, 0])
    drawn = values(made)
    assert [round(v % 1, 2) for v in drawn] == [i / 100 for i in range(40)]
    assert 20 < sum(v >= 2 for v in drawn) < 40 and max(drawn) < 3
    assert values(shuffled(models, seed=0, weights=[1, 3, 0])) == drawn
    assert values(shuffled(models, seed=1, weights=[1, 3, 0])) != drawn
    assert made.tensor("model.norm.weight")[0] == 1  # the first model's, whoever gives the last layer
    mixed = values(shuffled(models, seed=0, order=True))
    places = [round(v % 1, 2) for v in mixed]
    assert sorted(places) == [i / 100 for i in range(40)] != places


def test_shuffle_asks_for_models_of_one_depth() -> None:
    with pytest.raises(UsageError, match="40 in m1, 39 in m2"):
        shuffled([model(1, 40), model(2, 39)], seed=0)
    for weights in ([1], [1, -1], [0, 0]):
        with pytest.raises(UsageError, match="weights must be"):
            shuffled([model(1), model(2)], seed=0, weights=weights)


def test_depth_up_scaling() -> None:
    made = upscaled(model(1, 8), 2)  # SOLAR's figures by four: 2(8 − 2) = 12
    assert [round(v % 1 * 100) for v in values(made)] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert made.config is not None and made.config["num_hidden_layers"] == 12
    with pytest.raises(UsageError, match="drop must be from 0 to 7"):
        upscaled(model(1, 8), 8)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "qwen3_moe", "gpt2", "gpt_neox", "falcon", "mamba",
                                  "phi3", "vit", "gpt_oss", "deepseek_v3", "llava"])  # fmt: skip
def test_expanded_blocks_change_nothing(name: str, tmp_path: Any) -> None:
    module = born(name, 0)
    before = housed(module, tmp_path / "before")
    made = expanded(before, 2)
    out = weft.save(made, tmp_path / "out").path
    again = woken(name, out)
    torch.testing.assert_close(answer(name, again), answer(name, module), rtol=0, atol=1e-5)
    count = layout(weft.load(before)).main()
    assert count is not None and len(layers(out)) == count.count + 2
    silent = [n for n in made if not made.tensor(n).any()]
    assert {n.split("layers.")[-1].split(".")[0] for n in silent} or name in ("gpt2", "falcon", "vit")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_blocks_that_cannot_be_the_identity(name: str, tmp_path: Any) -> None:
    with pytest.raises(DataProblems, match="normalises the sum of a block's input and output"):
        expanded(housed(born(name, 0), tmp_path / "before"), 1)
    with pytest.raises(UsageError, match="from 1 to 6"):
        expanded(model(1), 7)
    nameless = {f"layers.{i}.w.weight": torch.ones(2, 2) for i in range(3)}
    with pytest.raises(DataProblems, match="block 3: none of its tensors is known"):
        expanded(nameless, 1)
