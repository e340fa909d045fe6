"""LoRA folders: equal to the dense formula and to PEFT's own merge, and strict about what fits."""

import json
import pickle
from math import sqrt
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.checkpoints.adapted import Adapted
from weft.checkpoints.adapters import load_adapter
from weft.checkpoints.load import load
from weft.errors import DataError, UsageError


@pytest.fixture
def base(tmp_path):
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "base"
    folder.mkdir()
    state = {
        "model.embed_tokens.weight": torch.randn(11, 6, generator=generator),
        "model.q.weight": torch.randn(8, 6, generator=generator),
        "model.q.bias": torch.randn(8, generator=generator),
        "model.conv.weight": torch.randn(5, 3, 2, 2, generator=generator),
    }
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    return folder, state


def adapter(tmp_path, tensors, **config):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"base_model.model.{k}": v for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def factors(module, a, b):
    return {f"{module}.lora_A.weight": torch.randn(*a), f"{module}.lora_B.weight": torch.randn(*b)}


def close(actual, expected):
    assert actual.dtype == torch.float64 and torch.allclose(actual, expected.double(), atol=1e-12)


def test_linear_by_rows(tmp_path, base):
    path, state = base
    lora = factors("model.q", (2, 6), (8, 2))
    adapted = load(adapter(tmp_path, lora), base=path)
    a, b = (t.double() for t in lora.values())
    expected = state["model.q.weight"].double() + 1.5 * b @ a
    close(adapted.tensor("model.q.weight"), expected)
    assert adapted.grain("model.q.weight") == 6
    close(adapted.read("model.q.weight", 12, 30), expected.flatten()[12:30])
    assert torch.equal(adapted.read("model.q.weight", dtype=torch.float16), expected.flatten().half())
    assert torch.equal(adapted.tensor("model.q.bias"), state["model.q.bias"])
    with pytest.raises(UsageError, match="grain"):
        adapted.read("model.q.weight", 3, 9)
    assert len(adapted.files) == 2


def test_scales_patterns_and_bias(tmp_path, base):
    path, state = base
    lora = factors("model.q", (4, 6), (8, 4)) | {"model.q.lora_B.bias": torch.randn(8)}
    folder = adapter(tmp_path, lora, rank_pattern={"q": 4}, alpha_pattern={"^model.q": 5}, use_rslora=True)
    adapted = load(f"{path}+{folder}")
    a, b, bias = (t.double() for t in lora.values())
    close(adapted.tensor("model.q.weight"), state["model.q.weight"] + 5 / sqrt(4) * b @ a)
    close(adapted.tensor("model.q.bias"), state["model.q.bias"].double() + 5 / sqrt(4) * bias)


def test_embedding_comes_apart_from_its_tied_head(tmp_path, base):
    path, state = base
    lora = {
        "model.embed_tokens.lora_embedding_A": torch.randn(2, 11),
        "model.embed_tokens.lora_embedding_B": torch.randn(6, 2),
    }
    adapted = load(adapter(tmp_path, lora), base=path)
    a, b = (t.double() for t in lora.values())
    expected = state["model.embed_tokens.weight"].double() + 1.5 * (b @ a).T
    close(adapted.tensor("model.embed_tokens.weight"), expected)
    close(adapted.read("model.embed_tokens.weight", 6, 18), expected.flatten()[6:18])
    assert torch.equal(adapted.tensor("lm_head.weight"), state["model.embed_tokens.weight"])
    assert not adapted.aliases and adapted.config == {"tie_word_embeddings": False}


def test_convolution_dora_and_full_replacements(tmp_path, base):
    path, state = base
    lora = factors("model.conv", (2, 3, 2, 2), (5, 2, 1, 1)) | factors("model.q", (2, 6), (8, 2))
    more = {
        "model.q.lora_magnitude_vector": torch.rand(8) + 1,
        "model.embed_tokens.weight": torch.randn(11, 6),
    }
    adapted = load(adapter(tmp_path, {**lora, **more}, use_dora=True), base=path)
    a, b, qa, qb = (t.double() for t in lora.values())
    delta = (b.flatten(1) @ a.flatten(1)).reshape(5, 3, 2, 2)
    close(adapted.tensor("model.conv.weight"), state["model.conv.weight"] + 1.5 * delta)
    weight = state["model.q.weight"] + 1.5 * qb @ qa
    dora = more["model.q.lora_magnitude_vector"][:, None] * weight / weight.norm(dim=1, keepdim=True)
    close(adapted.tensor("model.q.weight"), dora)
    assert torch.equal(adapted.tensor("model.embed_tokens.weight"), more["model.embed_tokens.weight"])


def test_update_over_a_replaced_embedding(tmp_path, base):
    lora = {
        f"model.embed_tokens.lora_embedding_{p}": torch.randn(*s) for p, s in [("A", (2, 11)), ("B", (6, 2))]
    }
    own = torch.randn(11, 6)
    folder = adapter(tmp_path, lora | {"model.embed_tokens.base_layer.weight": own})
    adapted = pickle.loads(pickle.dumps(load(folder, base=base[0])))  # another process can have it
    a, b = (t.double() for t in lora.values())
    close(adapted.tensor("model.embed_tokens.weight"), own + 1.5 * (b @ a).T)


