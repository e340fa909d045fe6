"""Parameter values that depend on the tensor."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import Problems, UsageError
from weft.methods.params import MISSING, Bounds, Parameter
from weft.methods.step import At
from weft.recipes.kinds import after_blocks, kinds_of
from weft.recipes.schedule import Schedule, Schedules

T = Parameter("t", "float", 0.5, bounds=Bounds(0.0, 1.0))
NEEDED = Parameter("t", "float", MISSING)
FLAG = Parameter("flag", "bool", False)
COUNT = Parameter("count", "int", 1, bounds=Bounds(0))
SCOPE = Parameter("scope", "choice", "tensor", choices=("tensor", "model"))
WEIGHT = Parameter("weight", "float", 1.0, bounds=Bounds(per_model=True))


def block(i: int, of: int = 5, rest: str = "mlp.up_proj.weight") -> At:
    return At(f"model.layers.{i}.{rest}", layer=i, layers=of)


EMBED = At("model.embed_tokens.weight", layers=5)
NORM = At("model.norm.weight", layers=5)
HEAD = At("lm_head.weight", layers=5)


def test_scalar() -> None:
    s = Schedule.parse(0.3, T)
    assert s.constant and s.at(EMBED) == s.at(block(3)) == 0.3 and s.describe() == "0.3"
    assert Schedule.parse("1e-2", T).at(EMBED) == 0.01
    assert isinstance(Schedule.parse(1, T).at(EMBED), float)


def test_curve_over_five_blocks() -> None:
    s = Schedule.parse([0, 1], T)
    assert [s.at(block(i)) for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert not s.constant and s.curved


def test_curve_outside_the_blocks() -> None:
    s = Schedule.parse([0.1, 0.5, 0.9], T)
    assert (s.at(EMBED), s.at(NORM), s.at(HEAD)) == (0.1, 0.9, 0.9)
    quirk = Schedule.parse([0.1, 0.5, 0.9], T, mergekit=True)
    assert (quirk.at(EMBED), quirk.at(NORM), quirk.at(HEAD)) == (0.1, 0.1, 0.1)
    assert quirk.at(block(4)) == 0.9


def test_curve_of_one_block_and_one_value() -> None:
    assert Schedule.parse([0.2, 0.8], T).at(block(0, of=1)) == 0.8
    one = Schedule.parse([0.2], T)
    assert one.constant and one.at(block(3)) == 0.2


def test_words_and_counts_step() -> None:
    s = Schedule.parse([True, False], FLAG)
    assert [s.at(block(i, 4)) for i in range(4)] == [True, True, False, False]
    assert [Schedule.parse([1, 3], COUNT).at(block(i, 4)) for i in range(4)] == [1, 1, 3, 3]
    assert Schedule.parse(["tensor", "model"], SCOPE).at(HEAD) == "model"


def test_first_rule_that_holds_wins() -> None:
    s = Schedule.parse(
        [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.75}], T
    )
    assert s.at(block(2, rest="self_attn.q_proj.weight")) == 0.5
    assert s.at(block(2)) == 0.25
    assert s.at(HEAD) == 0.75
    assert s.describe() == (
        "0 → 1 over the blocks for names with 'self_attn', 0.25 for names with 'mlp', else 0.75"
    )


def test_star_and_single_rule() -> None:
    assert Schedule.parse([{"filter": "*", "value": 0.1}], T).constant
    assert Schedule.parse({"filter": "mlp", "value": 0.1}, T).at(block(1)) == 0.1


@pytest.mark.parametrize(
    ("rule", "hits"),
    [
        ({"layers": [1, 3]}, [1, 2]),
        ({"layers": "1-3"}, [1, 2, 3]),
        ({"layers": 4}, [4]),
        ({"layers": "4"}, [4]),
        ({"layers": [-2, None]}, [3, 4]),
        ({"layers": [3, None]}, [3, 4]),
        ({"layers": [None, 2]}, [0, 1]),
        ({"pattern": "*.layers.[12].*"}, [1, 2]),
        ({"pattern": "layers.1"}, []),
        ({"pattern": "/layers.[0-1].mlp/"}, [0, 1]),
        ({"pattern": r"/\.(?:2|3)\.(mlp|attn)\.[a-z_+*(]+\.weight$/"}, [2, 3]),
        ({"kind": "mlp", "layers": [0, 1]}, [0]),
        ({"block": ["attention", "ffn"], "layers": 2}, [2]),
        ({"kind": "attention"}, []),
        ({"stack": "model"}, [0, 1, 2, 3, 4]),
        ({"stack": "model.layers"}, [0, 1, 2, 3, 4]),
        ({"stack": "mod"}, []),
        ({"filter": "layers.3", "kind": "mlp"}, [3]),
    ],
)
def test_conditions(rule: dict[str, object], hits: list[int]) -> None:
    s = Schedule.parse([{**rule, "value": 1}, {"value": 0}], T)
    assert [i for i in range(5) if s.at(block(i)) == 1] == hits
    assert s.at(EMBED) == (1 if rule == {"stack": "model"} else 0)


def test_nothing_holds() -> None:
    assert Schedule.parse([{"filter": "q", "value": 0.1}], T).at(HEAD) == 0.5  # the default
    with pytest.raises(UsageError, match=r"t has no value for tensor 'lm_head.weight'"):
        Schedule.parse([{"filter": "q", "value": 0.1}], NEEDED).at(HEAD)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (1.5, "t must be float in [0, 1], not 1.5"),
        ([0, 2], "t[1]: t must be"),
        ([{"filter": "a", "value": [0, "x"]}], "t[0].value[1]"),
        ([], "at least one"),
        ([0, {"value": 1}], "not both"),
        ([[0, 1], 1], "not a list"),
        ([{"filter": "a"}], "needs value"),
        ([{"filtr": "a", "value": 1}], "did you mean 'filter'"),
        ([{"kind": "atention", "value": 1}], "did you mean 'attention'"),
        ([{"kind": "mlp", "block": "mlp", "value": 1}], "two names"),
        ([{"layers": [3, 1], "value": 1}], "[first, end)"),
        ([{"layers": "3-1", "value": 1}], "[first, end)"),
        ([{"layers": True, "value": 1}], "[first, end)"),
        ([{"pattern": "/(a+)+$/", "value": 1}], "repeats"),
        ([{"pattern": "/(?:a|aa)+$/", "value": 1}], "repeats"),
        ([{"pattern": "/(a?){50}$/", "value": 1}], "repeats"),
        ([{"pattern": "/(a)\\1/", "value": 1}], "refers back"),
        ([{"pattern": "/.*.*.*.*.*.*x/", "value": 1}], "repeats"),
        ([{"pattern": "/([/", "value": 1}], "no regular expression"),
        ([{"pattern": "x" * 600, "value": 1}], "longer"),
        ([{"filter": 3, "value": 1}], "must be text"),
        (True, "t must be"),
        (float("nan"), "t must be"),
        ({"a": 1}, "needs value"),
        (None, "t must be"),
    ],
)
def test_problems(raw: object, said: str) -> None:
    with pytest.raises(Problems) as error:
        Schedule.parse(raw, T)
    assert said in str(error.value)


def test_all_leaves_are_checked() -> None:
    with pytest.raises(Problems) as error:
        Schedule.parse([{"filter": "a", "value": [2, 3]}, {"value": -1, "layer": 2}], T)
    assert len(error.value.problems) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1.5, 10**400, "x"])
def test_whole_numbers(value: object) -> None:
    with pytest.raises(Problems, match="count must be int"):
        Schedule.parse(value, COUNT)


def test_per_model() -> None:
    a, b = Schedule.parse([0, 1], WEIGHT), Schedule.parse(2, WEIGHT)
    params = Schedules({"weight": (a, b), "t": Schedule.parse(0.5, T)})
    assert params(block(1)) == {"weight": [0.25, 2.0], "t": 0.5}
    assert params.describe() == {"weight": "0 → 1 over the blocks | 2", "t": "0.5"}
    assert pickle.loads(pickle.dumps(params))(block(1)) == params(block(1))


def test_kinds() -> None:
    names = {
        "model.layers.0.self_attn.q_proj.weight": {"attention"},
        "model.layers.0.self_attn.q_proj.bias": {"attention", "bias"},
        "model.layers.0.self_attn.q_norm.weight": {"norm"},
        "model.layers.0.post_attention_layernorm.weight": {"norm"},
        "model.layers.0.mlp.down_proj.weight": {"mlp"},
        "model.layers.0.mlp.gate_proj.weight": {"mlp"},
        "model.layers.0.mlp.gate.weight": {"router"},
        "model.layers.0.block_sparse_moe.experts.3.w1.weight": {"mlp", "expert"},
        "model.embed_tokens.weight": {"embedding"},
        "model.norm.weight": {"norm"},
        "lm_head.weight": {"head"},
        "transformer.h.3.attn.c_attn.weight": {"attention"},
        "transformer.h.3.ln_1.bias": {"norm", "bias"},
        "transformer.wte.weight": {"embedding"},
        "transformer.ln_f.weight": {"norm"},
        "bert.encoder.layer.1.attention.output.dense.weight": {"attention"},
        "bert.encoder.layer.1.output.dense.weight": {"mlp"},
        "bert.encoder.layer.1.output.LayerNorm.weight": {"norm"},
        "bert.embeddings.LayerNorm.weight": {"norm"},
        "layer1.0.conv1.weight": {"conv"},
        "layer1.0.bn1.weight": {"norm"},
        "fc.weight": {"head"},
        "vit.embeddings.cls_token": {"embedding"},
        "decoder.block.2.layer.1.EncDecAttention.q.weight": {"attention"},
        "alpha": {"other"},
    }
    assert {n: set(kinds_of(n)) for n in names} == names


def test_after_the_blocks() -> None:
    after = ["model.norm.weight", "lm_head.weight", "transformer.ln_f.bias", "classifier.bias",
             "vit.layernorm.weight"]  # fmt: skip
    before = ["model.embed_tokens.weight", "bert.embeddings.LayerNorm.weight", "visual.ln_pre.weight",
              "conv1.weight", "bn1.weight", "model.layers.3.mlp.up_proj.weight", "alpha"]  # fmt: skip
    assert all(map(after_blocks, after)) and not any(map(after_blocks, before))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(1, 40), st.data())
def test_curves_stay_between_their_values(values: list[float], layers: int, data: st.DataObject) -> None:
    i = data.draw(st.integers(0, layers - 1))
    value = Schedule.parse(values, T).at(block(i, layers))
    assert min(values) - 1e-12 <= value <= max(values) + 1e-12
    assert Schedule.parse(values, T).at(block(layers - 1, layers)) == pytest.approx(values[-1], abs=1e-12)
