"""Tokenizer keys of recipes, end to end; and the same over models of other architectures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from token_models import MORE, TEXT, byte_level, llama, permuted, write

import weft
from weft.errors import DataError, UsageError
from weft.llm.tokens.transplant import transplant
from weft.recipes import check

E, H = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("recipes")
    base = llama(320)  # twenty rows of padding
    return {
        "base": write(folder / "base", byte_level(300), base),
        "more": write(folder / "more", byte_level(330, TEXT[:3] + MORE), llama(330, 1, like=base)),
        "moved": write(folder / "moved", permuted(byte_level(300), 3, keep=2), llama(320, 2, like=base)),
    }


def recipe(paths: dict[str, str], text: str) -> weft.Checkpoint:
    for name, path in paths.items():
        text = text.replace(f"${name}", path)
    return weft.build(text + "\n")


def words(model: weft.Checkpoint) -> dict[str, int]:
    data = json.loads(next(a for a in model.assets if a.name == "tokenizer.json").read())
    return data["model"]["vocab"] | {t["content"]: t["id"] for t in data["added_tokens"]}


def test_vocabularies_that_differ_are_not_merged_by_row(paths: dict[str, str]) -> None:
    """MergeKit crops embeddings of different sizes to the common rows, whatever tokens they stand for."""
    text = "merge_method: linear\nmodels: [$base, $more]"
    with pytest.raises(
        DataError, match=r"embed_tokens.weight: 320 rows in .*330.*: set tokenizer_source: base \| union"
    ):
        recipe(paths, text)
    report = check(text.replace("$base", paths["base"]).replace("$more", paths["more"]) + "\n", headers=True)
    assert not report.ok and "set tokenizer_source" in str(report)
    with pytest.raises(DataError, match="token 2 is"):  # as many rows, in another order
        recipe(paths, "merge_method: linear\nmodels: [$base, $moved]")


def test_padding_stays_unless_mergekits_way_is_asked_for(paths: dict[str, str]) -> None:
    text = "merge_method: linear\nmodels: [$base, $moved]\nbase_model: $base\ntokenizer_source: base"
    assert recipe(paths, text).info(E).shape == (320, 32)
    assert recipe(paths, text + "\ncompat: mergekit").info(E).shape == (300, 32)
    # tokens new to the base take the numbers after its own, over its padding
    text = text.replace("$moved", "$more").replace("tokenizer_source: base", "tokenizer_source: union")
    made = recipe(paths, text)
    assert made.info(E).shape[0] == len(words(made)) > 320


def test_one_vocabulary_in_every_slice(paths: dict[str, str]) -> None:
    made = recipe(paths, """
