"""GGUF files: read back by gguf's reader and run by transformers, which undoes every conversion on its own."""

import hashlib
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from gguf_models import CONFIGS, fields_of, make, tensors_of

import weft
from weft.errors import DataError, UsageError, WeftError

pytest.importorskip("gguf")
pytest.importorskip("transformers")

from weft.export.gguf import as_gguf
from weft.export.gguf.architectures import ARCHITECTURES

READ_BY_TRANSFORMERS = ["llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma2", "gemma3_text",
                        "phi3", "starcoder2", "gpt2"]  # fmt: skip
IDS = torch.randint(0, 96, (2, 33), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def write(folder, out, type="auto", **settings):
    return weft.save(as_gguf(weft.load(folder), type, tokenizer=False), out, **settings)


@pytest.mark.parametrize("kind", READ_BY_TRANSFORMERS)
def test_transformers_computes_the_same_from_it(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(kind, tmp_path / "m")
    write(tmp_path / "m", tmp_path / "out.gguf")
    # its own reading of the metadata loses some of it (sizes of experts, of heads, layer types): see below
    # to its reader a Mistral is a Llama
    known = {} if kind == "mistral" else {"config": model.config}
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="out.gguf", dtype=torch.float32, **known)
    assert logits(model).std() > 0.1
    # a norm's 1 + w rounds once more
    torch.testing.assert_close(logits(again.eval()), logits(model), rtol=1e-4, atol=1e-4)


FACTS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
         "max_position_embeddings", "sliding_window", "num_experts", "num_experts_per_tok"]  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3_moe", "gemma2", "phi3"])
def test_metadata_are_the_config(kind, tmp_path):
    from transformers import AutoConfig

    config = make(kind, tmp_path / "m", rms_norm_eps=1e-3).config.to_dict()
    write(tmp_path / "m", tmp_path / "out.gguf")
    again = AutoConfig.from_pretrained(tmp_path, gguf_file="out.gguf").to_dict()
    stated = [key for key in FACTS if config.get(key) is not None]
    assert len(stated) >= 5 and {k: again[k] for k in stated} == {k: config[k] for k in stated}
    assert again["rms_norm_eps"] == pytest.approx(1e-3)
    assert again["rope_parameters"]["rope_theta"] == config["rope_parameters"]["rope_theta"]


