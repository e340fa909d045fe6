"""A checkpoint as a model of transformers: the same values as `from_pretrained`, whatever the layout on disk."""

import json
import sys

import pytest
import torch
from hf_models import TEXT, tiny, written
from safetensors.torch import load_file, save_file

import weft
from weft.checkpoints.company import InCompany
from weft.errors import DataError, DataProblems, MissingExtra, UsageError
from weft.llm.hf import config_of, load_module, model_class, to_transformers, tokenizer_of, usual_dtype

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2}  # fmt: skip
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip
MODELS = {
    "llama": ("LlamaForCausalLM", TEXT),
    "tied": ("LlamaForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "trunk of a tied model": ("LlamaModel", TEXT | {"tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", TEXT | {"num_local_experts": 4}),
    "qwen3 moe": ("Qwen3MoeForCausalLM", TEXT | {"num_experts": 4, "moe_intermediate_size": 8, "head_dim": 8}),
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "bert": ("BertForMaskedLM", SMALL),
    "t5": ("T5ForConditionalGeneration",
           {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}),
    "llava": ("LlavaForConditionalGeneration",
              {"text_config": TEXT | {"model_type": "llama"},
               "vision_config": VISION | {"model_type": "clip_vision_model"}, "image_token_index": 63}),
    "mamba": ("MambaForCausalLM", {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
}  # fmt: skip


def same(a, b):
    """Names, values and dtypes of two modules."""
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name


@pytest.mark.parametrize("original", [True, False], ids=["transformers 4", "transformers 5"])
@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind, original, tmp_path):
    name, config = MODELS[kind]
    model = tiny(name, **config)
    folder = written(model, tmp_path / "m", save_original_format=original)
    made = to_transformers(weft.load(folder))
    assert type(made).__name__ == name and not made.training
    same(made, model)
    assert len(list(made.parameters())) == len(list(model.parameters()))  # ties are ties


def test_experts_really_are_stored_in_two_layouts(tmp_path):
    model = tiny("MixtralForCausalLM", **MODELS["mixtral"][1])
    one = weft.load(written(model, tmp_path / "4", save_original_format=True))
    fused = weft.load(written(model, tmp_path / "5", save_original_format=False))
    assert any(".experts.0.w1.weight" in n for n in one) and not any(".experts.0." in n for n in fused)
    same(to_transformers(one), to_transformers(fused))


def test_a_lazy_merge_is_what_its_saved_folder_is(tmp_path):
    folders = [written(tiny("LlamaForCausalLM", seed, **TEXT), tmp_path / str(seed)) for seed in range(3)]
    merge = weft.merge(folders[1:], "ties", base=folders[0], density=0.5, dtype=torch.bfloat16)
    made = to_transformers(merge)
    weft.save(merge, tmp_path / "out")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    same(made, loaded)
    ids = torch.arange(8)[None]
    assert torch.equal(made(ids).logits, loaded(ids).logits)


def test_dtypes(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT).to(torch.float16), tmp_path / "m")
    model = weft.load(folder)
    assert usual_dtype(model) == torch.float16
    assert {p.dtype for p in to_transformers(model).parameters()} == {torch.float16}
    wide = to_transformers(model, dtype=torch.float32)
    assert torch.equal(wide.model.norm.weight, model.tensor("model.norm.weight").float())
    eight = weft.load({"a": torch.zeros(9).to(torch.float8_e4m3fn), "b": torch.zeros(2)})
    assert usual_dtype(eight) == torch.bfloat16


def test_the_module_shares_nothing_with_weights_in_memory(tmp_path):
    model = tiny("LlamaForCausalLM", **TEXT)
    written(model, tmp_path / "m")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    made = to_transformers(InCompany(weft.load(model.state_dict()), weft.load(tmp_path / "m").config))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_another_class(tmp_path):
    model = tiny("LlamaForCausalLM", **TEXT | {"tie_word_embeddings": True})
    folder = written(model, tmp_path / "m")
    trunk = to_transformers(weft.load(folder), architecture="LlamaModel")
    assert torch.equal(trunk.norm.weight, model.model.norm.weight)
    head = tiny("LlamaForCausalLM", **TEXT)
    loaded = weft.load(written(head, tmp_path / "h"))
    with pytest.raises(DataProblems, match=r"LlamaModel has no place for.*\n.*lm_head"):
        to_transformers(loaded, architecture="LlamaModel")
    _, unused = load_module(loaded, architecture="LlamaModel")
    assert unused == ["lm_head.weight"]
    for name in ("GPT2LMHeadModel", "pipeline", "NoSuchModel"):
        with pytest.raises(UsageError, match=rf"no model '{name}' for the model_type 'llama'"):
            model_class(loaded, name)


def test_generation_settings_travel(tmp_path):
    model = tiny("LlamaForCausalLM", **TEXT)
    model.generation_config.max_new_tokens = 7
    assert to_transformers(weft.load(written(model, tmp_path / "m"))).generation_config.max_new_tokens == 7


# -- what is refused --------------------------------------------------------------------------------------


def edited(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return weft.load(folder)


def test_a_config_that_contradicts_the_tensors(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    with pytest.raises(DataProblems) as caught:
        to_transformers(edited(folder, num_hidden_layers=3, vocab_size=32))
    told = str(caught.value)
    assert "model.layers.2.mlp.up_proj.weight': missing" in told
    assert "model.embed_tokens.weight': shape [64, 16], where the config makes it [32, 16]" in told
    with pytest.raises(DataProblems, match=r"no place for tensors(.|\n)*layers\.1\.self_attn"):
        to_transformers(edited(folder, num_hidden_layers=1, vocab_size=64))


def test_configs_that_tell_no_model(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    with pytest.raises(UsageError, match=r"model_type 'llama99', which transformers"):
        to_transformers(edited(folder, model_type="llama99"))
    with pytest.raises(UsageError, match="no model 'os', 'LlamaConfig' for"):
        to_transformers(edited(folder, model_type="llama", architectures=["os", "LlamaConfig"]))
    assert model_class(edited(folder, architectures=None)) is transformers.LlamaForCausalLM
    with pytest.raises(UsageError, match="no model_type"):
        to_transformers(edited(folder, model_type=None))
    with pytest.raises(DataError, match=r"cannot be loaded as LlamaForCausalLM|is no llama config"):
        to_transformers(edited(folder, model_type="llama", num_attention_heads="many"))
    (folder / "config.json").unlink()
    with pytest.raises(UsageError, match=r"has no config\.json"):
        to_transformers(weft.load(folder))


def test_no_code_is_asked_for(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "evil.py").write_text("raise SystemExit('run')")
    config = config_of(edited(folder, auto_map=code, _attn_implementation="org/kernel"))
    assert not hasattr(config, "auto_map") and config._attn_implementation != "org/kernel"
    to_transformers(weft.load(folder))


def test_without_transformers(tmp_path, monkeypatch):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"weft\[llm\]"):
        to_transformers(weft.load(folder))


# -- tokenizers -------------------------------------------------------------------------------------------


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "two": 2}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_tokenizer(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    assert tokenizer_of(weft.load(folder)) is None
    word_tokenizer().save_pretrained(folder)
    made = tokenizer_of(weft.load(folder))
    assert made("two one three")["input_ids"] == [2, 1, 0] and made.decode([1, 2]) == "one two"
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"the tokenizer of .* cannot be read"):
        tokenizer_of(weft.load(folder))


def test_a_broken_file_of_weights_is_named(tmp_path):
    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(DataProblems, match="does not hold a whole LlamaForCausalLM") as caught:
        to_transformers(weft.load(folder))
    assert caught.value.problems == ["'model.layers.1.mlp.down_proj.weight': missing"]
