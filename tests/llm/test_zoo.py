"""Every architecture: merged, stacked anew, loaded by transformers and run.

The models are the real classes with random weights (zoo.py). No file of weft names any of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from zoo import MIXTURES, TEXT, TWO_SIDED, ZOO, answer, born, housed, transformers, woken

import weft
from weft.llm.consistency import contradictions
from weft.llm.layout import layout

pytest.importorskip("transformers")
House = Callable[..., Path]
STACKS = {n: a for n, a in ZOO.items() if n not in TWO_SIDED and a.layers >= 3}


@pytest.fixture(scope="session")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Models saved when first asked for: `house(name, seed)`."""
    root = tmp_path_factory.mktemp("zoo")

    def find(name: str, seed: int, in_memory_names: bool = False, layers: int | None = None) -> Path:
        folder = root / f"{name}-{seed}-{in_memory_names}-{layers}"
        if not folder.exists():
            housed(born(name, seed, layers), folder, in_memory_names)
        return folder

    return find


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ZOO)
def test_layout(name: str, house: House) -> None:
    model = weft.load(house(name, 0))
    found = layout(model)
    main = found.main()
    assert main is not None and main.counted_by and not main.holes
    assert main.count == ZOO[name].layers or name in TWO_SIDED
    assert contradictions(model) == []
    assert bool(found.rivals) == (name in TWO_SIDED)
    assert bool(found.vocabulary) == (name != "vit")
    assert not any("head.attention" in n for n in found.vocabulary)  # 3 · 32 rows by chance
    assert bool(found.experts) == (name in MIXTURES or name == "gpt_oss")


@pytest.mark.parametrize("name", ZOO)
def test_linear(name: str, house: House, tmp_path: Path) -> None:
    merged = weft.merge([house(name, 0), house(name, 1)], weight=[0.25, 0.75])
    out = weft.save(merged, tmp_path / "out").path
    left, right = born(name, 0), born(name, 1)
    with torch.no_grad():
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            a.copy_((0.25 * a.double() + 0.75 * b.double()).float())
    torch.testing.assert_close(answer(name, woken(name, out)), answer(name, left), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_ties(name: str, house: House, tmp_path: Path) -> None:
    base, experts = house(name, 0), [house(name, 1), house(name, 2)]
    out = weft.save(weft.merge(experts, "ties", base=base, density=0.5), tmp_path / "out").path
    made, before = answer(name, woken(name, out)), answer(name, woken(name, base))
    assert (made - before).abs().max() > 1e-3
    assert stored(out).keys() == stored(base).keys()


@pytest.mark.parametrize("name", STACKS)
def test_frankenmerge(name: str, house: House, tmp_path: Path) -> None:
    n = ZOO[name].layers
    a, b = house(name, 0), house(name, 1)
    picks = [(a, i) for i in range(n - 1)] + [(b, i) for i in range(1, n)]
    recipe = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": str(a), "layer_range": [0, n - 1]}]},
        {"sources": [{"model": str(b), "layer_range": [1, n]}]},
    ]}  # fmt: skip
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    _check_stack(name, a, b, picks, out)


def _check_stack(name: str, a: Path, b: Path, picks: list[tuple[Path, int]], out: Path) -> None:
    """Names, values and config of a stack of layers, worked out from the files alone."""
    main = layout(weft.load(a)).main()
    assert main is not None
    block = re.compile(re.escape(main.prefix) + r"(\d+)\.(.+)")
    made, files = stored(out), {a: stored(a), b: stored(b)}
    seen = set()
    for i, (folder, index) in enumerate(picks):
        for old, tensor in files[folder].items():
            if (found := block.fullmatch(old)) and int(found[1]) == index:
                new = f"{main.prefix}{i}.{found[2]}"
                assert torch.equal(made[new], tensor), new
                seen.add(new)
    for new in made.keys() - seen:
        assert not block.fullmatch(new)
        if new == "lm_head.weight" and new not in files[b]:  # b's head is its embedding, and a has another
            (old,) = (n for n in files[b] if re.search(r"embed_tokens|wte", n))
            assert torch.equal(made[new], files[b][old]) and not config_of(out)["tie_word_embeddings"]
            continue
        last = re.search(r"norm|lm_head|score|classifier|embed_out|cls|ln_f|head", new)
        tower = re.search(r"vision|visual|projector|embeddings|pooler", new)
        torch.testing.assert_close(
            made[new], files[b if last and not tower else a][new], rtol=0, atol=0, msg=new
        )
    config = config_of(out)
    text = config.get("text_config", config)
    assert len(picks) in (text.get("num_hidden_layers"), text.get("n_layer"))
    if "layer_types" in text:
        sources = [config_of(f).get("text_config", config_of(f))["layer_types"][i] for f, i in picks]
        assert text["layer_types"] == sources
    answer(name, woken(name, out))


@pytest.mark.parametrize("name", TWO_SIDED)
def test_encoder_and_decoder(name: str, house: House, tmp_path: Path) -> None:
    a, b = house(name, 0), house(name, 1)
    first, second = {"model": str(a), "layer_range": [0, 2]}, {"model": str(b), "layer_range": [1, 2]}
    recipe = {"merge_method": "passthrough", "modules": {
        "encoder": {"slices": [{"sources": [first]}, {"sources": [second]}]}, "decoder": {"models": [str(b)]},
    }}  # fmt: skip
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    config = config_of(out)
    counts = {k: config[k] for k in ("num_layers", "encoder_layers") if k in config}
    assert set(counts.values()) == {3}
    decoders = {k: config[k] for k in ("num_decoder_layers", "decoder_layers") if k in config}
    assert set(decoders.values()) == {2}
    made, mine, theirs = stored(out), stored(a), stored(b)
    for new, tensor in made.items():
        if match := re.match(r"(.*encoder\.(?:block|layers)\.)(\d)(\..*)", new):
            assert torch.equal(tensor, theirs[f"{match[1]}1{match[3]}"] if match[2] == "2" else mine[new])
        elif "decoder." in new:
            assert torch.equal(tensor, theirs[new])
    answer(name, woken(name, out))


