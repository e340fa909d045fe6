"""The smoke run on models that learned something, on merges that kept it and on merges that lost it."""

import copy
import json
import sys
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from hf_models import BYTES, TEXT, taught, tiny, written
from safetensors.torch import load_file, save_file

import weft
from weft.cli.main import main
from weft.errors import DataProblems, MissingExtra, UsageError
from weft.llm.forward import finite_outputs, sample_inputs
from weft.llm.perplexity import perplexity
from weft.llm.verify import Measured, Verification, _judge, parents_of, verify

pytest.importorskip("transformers")
SAMPLE = files("weft.llm").joinpath("sample.txt").read_text("utf-8")
SMALL = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2}  # fmt: skip
VISION = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32,
          "num_hidden_layers": 1, "num_attention_heads": 2}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base that learned the sample text, two fine-tunes of it, and a model from another start."""
    home = tmp_path_factory.mktemp("models")
    base = taught(tiny("LlamaForCausalLM", **BYTES), SAMPLE)
    half = len(SAMPLE) // 2
    written(base, home / "base")
    written(taught(copy.deepcopy(base), SAMPLE[:half], 10), home / "a")
    written(taught(copy.deepcopy(base), SAMPLE[half:], 10), home / "b")
    written(taught(tiny("LlamaForCausalLM", 1, **BYTES), SAMPLE, 30), home / "other")
    return home


@pytest.fixture
def models(home):
    return {name: weft.load(home / name) for name in ("base", "a", "b", "other")}


def test_a_good_merge_passes(home, models, tmp_path):
    merge = weft.merge([models["a"], models["b"]], "task_arithmetic", base=models["base"], weight=0.5)
    weft.save(merge, tmp_path / "out")
    report = verify(tmp_path / "out", parents_of(merge), limit_tokens=900)
    assert report.ok and report.result.finite and not report.result.unused
    assert [Path(p.origin).name for p in report.parents] == ["base", "a", "b"]
    # the very figure that the plain function gives, for result and parents
    assert report.result.perplexity == pytest.approx(
        perplexity(weft.load(tmp_path / "out"), SAMPLE, limit_tokens=900)
    )
    assert report.parents[1].perplexity == pytest.approx(perplexity(models["a"], SAMPLE, limit_tokens=900))
    assert report.result.perplexity < report.unigram
    assert json.loads(json.dumps(report.describe(), allow_nan=False))["ok"] is True


def test_a_collapse_is_told(models, tmp_path):
    apart = 6 * (models["a"] - models["other"]) + models["other"]
    weft.save(apart, tmp_path / "out")
    report = verify(tmp_path / "out", parents_of(apart), limit_tokens=600)
    assert not report.ok
    assert "times that of" in report.problems[0] and "the merge has collapsed" in report.problems[0]
    # without parents, guessing among the vocabulary is the measure
    assert "worse than guessing among 256 tokens" in verify(tmp_path / "out", limit_tokens=600).problems[0]


def test_numbers_that_are_none(home, tmp_path):
    weft.save(weft.load(home / "a"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    report = verify(tmp_path / "out", [home / "a"], limit_tokens=300)
    assert report.problems == ["the model's outputs are not all numbers (NaN or infinity): it has collapsed"]
    assert report.describe()["result"]["perplexity"] is None


def test_one_token_for_ever(home, tmp_path):
    weft.save(weft.load(home / "a"), tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.norm.weight"].zero_()  # every logit is 0, so the first token is as likely as any
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    path = tmp_path / "out" / "config.json"  # that token must not mean the end
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    (tmp_path / "out" / "generation_config.json").unlink()
    report = verify(tmp_path / "out", [home / "a"], limit_tokens=200)
    assert any("repeats one token (id 0), which no parent does" in p for p in report.problems)
    alone = verify(tmp_path / "out", limit_tokens=200)
    assert any("repeats one token" in n for n in alone.notes)


def judged(result, *parents, **about):
    report = Verification(result, list(parents), "text", unigram=50.0, **about)
    _judge(report, 10.0)
    return report


def model(value, ids=((1, 2, 3),), **more):
    return Measured("m", "M", finite=True, perplexity=value, ids=list(map(list, ids)), vocabulary=100, **more)


def test_both_measures_of_collapse_are_needed():
    assert judged(model(49.0), model(4.0)).ok  # far worse, but better than frequencies
    assert judged(model(200.0), model(30.0)).ok  # worse than frequencies, but so nearly are the parents
    assert not judged(model(200.0), model(30.0), model(4.0)).ok  # the best parent counts
    assert judged(model(8.1), model(4.0)).notes == ["perplexity 8.1 is 2.02 times that of m"]
    other = judged(model(99.0), model(4.0, ids=((7, 8),)))  # other tokens can't be compared
    assert other.ok and "not compared with: m" in other.notes[0]
    assert not judged(model(101.0), model(4.0, ids=((7, 8),))).ok


def test_what_a_parent_does_too_is_a_note():
    unused = ["cls.seq_relationship.weight"]
    assert "has no place for 'cls.seq_relationship.weight'" in judged(model(4.0, unused=unused)).problems[0]
    assert judged(model(4.0, unused=unused), model(4.0, unused=unused)).ok
    failure = "TypeError: unexpected"
    failed = Measured("m", "M", failure=failure)
    assert not judged(failed, model(3.0)).ok and judged(failed, Measured("p", "M", failure=failure)).ok


def test_a_parent_that_cannot_be_measured_is_a_note(home, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama99"}')
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    report = verify(home / "a", [tmp_path, home / "base"], limit_tokens=100)
    assert report.ok and "was not measured" in report.notes[0] and "llama99" in report.notes[0]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("BertForMaskedLM", SMALL),
        ("T5ForConditionalGeneration", {"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_layers": 1,
                                        "num_heads": 2, "d_kv": 8, "decoder_start_token_id": 0}),
        ("ViTForImageClassification", VISION),
        ("CLIPModel", {"text_config": SMALL | {"max_position_embeddings": 32, "eos_token_id": 2},
                       "vision_config": VISION, "projection_dim": 8}),
        ("WhisperForConditionalGeneration", {"vocab_size": 64, "d_model": 16,
                                             "encoder_layers": 1, "decoder_layers": 1,
                                             "encoder_attention_heads": 2, "decoder_attention_heads": 2,
                                             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8,
                                             "max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1,
                                             "eos_token_id": 2, "decoder_start_token_id": 1,
                                             "suppress_tokens": None, "begin_suppress_tokens": None}),
    ],
)  # fmt: skip
def test_other_models_run_forward(kind, config, tmp_path):
    made = tiny(kind, **config)
    folder = written(made, tmp_path / "m")
    report = verify(folder)
    assert report.ok and report.result.finite and report.result.perplexity is None
    assert report.result.architecture == kind
    with torch.no_grad():
        next(p for n, p in made.named_parameters() if n.endswith("weight")).fill_(torch.inf)
    assert not finite_outputs(made, sample_inputs(made))


# -- on the command line ------------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["weft", *map(str, args)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "bug in weft" not in said.err, said.err
        return status, said.out, said.err

    return run


def recipe(home, *names, **more):
    return yaml.safe_dump({"method": "linear", "models": [str(home / n) for n in names], **more})


def test_merge_verify_records_what_it_found(home, tmp_path, run):
    hub = pytest.importorskip("huggingface_hub")
    out = tmp_path / "out"
    status, said, err = run("merge", recipe(home, "a", "b"), out, "--verify")
    assert status == 0, err
    assert said.count("perplexity") == 3 and "token frequencies alone" in said
    record = json.loads((out / "weft-manifest.json").read_text())["verification"]
    assert record["ok"] and record["result"]["perplexity"] > 1 and len(record["parents"]) == 2
    card = hub.ModelCard.load(out / "README.md")
    (result,) = card.data.eval_results
    assert result.metric_type == "perplexity" and result.metric_value == record["result"]["perplexity"]
    assert card.data.model_name == "out" and "## Evaluation" in card.text
    # weights are as they were without
    run("merge", recipe(home, "a", "b"), tmp_path / "plain")
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    assert plain == (out / "model.safetensors").read_bytes()


def test_merge_verify_fails_on_a_collapse(home, tmp_path, run):
    out = tmp_path / "out"
    text = tmp_path / "text.txt"
    text.write_text(SAMPLE[:1500])
    extreme = recipe(home, "a", "other", parameters={"weight": [6, -5], "normalize": False})
    status, said, err = run("merge", extreme, out, "--verify-text", text, "--json")
    assert status == 1 and "the merge has collapsed" in err
    told = json.loads(said)
    assert told["verification"]["ok"] is False and told["verification"]["text"] == "text.txt"
    assert (out / "model.safetensors").exists()  # it is there to be looked at
    assert "Problem: perplexity" in (out / "README.md").read_text()


def test_what_cannot_be_verified_is_refused_before_the_merge(home, tmp_path, run, monkeypatch):
    one = recipe(home, "a", "b")
    status, _, err = run("merge", one, tmp_path / "x.safetensors", "--verify")
    assert status == 2 and "is a single file" in err and not (tmp_path / "x.safetensors").exists()
    status, _, err = run("merge", one, tmp_path / "x", "--verify-text", tmp_path / "none.txt")
    assert status == 1 and "none.txt" in err and not (tmp_path / "x").exists()
    for name in ("c", "d"):
        save_file({"w": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    plain = recipe(tmp_path, "c.safetensors", "d.safetensors")
    status, _, err = run("merge", plain, tmp_path / "x", "--verify")
    assert status == 2 and "has no config.json" in err and not (tmp_path / "x").exists()
    monkeypatch.setitem(sys.modules, "transformers", None)
    status, _, err = run("merge", one, tmp_path / "x", "--verify")
    assert status == 2 and "weft[llm]" in err and not (tmp_path / "x").exists()


def test_weft_verify(home, tmp_path, run):
    out = tmp_path / "out"
    run("merge", recipe(home, "a", "b"), out)
    status, said, _ = run("verify", out, "--parent", home / "a", "--tokens", 300, "--json")
    assert status == 0 and json.loads(said)["tokens"] == 299
    assert "verification" not in (out / "weft-manifest.json").read_text()
    for _ in range(2):
        status, said, _ = run("verify", out, "--record", "--tokens", 200)
        assert status == 0 and said.startswith("result ")
    assert json.loads((out / "weft-manifest.json").read_text())["verification"]["ok"]
    card = (out / "README.md").read_text()
    assert card.count("## Evaluation") == 1 and card.count("model-index") == 1
    status, _, err = run("verify", home / "a", "--record")
    assert status == 2 and "does not hold" in err


def test_errors_of_the_result_are_raised(home, tmp_path, monkeypatch):
    weft.save(weft.load(home / "a"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(DataProblems, match=r"layers\.2"):
        verify(tmp_path / "out")
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert "no place for 'model.layers.1" in verify(tmp_path / "out").problems[0]
    path.unlink()
    with pytest.raises(UsageError, match=r"no config\.json"):
        verify(tmp_path / "out")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra):
        verify(home / "a")


def test_with_a_tokenizer_it_tells_how_it_goes_on(tmp_path):
    from test_hf import word_tokenizer

    folder = written(tiny("LlamaForCausalLM", **TEXT), tmp_path / "m")
    without = verify(folder, texts="one two " * 20)
    assert any("there is no tokenizer" in n for n in without.notes) and without.result.continuation is None
    word_tokenizer().save_pretrained(folder)
    report = verify(folder, texts="one two " * 20)
    assert isinstance(report.result.continuation, str) and not any("no tokenizer" in n for n in report.notes)
