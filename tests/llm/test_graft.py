"""A text model merged into the language trunk of a vision-language model, and experts stored in two ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from zoo import MIXTURES, TEXT, answer, born, housed, transformers, woken

import weft
from weft.checkpoints.memory import StateDict
from weft.errors import DataProblems
from weft.llm.experts import experts_like
from weft.llm.graft import frame_of, name_map

pytest.importorskip("transformers")
TRUNKS = {"llava": ("LlamaConfig", "LlamaForCausalLM"), "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
          "qwen2_5_vl": ("Qwen2Config", "Qwen2ForCausalLM")}  # fmt: skip


def text_model(name: str, seed: int) -> nn.Module:
    """A language model of the shapes of a vision model's trunk."""
    hf, (config, cls) = transformers(), TRUNKS[name]
    more = {} if name == "qwen2_5_vl" else {"head_dim": 8}
    torch.manual_seed(seed)
    made = getattr(hf, cls)(getattr(hf, config)(**TEXT, num_hidden_layers=3, **more))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("in_memory_names", [False, True])
def test_text_models_merge_into_a_vision_models_trunk(
    name: str, in_memory_names: bool, tmp_path: Path
) -> None:
    vision, text = born(name, 0), text_model(name, 1)
    recipe = {"merge_method": "linear", "models": [
        {"model": str(housed(vision, tmp_path / "vision", in_memory_names)), "parameters": {"weight": 0.75}},
        {"model": str(housed(text, tmp_path / "text")), "parameters": {"weight": 0.25}},
    ]}  # fmt: skip
    saved = weft.save(weft.build(recipe), tmp_path / "out")
    theirs = dict(text.named_parameters())
    with torch.no_grad():  # what transformers calls things in memory
        for key, parameter in vision.named_parameters():
            other = theirs.get(key.replace("language_model.", ""))
            if other is not None:
                parameter.copy_((0.75 * parameter.double() + 0.25 * other.double()).float())
    torch.testing.assert_close(answer(name, woken(name, saved.path)), answer(name, vision), rtol=0, atol=1e-5)
    carried = saved.manifest["carried"]
    assert carried and all("vis" in n or "projector" in n for n in carried)
    assert all(why.startswith("kept from") for why in carried.values())


def test_a_frankenmerge_of_a_vision_models_trunk(tmp_path: Path) -> None:
    vision, text = (
        housed(born("llava", 0), tmp_path / "vision"),
        housed(text_model("llava", 1), tmp_path / "text"),
    )
    recipe = {"merge_method": "passthrough", "frame": str(vision), "slices": [
        {"sources": [{"model": str(vision), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(text), "layer_range": [0, 3]}]},
    ]}  # fmt: skip
    made = weft.build(recipe)
    assert made.config is not None and made.config["text_config"]["num_hidden_layers"] == 5
    assert made.config["vision_config"]["num_hidden_layers"] == 2
    out = weft.save(made, tmp_path / "out").path
    answer("llava", woken("llava", out))
    stored, source = load_file(out / "model.safetensors"), load_file(text / "model.safetensors")
    for i in range(3):
        for key in [k for k in source if k.startswith(f"model.layers.{i}.")]:
            new = "language_model." + key.replace(f"layers.{i}.", f"layers.{2 + i}.")
            assert torch.equal(stored[new], source[key])


def test_models_with_and_without_a_head(tmp_path: Path) -> None:
    """GPT-2 without its head calls its blocks `h.`, with it `transformer.h.`."""
    whole = born("gpt2", 0)
    bare = transformers().GPT2Model(whole.config)  # type: ignore[attr-defined]
    paths = [housed(whole, tmp_path / "whole"), housed(bare, tmp_path / "bare")]
    recipe = {"method": "linear", "models": [str(p) for p in reversed(paths)]}
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    with torch.no_grad():
        for a, b in zip(whole.transformer.parameters(), bare.parameters(), strict=True):  # type: ignore[union-attr]
            a.copy_((a + b) / 2)
    torch.testing.assert_close(answer("gpt2", woken("gpt2", out)), answer("gpt2", whole), rtol=0, atol=1e-5)