def test_a_tied_base_and_an_untied_model(tmp_path: Path) -> None:
    """The result has a head of its own and says so, whichever of the two gives the config."""
    hf = transformers()
    paths = []
    for seed, tied in ((0, True), (1, False)):
        torch.manual_seed(seed)
        config = hf.Qwen2Config(**TEXT, num_hidden_layers=2, tie_word_embeddings=tied)
        paths.append(housed(hf.Qwen2ForCausalLM(config), tmp_path / str(tied)))
    for i, order in enumerate((paths, paths[::-1])):
        out = weft.save(weft.merge(order), tmp_path / f"out{i}").path
        assert config_of(out)["tie_word_embeddings"] is False
        model = woken("qwen2", out)
        expected = (stored(paths[0])["model.embed_tokens.weight"] + stored(paths[1])["lm_head.weight"]) / 2
        torch.testing.assert_close(model.lm_head.weight.detach(), expected)  # type: ignore[union-attr]


def test_explaining_a_tensor_of_a_slice(house: House) -> None:
    """From the layer of the output down to the layers of the files."""
    from weft.cli.merging import explanation, how

    source = {"model": str(house("llama", 0)), "layer_range": [1, 3]}
    other = {"model": str(house("llama", 1)), "layer_range": [0, 2]}
    node = weft.build({"method": "linear", "slices": [{"sources": [source]}, {"sources": [source, other]}]})
    told = explanation(node, "model.layers.3.mlp.up_proj.weight")
    (merged,) = told["inputs"]
    assert merged["method"] == "linear" and merged["tensor"] == "model.layers.1.mlp.up_proj.weight"
    files = [view["inputs"][0]["tensor"] for view in merged["inputs"]]
    assert files == ["model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert "weighted_sum" in how(node, "model.layers.3.mlp.up_proj.weight")


def test_a_sentence_transformers_folder(house: House, tmp_path: Path) -> None:
    """Its modules' settings, and the weights of those behind the transformer, come along."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for i, folder in enumerate(folders):
        housed(born("bert", i), folder)
        for name, text in (("modules.json", "[]"), ("1_Pooling/config.json", "{}"), ("2_Dense/config.json", "{}"),
                           ("sentence_bert_config.json", '{"max_seq_length": 64}')):  # fmt: skip
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text)
        save_file({"linear.weight": torch.full((2, 2), float(i))}, folder / "2_Dense" / "model.safetensors")
    out = weft.save(weft.merge([str(f) for f in folders]), tmp_path / "out").path
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "sentence_bert_config.json"):
        assert (out / name).read_text() == (folders[0] / name).read_text()
    assert (out / "2_Dense" / "model.safetensors").read_bytes() == (
        folders[0] / "2_Dense/model.safetensors"
    ).read_bytes()
    answer("bert", woken("bert", out))


def test_inspect_shows_the_layout(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    from weft.cli.inspecting import describe, inspect_model

    inspect_model(str(house("gemma3", 0)), values=False, as_json=False)
    shown = capsys.readouterr().out
    assert "language_model.model.layers: 3 (text_config.num_hidden_layers, text_config.layer_types)" in shown
    assert "vision_tower.encoder.layers: 2 (vision_config.num_hidden_layers)" in shown
    assert "language_model, multi_modal_projector, vision_tower" in shown
    told = describe(weft.load(house("mixtral", 0)))["layout"]
    assert told["experts"] == {"each": 3, "blocks": 3, "fused": False} and told["contradictions"] == []


def test_what_an_encoder_and_a_decoder_share(house: House) -> None:
    """MergeKit's three modules of T5: the embedding and the head belong to neither side."""
    a, b = house("t5", 0), house("t5", 1)
    made = weft.build({"merge_method": "passthrough", "modules": {
        "encoder": {"models": [str(a)]}, "decoder": {"models": [str(a)]}, "shared": {"models": [str(b)]},
    }})  # fmt: skip
    mine, theirs = stored(a), stored(b)
    assert set(made) == set(mine)
    changed = {
        n
        for n in made
        if torch.equal(made.tensor(n).float(), theirs[n]) and not torch.equal(mine[n], theirs[n])
    }
    assert changed == {"shared.weight"}


@pytest.mark.parametrize("name", MIXTURES)
def test_both_layouts_of_experts(name: str, house: House, tmp_path: Path) -> None:
    """Fused tensors (transformers 5 in memory) merge to the same model as one tensor an expert (4, and files)."""
    split = weft.save(weft.merge([house(name, 0), house(name, 1)]), tmp_path / "split").path
    fused = weft.save(weft.merge([house(name, 0, True), house(name, 1, True)]), tmp_path / "fused").path
    assert any(".experts.gate_up_proj" in n for n in stored(fused))
    assert not any(".experts.gate_up_proj" in n for n in stored(split))
    found = layout(weft.load(fused)).experts
    assert {e.count for e in found.values()} == {e.count for e in layout(weft.load(split)).experts.values()}
    torch.testing.assert_close(
        answer(name, woken(name, fused)), answer(name, woken(name, split)), rtol=0, atol=1e-6
    )