def test_a_gemma_that_llama_cpp_would_compute_otherwise(tmp_path):
    make("gemma2", tmp_path / "m", query_pre_attn_scalar=99)
    edited(tmp_path / "m", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(DataError) as raised:
        as_gguf(weft.load(tmp_path / "m"), tokenizer=False)
    assert "one layer in 2 has full attention" in str(raised.value)
    assert "query_pre_attn_scalar is 99, but llama.cpp computes with 16" in str(raised.value)


def test_a_window_that_is_not_in_the_graph_is_told(tmp_path):
    make("mistral", tmp_path / "m", sliding_window=32)
    assert any("a window of 32 tokens" in note for note in write(tmp_path / "m", tmp_path / "out.gguf").notes)


def pairs(weight, heads):
    """Rows of each head from halves to pairs, by definition, row by row."""
    size = len(weight) // heads
    order = [h * size + j * (size // 2) + i for h in range(heads) for i in range(size // 2) for j in range(2)]
    return weight[order]


EXPECTED = {
    "mixtral": {
        "blk.1.ffn_gate_exps.weight": lambda s: torch.stack(
            [s[f"model.layers.1.block_sparse_moe.experts.{e}.w1.weight"] for e in range(3)]
        ),
        "blk.1.ffn_down_exps.weight": lambda s: torch.stack(
            [s[f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight"] for e in range(3)]
        ),
        "blk.0.ffn_gate_inp.weight": lambda s: s["model.layers.0.block_sparse_moe.gate.weight"],
        "blk.1.attn_q.weight": lambda s: pairs(s["model.layers.1.self_attn.q_proj.weight"], 4),
        "blk.1.attn_k.weight": lambda s: pairs(s["model.layers.1.self_attn.k_proj.weight"], 2),
        "blk.1.attn_v.weight": lambda s: s["model.layers.1.self_attn.v_proj.weight"],
    },
    "gemma": {
        "output_norm.weight": lambda s: s["model.norm.weight"] + 1,
        "blk.0.ffn_norm.weight": lambda s: s["model.layers.0.post_attention_layernorm.weight"] + 1,
        "blk.1.attn_q.weight": lambda s: s["model.layers.1.self_attn.q_proj.weight"],
    },
    "phi": {
        "blk.1.attn_output.bias": lambda s: s["model.layers.1.self_attn.dense.bias"],
        "blk.0.ffn_up.weight": lambda s: s["model.layers.0.mlp.fc1.weight"],
        "output.bias": lambda s: s["lm_head.bias"],
    },
    "olmo2": {
        "blk.1.post_ffw_norm.weight": lambda s: s["model.layers.1.post_feedforward_layernorm.weight"],
        "blk.0.attn_q_norm.weight": lambda s: s["model.layers.0.self_attn.q_norm.weight"],
        "blk.0.attn_q.weight": lambda s: s["model.layers.0.self_attn.q_proj.weight"],
    },
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_values_of_those_it_does_not_read(kind, tmp_path):
    make(kind, tmp_path / "m")
    stored = weft.load(tmp_path / "m").state_dict()
    write(tmp_path / "m", tmp_path / "out.gguf", "f32")
    found = tensors_of(tmp_path / "out.gguf")
    for name, expected in EXPECTED[kind].items():
        torch.testing.assert_close(found[name], expected(stored), rtol=1e-7, atol=0, msg=name)
    numbers = sum(t.numel() for t in found.values())
    assert numbers == sum(i.numel for i in weft.load(tmp_path / "m").tensors.values())


def test_every_architecture_is_tested():
    assert {*READ_BY_TRANSFORMERS, *EXPECTED} == set(ARCHITECTURES) == set(CONFIGS)


def test_experts_in_one_tensor_give_the_same_file(tmp_path):
    """transformers 5 may write experts fused; the file must not depend on that."""
    model = make("qwen3_moe", tmp_path / "split")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert any(n.endswith("experts.gate_up_proj") for n in weft.load(tmp_path / "fused"))
    for layout in ("split", "fused"):
        write(tmp_path / layout, tmp_path / f"{layout}.gguf", "f16")
    assert (tmp_path / "split.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_plain_types(dtype, tmp_path):
    make("llama", tmp_path / "m", dtype)
    stored = weft.load(tmp_path / "m").state_dict()
    saved = write(tmp_path / "m", tmp_path / "out.gguf")
    fields, found = fields_of(tmp_path / "out.gguf"), tensors_of(tmp_path / "out.gguf")
    assert fields["general.file_type"] == {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}[dtype]
    assert torch.equal(found["blk.0.ffn_up.weight"], stored["model.layers.0.mlp.up_proj.weight"].float())
    import gguf

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    named = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    assert kinds["token_embd.weight"] == named[dtype] and kinds["blk.1.attn_norm.weight"] == "F32"
    data = (tmp_path / "out.gguf").read_bytes()
    record = saved.manifest["outputs"][0]
    assert record["sha256"] == hashlib.sha256(data).hexdigest() and record["size"] == len(data)
    assert len(data) % 32 == 0


@pytest.mark.parametrize("type", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_coded_types_are_what_the_package_makes_of_whole_tensors(type, tmp_path):
    import gguf

    make("llama", tmp_path / "m")
    stored = weft.load(tmp_path / "m").state_dict()
    write(tmp_path / "m", tmp_path / "out.gguf", type)
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    up = read["blk.0.ffn_up.weight"]
    whole = gguf.quantize(
        stored["model.layers.0.mlp.up_proj.weight"].numpy(), gguf.GGMLQuantizationType[type.upper()]
    )
    assert up.tensor_type.name == type.upper() and np.array_equal(up.data, whole)
    assert read["output.weight"].tensor_type.name == "Q8_0"
    assert read["token_embd.weight"].tensor_type.name == type.upper()
    weight = stored["model.layers.0.mlp.up_proj.weight"]
    bits = {"q8_0": 8, "q5_1": 5, "q5_0": 5, "q4_1": 4, "q4_0": 4}[type]
    error = (tensors_of(tmp_path / "out.gguf")["blk.0.ffn_up.weight"] - weight).abs().max()
    assert 0 < error < 1.5 * weight.abs().max() / 2 ** (bits - 1)


def test_rows_that_are_no_whole_blocks_are_f16_and_said_so(tmp_path):
    make("qwen2", tmp_path / "m", intermediate_size=80)
    saved = write(tmp_path / "m", tmp_path / "out.gguf", "q8_0")
    import gguf

    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert any("blk.1.ffn_down.weight: stored as f16" in note for note in saved.notes)
    assert saved.manifest["notes"] == list(saved.notes)


def test_llama_3_rotary_scaling_is_transformers(tmp_path):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32, "rope_theta": 500000.0}  # fmt: skip
    model = make("llama", tmp_path / "m", rope_parameters=scaling, head_dim=32)
    write(tmp_path / "m", tmp_path / "out.gguf", "f16")
    factors = tensors_of(tmp_path / "out.gguf")["rope_freqs.weight"]
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 32, 2) / 32)
    torch.testing.assert_close(plain / factors, scaled, rtol=1e-5, atol=0)
    assert len(factors) == 16 and factors[0] == 1 and factors[-1] == 8
    assert fields_of(tmp_path / "out.gguf")["llama.rope.freq_base"] == 500000


def test_a_merge_goes_straight_into_it_the_same_by_any_route(tmp_path):
    a, b = make("llama", tmp_path / "a", torch.bfloat16), make("llama", tmp_path / "b", torch.bfloat16)
    with torch.no_grad():
        for parameter in b.parameters():
            parameter.mul_(0.5)
    b.save_pretrained(tmp_path / "b")
    merged = weft.merge([tmp_path / "a", tmp_path / "b"], "slerp", t=0.3)
    weft.save(as_gguf(merged, "q8_0", tokenizer=False), tmp_path / "direct.gguf", threads=2)
    weft.save(as_gguf(merged, "q8_0", tokenizer=False), tmp_path / "frugal.gguf", threads=1, memory="24MiB")
    assert (tmp_path / "direct.gguf").read_bytes() == (tmp_path / "frugal.gguf").read_bytes()
    weft.save(merged, tmp_path / "merged", dtype=torch.float32)
    again = as_gguf(weft.load(tmp_path / "merged"), "q8_0", tokenizer=False)
    weft.save(again, tmp_path / "late.gguf")
    assert (tmp_path / "late.gguf").read_bytes() == (tmp_path / "direct.gguf").read_bytes()
    assert a.dtype == torch.bfloat16


def test_an_interrupted_file_has_no_name_and_goes_on(tmp_path):
    make("llama", tmp_path / "m")
    made = as_gguf(weft.load(tmp_path / "m"), "f16", tokenizer=False)
    write(tmp_path / "m", tmp_path / "whole.gguf", "f16")

    def stop(event):
        if event["event"] == "tensor" and event["name"].startswith("blk.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weft.save(made, tmp_path / "out.gguf", threads=1, on_event=stop)
    assert not (tmp_path / "out.gguf").exists()
    saved = weft.save(made, tmp_path / "out.gguf", threads=1)
    assert saved.resumed > 5
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        weft.save(made, tmp_path / "out.gguf")
    with pytest.raises(UsageError, match=r"does not end in \.gguf"):
        weft.save(made, tmp_path / "out")


def edited(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return weft.load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "cannot write the architecture 'bert'.*it can write llama"),
        ({"model_type": "llava", "text_config": {}}, "several models in one"),
        ({"num_hidden_layers": 1}, "model.layers.1.self_attn.q_proj.weight' has no place"),
        ({"num_hidden_layers": 3}, "blk.2.attn_q.weight is in other blocks but not in this one of the 3"),
        ({"hidden_act": "relu"}, "activation is 'relu', but llama.cpp computes 'silu'"),
        ({"hidden_size": None}, "states no hidden_size"),
        ({"hidden_size": "64"}, "no usable hidden_size"),
        ({"num_attention_heads": 3, "head_dim": 26}, "does not consist of whole heads"),
        ({"rms_norm_eps": None}, "no epsilon"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "no rotary scaling of type 'dynamic'"),
        ({"layer_types": ["sliding_attention", "full_attention"]}, "all layers have full attention"),
    ],
)
def test_what_gguf_has_no_place_for(changes, message, tmp_path):
    make("llama", tmp_path / "m")
    with pytest.raises(DataError, match=message):
        write_head = as_gguf(edited(tmp_path / "m", **changes), tokenizer=False)
        write_head.layout("out.gguf")


def test_all_strangers_are_named_at_once(tmp_path):
    make("llama", tmp_path / "m")
    model = weft.load(tmp_path / "m")
    state = {**model.state_dict(), "model.layers.0.surprise.weight": torch.ones(2), "visual.w": torch.ones(2)}
    from safetensors.torch import save_file

    save_file({n: t.clone() for n, t in state.items()}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(DataError) as raised:
        as_gguf(weft.load(tmp_path / "m"), tokenizer=False)
    assert "'model.layers.0.surprise.weight'" in str(raised.value) and "'visual.w'" in str(raised.value)


def test_values_that_a_type_cannot_hold(tmp_path):
    model = make("llama", tmp_path / "m", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "m")
    with pytest.raises(DataError, match=r"blk\.0\.ffn_up\.weight holds values beyond float16"):
        write(tmp_path / "m", tmp_path / "out.gguf", "f16")
    assert not (tmp_path / "out.gguf").exists()
    write(tmp_path / "m", tmp_path / "out.gguf", "bf16")
    with pytest.raises(UsageError, match=r"there is no GGUF type 'q8'.*did you mean 'q8_0'"):
        as_gguf(weft.load(tmp_path / "m"), "q8", tokenizer=False)
    with pytest.raises(UsageError, match="no GGUF type"):
        weft.save(as_gguf(weft.load(tmp_path / "m"), torch.float64, tokenizer=False), tmp_path / "o.gguf")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    make("llama", tmp_path / "m")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeftError, match=r"install weft\[gguf\]"):
        as_gguf(weft.load(tmp_path / "m"), tokenizer=False)


def test_the_engine_reads_ranges_of_every_tensor_alike(tmp_path):
    make("llama", tmp_path / "m")
    for type in ("q4_0", "f16"):
        made = as_gguf(weft.load(tmp_path / "m"), type, tokenizer=False)
        again = pickle.loads(pickle.dumps(made))  # as a worker of Ray gets it
        assert again.layout("x").headers == made.layout("x").headers
        for name, info in made.tensors.items():
            whole, grain = made.read(name), made.grain(name)
            assert torch.equal(again.read(name), whole)
            assert len(whole) == info.numel and whole.dtype == info.dtype
            for start in range(0, info.numel, 3 * grain):
                stop = min(start + 3 * grain, info.numel)
                assert torch.equal(made.read(name, start, stop), whole[start:stop]), (name, start)


def test_command_line(tmp_path, monkeypatch, capsys):
    from weft.cli.main import main

    make("llama", tmp_path / "m", torch.float16)
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n  - model: {tmp_path / 'm'}\n    parameters: {{weight: 1}}\n"
    )
    for args in (
        ["export", "gguf", str(tmp_path / "m"), str(tmp_path / "a.gguf"), "--type", "q8_0", "--no-tokenizer"],
        ["export", "gguf", str(recipe), str(tmp_path / "b.gguf"), "--type", "q8_0", "--no-tokenizer"],
    ):
        monkeypatch.setattr(sys, "argv", ["weft", *args])
        main()
    assert "q8_0" in capsys.readouterr().out
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    record = json.loads((tmp_path / "b.gguf.weft.json").read_text())
    assert record["recipe"]
    for args, message in (
        (["export", "gguf", str(tmp_path / "m"), str(tmp_path / "a.bin")], "must end in .gguf"),
        (["merge", str(recipe), str(tmp_path / "c.gguf")], "has no tokenizer.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["weft", *args])
        with pytest.raises(SystemExit):
            main()
        assert message in capsys.readouterr().err