def test_a_head_of_its_own_in_a_tied_frame(tmp_path: Path) -> None:
    hf = transformers()
    vision = housed(born("gemma3", 0), tmp_path / "vision")
    config = hf.Gemma3TextConfig(**TEXT, head_dim=8, num_hidden_layers=3, tie_word_embeddings=False)
    text = housed(hf.Gemma3ForCausalLM(config), tmp_path / "text")
    made = weft.build({"method": "linear", "models": [str(vision), str(text)]})
    assert made.config is not None and made.config["tie_word_embeddings"] is False
    out = weft.save(made, tmp_path / "out").path
    model = woken("gemma3", out)
    head, embedding = model.lm_head.weight, model.get_input_embeddings().weight  # type: ignore
    assert head.data_ptr() != embedding.data_ptr()
    tied, own = load_file(vision / "model.safetensors"), load_file(text / "model.safetensors")
    expected = (tied["language_model.model.embed_tokens.weight"] + own["lm_head.weight"]) / 2
    torch.testing.assert_close(head.detach(), expected)


def test_names_map_by_blocks_and_not_by_chance() -> None:
    def state(*names: str) -> StateDict:
        return StateDict({n: torch.ones(2) for n in names})

    text = state("model.layers.0.a", "model.layers.1.a", "model.embed.w", "lm_head.w")
    whole = state("model.lm.layers.0.a", "model.lm.layers.1.a", "model.lm.embed.w", "lm_head.w",
                  "model.vision.layers.0.a", "model.vision.layers.1.a")  # fmt: skip
    assert name_map(text, whole) == {
        "model.layers.0.a": "model.lm.layers.0.a", "model.layers.1.a": "model.lm.layers.1.a",
        "model.embed.w": "model.lm.embed.w", "lm_head.w": "lm_head.w",
    }  # fmt: skip
    assert frame_of([text, whole]) is whole and frame_of([whole, text]) is whole
    assert frame_of([text, text]) is None and frame_of([whole, state("h.0.b", "h.1.b")]) is None
    assert name_map(state("h.0.b", "h.1.b"), whole) is None


# -- experts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("fused_first", [False, True])
def test_experts_stored_in_two_ways_merge(name: str, fused_first: bool, tmp_path: Path) -> None:
    left, right = born(name, 0), born(name, 1)
    paths = [housed(left, tmp_path / "a", fused_first), housed(right, tmp_path / "b", not fused_first)]
    recipe = {"method": "linear", "models": [str(p) for p in paths]}
    out = weft.save(weft.build(recipe), tmp_path / "out").path
    fused = any("gate_up_proj" in k for k in load_file(out / "model.safetensors"))
    assert fused == fused_first  # as the first model has them
    with torch.no_grad():
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            a.copy_((a + b) / 2)
        for a, b in zip(left.buffers(), right.buffers(), strict=True):
            a.copy_((a + b) / 2)
    torch.testing.assert_close(answer(name, woken(name, out)), answer(name, left), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_one_layout_shown_as_the_other_has_its_bytes(name: str, tmp_path: Path) -> None:
    split, fused = (weft.load(housed(born(name, 0), tmp_path / str(i), i == 1)) for i in range(2))
    for shown, like in ((experts_like(split, fused), fused), (experts_like(fused, split), split)):
        assert shown.tensors == {n: shown.info(n) for n in like} and len(shown) == len(like)
        for n in like:
            if "e_score" not in n:
                assert torch.equal(shown.tensor(n), like.tensor(n)), n
    assert experts_like(split, split) is split


def experts(
    count: int, names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"), **shape: Any
) -> StateDict:
    state = {"layers.0.attn.w": torch.ones(2)}
    for e in range(count):
        for n in names:
            state[f"layers.0.mlp.experts.{e}.{n}.weight"] = torch.ones(
                *((4, 3) if n == "down_proj" else (3, 4))
            )
    return StateDict(state, origin=f"of {count}")


def test_mixtures_that_do_not_go_together() -> None:
    fused = StateDict({"layers.0.moe.experts.gate_up_proj": torch.ones(2, 6, 4),
                       "layers.0.moe.experts.down_proj": torch.ones(2, 4, 3)}, origin="fused")  # fmt: skip
    assert experts_like(experts(2), fused).info("layers.0.moe.experts.gate_up_proj").shape == (2, 6, 4)
    with pytest.raises(DataProblems, match=r"of 3 has 3 experts in a block, fused 2"):
        experts_like(experts(3), fused)
    transposed = StateDict({"layers.0.mlp.experts.gate_up_proj": torch.ones(2, 4, 6),
                            "layers.0.mlp.experts.down_proj": torch.ones(2, 3, 4)}, origin="other")  # fmt: skip
    with pytest.raises(DataProblems, match="fused as"):
        experts_like(transposed, experts(2))
    with pytest.raises(DataProblems, match="not of one shape"):
        experts_like(experts(2), transposed)
    odd = experts(2, ("alpha", "beta"))
    with pytest.raises(DataProblems, match="its tensors are alpha"):
        experts_like(odd, fused)
