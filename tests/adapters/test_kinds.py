"""Kinds of layers of real classes, with and without the class at hand, and a model of experts there and back."""

import copy
import json
import pickle

import adapter_models as small
import pytest
import torch
from peft import PeftModel
from transformers import (
    BertConfig,
    BertModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import weft
from weft.adapters.extract import extract_lora
from weft.adapters.kinds import kinds
from weft.checkpoints.memory import StateDict

LAYERS = {"Linear": "linear", "Conv1D": "transposed", "Embedding": "embedding"}


def bert():
    return BertModel(
        BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=12, num_layers=1, num_heads=2)
    )


def moe(seed=0):
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(
        vocab_size=30, hidden_size=8, intermediate_size=12, moe_intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, head_dim=4,
    )).eval()  # fmt: skip


class Whole(StateDict):
    """A module's weights as they are in memory, with its config."""

    def __init__(self, module):
        super().__init__(module)
        self._config = json.loads(module.config.to_json_string(use_diff=False))

    @property
    def config(self):
        return self._config


@pytest.mark.parametrize("build", [small.llama, small.gpt2, bert, t5])
@pytest.mark.parametrize("by_class", [True, False])
def test_kinds_of_real_classes(build, by_class, monkeypatch):
    if not by_class:
        monkeypatch.setattr("weft.adapters.kinds._from_class", lambda base: {})
    module = build()
    found = kinds(Whole(module))
    for path, part in module.named_modules():
        if type(part).__name__ in LAYERS:
            assert found[f"{path}.weight"] == LAYERS[type(part).__name__], path
        elif getattr(part, "weight", None) is not None and part.weight.dim() == 1:
            assert found[f"{path}.weight"] == "other"


def test_a_model_of_experts_there_and_back(tmp_path):
    base, model = moe(), moe(1)
    assert set(kinds(Whole(base)).values()) == {"linear", "experts", "embedding", "other"}
    made = extract_lora(Whole(model), Whole(base), rank=12, rest="save")
    pickle.loads(pickle.dumps(extract_lora(Whole(model), Whole(base), rank=12)))
    small.save(made, tmp_path / "out")
    peft = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out").eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.allclose(peft(ids).logits, model(ids).logits, atol=1e-5)
        assert not torch.allclose(base(ids).logits, model(ids).logits, atol=1e-2)
    back = weft.load(tmp_path / "out", base=base)
    assert small.distance(small.state_of(back), model.state_dict()) < 1e-5