merge_method: passthrough
tokenizer_source: $base
slices:
- sources: [{model: $base, layer_range: [0, 2]}]
- sources: [{model: $moved, layer_range: [1, 2]}]
""")  # fmt: skip
    assert made.config is not None and made.config["num_hidden_layers"] == 3
    moved = weft.load(paths["moved"])
    order = [words(moved)[t] for t, _ in sorted(words(weft.load(paths["base"])).items(), key=lambda e: e[1])]
    assert torch.equal(made.tensor(H)[:300], moved.tensor(H)[order])  # the head comes with the last slice
    assert torch.equal(made.tensor(E), weft.load(paths["base"]).tensor(E))


def test_a_statistic_of_the_whole_model_survives_new_company(paths: dict[str, str], tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: $base\nmodels: [$moved]\ntokenizer_source: base\n"
    text += "parameters: {density: 0.3, scope: model}"
    plain, dressed = recipe(paths, text), recipe(paths, text + "\nchat_template: chatml")
    for made, name in ((plain, "plain"), (dressed, "dressed")):
        weft.save(made, tmp_path / name)
    one, two = weft.load(tmp_path / "plain"), weft.load(tmp_path / "dressed")
    assert all(torch.equal(one.tensor(n), two.tensor(n)) for n in one)
    base = weft.load(paths["base"])
    kept = sum(int((one.tensor(n) != base.tensor(n)).sum()) for n in one)
    assert kept == pytest.approx(0.3 * sum(i.numel for i in one.tensors.values()), rel=0.02)


def test_a_recipe_inside_a_recipe_has_its_own_vocabulary(paths: dict[str, str]) -> None:
    inner = "{merge_method: linear, models: [$base, $more], tokenizer_source: union}"
    made = recipe(
        paths, f"merge_method: linear\nmodels: [{{model: {inner}}}, $moved]\ntokenizer_source: $moved"
    )
    assert words(made) == words(weft.load(paths["moved"]))
    base, more, moved = (weft.load(paths[n]) for n in ("base", "more", "moved"))
    token = "Ġthe"
    rows = [m.tensor(E)[words(m)[token]].double() for m in (base, more, moved)]
    want = ((rows[0] + rows[1]) / 2 + rows[2]) / 2
    assert torch.allclose(made.tensor(E)[words(made)[token]].double(), want, atol=1e-7)


def test_a_row_from_a_model_that_is_not_merged(paths: dict[str, str]) -> None:
    rule = '{"Ġthe": {source: {kind: model_token, model: $more, token: "a"}, force: true}}'
    made = recipe(
        paths, f"merge_method: linear\nmodels: [$base]\ntokenizer: {{source: $base, tokens: {rule}}}"
    )
    more = weft.load(paths["more"])
    assert torch.equal(made.tensor(E)[words(made)["Ġthe"]].float(), more.tensor(E)[words(more)["a"]])
    with pytest.raises(DataError, match="'☃' is not in the result's vocabulary"):
        recipe(
            paths,
            "merge_method: linear\nmodels: [$base]\ntokenizer: {source: $base, tokens: {☃: {force: true}}}",
        )


def test_kinds_need_force(paths: dict[str, str], tmp_path: Path) -> None:
    from token_models import metaspace

    spm = write(tmp_path / "spm", metaspace(320), llama(320, 5))
    text = f"merge_method: linear\nmodels: [$base, {spm}]\ntokenizer: {{source: union%s}}"
    with pytest.raises(UsageError, match="different kinds"):
        recipe(paths, text % "")
    assert recipe(paths, text % ", force: true").info(E).shape[0] > 400


# -- other architectures ------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def architectures() -> dict[str, Any]:
    import transformers as t

    common = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    v = {"vocab_size": 300}
    bart = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "d_model": 32,
    }
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
    gpt2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 300}
    mamba = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4}
    bert = {"max_position_embeddings": 300, "pad_token_id": 1}
    return {
        "gpt2": (t.GPT2LMHeadModel, t.GPT2Config, v | gpt2 | common),
        "bert": (t.BertForMaskedLM, t.BertConfig, SMALL | bert),
        "t5": (t.T5ForConditionalGeneration, t.T5Config, v | t5 | common),
        "bart": (t.BartForConditionalGeneration, t.BartConfig,
                 v | bart | common | {"decoder_start_token_id": 0, "forced_eos_token_id": 1}),
        "gemma": (t.GemmaForCausalLM, t.GemmaConfig, SMALL | common | {"num_key_value_heads": 1, "head_dim": 8}),
        "gpt_neox": (t.GPTNeoXForCausalLM, t.GPTNeoXConfig, SMALL | common),
        "mamba": (t.MambaForCausalLM, t.MambaConfig, v | mamba | common),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart", "gemma", "gpt_neox", "mamba"])
def test_reordering_a_vocabulary_reorders_the_logits(name: str, tmp_path: Path) -> None:
    """Embedding, head, biases and ties of other architectures: exact, and loaded by transformers as they are."""
    torch.manual_seed(0)
    kind, config, values = architectures()[name]
    model = kind(config(**values)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases start at zero
            torch.nn.init.normal_(parameter, std=0.1)
    tok, moved = byte_level(300), permuted(byte_level(300), 3)
    write(tmp_path / "model", tok, model)
    write(tmp_path / "donor", moved, llama(300))
    weft.save(
        transplant(weft.load(tmp_path / "model"), weft.load(tmp_path / "donor")).checkpoint, tmp_path / "out"
    )
    again = type(model).from_pretrained(tmp_path / "out").eval()
    order = [tok.token_to_id(moved.id_to_token(i)) for i in range(300)]
    place = {old: new for new, old in enumerate(order)}
    ids = [5, 17, 42, 99]
    now = [place[i] for i in ids]
    more = {"decoder_input_ids": torch.tensor([ids[:2]])}, {"decoder_input_ids": torch.tensor([now[:2]])}
    one, two = more if name in ("t5", "bart") else ({}, {})
    with torch.no_grad():
        was = model(torch.tensor([ids]), **one).logits
        is_now = again(torch.tensor([now]), **two).logits
    assert torch.allclose(is_now, was[..., order], atol=1e-6) and not torch.allclose(is_now, was, atol=1e-3)