def test_conv1d_is_stored_transposed(tmp_path):
    state = {"h.attn.weight": torch.randn(6, 6), "h.mlp.weight": torch.randn(6, 9)}
    lora = factors("transformer.h.attn", (2, 6), (6, 2)) | factors("transformer.h.mlp", (2, 6), (9, 2))
    folder = adapter(tmp_path, lora, fan_in_fan_out=True)
    adapted = Adapted(load(state), load_adapter(folder))  # the base lacks the prefix of its class
    a, b, c, d = (t.double() for t in lora.values())
    close(adapted.tensor("h.attn.weight"), state["h.attn.weight"] + 1.5 * (b @ a).T)
    close(adapted.read("h.mlp.weight", 9, 27), (state["h.mlp.weight"] + 1.5 * (d @ c).T).flatten()[9:27])


def test_every_tensor_without_a_place_is_listed(tmp_path, base):
    path, _ = base
    lora = (
        factors("model.x", (2, 6), (8, 2))
        | factors("model.y", (2, 6), (8, 2))
        | factors("model.q", (2, 6), (8, 2))
    )
    with pytest.raises(DataError, match=r"(?s)model\.x\.weight.*model\.y\.weight"):
        load(adapter(tmp_path, lora), base=path)
    with pytest.raises(DataError, match=r"the update has shape \[8, 5\], the base \[8, 6\]"):
        load(adapter(tmp_path, factors("model.q", (2, 5), (8, 2))), base=path)


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "OFT"},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa"},
        {"r": 3},
        {"rank_pattern": {"(a+)+$": 2}},
    ],
    ids=str,
)
def test_what_is_not_understood_is_refused(tmp_path, base, config):
    with pytest.raises(DataError, match="the adapter"):
        load(adapter(tmp_path, factors("model.q", (2, 6), (8, 2)), **config), base=base[0])


def test_unknown_lora_tensors_and_half_pairs_are_refused(tmp_path, base):
    with pytest.raises(DataError, match="no LoRA tensor weft knows"):
        load(adapter(tmp_path, {"model.q.lora_E": torch.ones(2)}), base=base[0])
    with pytest.raises(DataError, match="lacks one of its factors"):
        load(adapter(tmp_path, {"model.q.lora_A.weight": torch.ones(2, 6)}), base=base[0])


def test_base_named_by_the_adapter(tmp_path, base):
    lora = factors("model.q", (2, 6), (8, 2))
    folder = adapter(tmp_path, lora, base_model_name_or_path="../base")
    (folder / "global_step.pt").write_bytes(b"")  # what a trainer leaves there is not the model
    assert "model.q.weight" in load(folder)
    with pytest.raises(UsageError, match="which is not here"):
        load(adapter(tmp_path, lora, base_model_name_or_path="/home/someone/base"))
    with pytest.raises(UsageError, match="does not say which model"):
        load(adapter(tmp_path, lora))
    with pytest.raises(UsageError, match="pass it as base="):
        load(adapter(tmp_path, lora, base_model_name_or_path="http://127.0.0.1:9/x"))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}, {"bias": "all"}], ids=str)
def test_equal_to_pefts_merge(tmp_path, options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    model = torch.nn.Sequential()
    model.add_module("embed", torch.nn.Embedding(7, 6))
    model.add_module("conv", torch.nn.Conv2d(3, 4, 3))
    model.add_module("q", torch.nn.Linear(6, 8))
    model.add_module("head", torch.nn.Linear(8, 5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    targets = ["q"] if options.get("use_dora") else ["q", "conv", "embed"]
    config = peft.LoraConfig(
        r=2, lora_alpha=5, target_modules=targets, modules_to_save=["head"],
        alpha_pattern={targets[-1]: 3},
        init_lora_weights=False, **options,
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(tmp_path / "lora")
    assert load_file(tmp_path / "lora" / "adapter_model.safetensors")
    merged = wrapped.merge_and_unload().state_dict()
    adapted = load(tmp_path / "lora", base=state)
    assert set(adapted) == set(merged)
    for name, tensor in merged.items():
        assert torch.allclose(adapted.tensor(name, dtype=torch.float32), tensor, atol=1e-5), name


def test_another_scale_is_another_identity(tmp_path: Path) -> None:
    """An interrupted merge must not go on with another alpha: it stands in no weight file."""
    save_file({"a.weight": torch.zeros(4, 3)}, tmp_path / "model.safetensors")
    folder = tmp_path / "lora"
    folder.mkdir()
    factors = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(4, 2)}
    save_file(
        {f"base_model.model.a.{n}": t for n, t in factors.items()}, folder / "adapter_model.safetensors"
    )
    seen = set()
    for alpha in (2, 4):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "target_modules": ["a"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        seen.add(load(str(folder), base=str(tmp_path / "model.safetensors")).identity())
    assert len(seen) == 2 and None not in seen
