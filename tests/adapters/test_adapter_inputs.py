"""Every kind of adapter over its base: equal to PEFT's own merge, or to the definition written out dense."""

import json
import os
from pathlib import Path

import adapter_models as small
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn

import weft
from weft.adapters.apply import apply_adapters
from weft.adapters.factors import as_adapter
from weft.checkpoints.adapted import Adapted
from weft.checkpoints.adapters import load_adapter
from weft.checkpoints.memory import StateDict
from weft.errors import DataError, UsageError

DATA = Path(os.environ.get("WEFT_DATA", "../shared/data")) / "checkpoints" / "sd2_lora"


class Net(nn.Module):
    """A convolution, a pointwise one and a linear layer with biases."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 6, 3)
        self.point = nn.Conv2d(6, 5, 1)
        self.line = nn.Linear(5, 8)

    def forward(self, x):
        return self.line(self.point(self.conv(x)).mean((2, 3)))


class Experts(nn.Module):
    def __init__(self, turned):
        super().__init__()
        self.is_transposed = turned
        shapes = ((3, 5, 8), (3, 4, 5)) if turned else ((3, 8, 5), (3, 5, 4))
        self.gate_up_proj = nn.Parameter(torch.randn(shapes[0]))
        self.down_proj = nn.Parameter(torch.randn(shapes[1]))


class Moe(nn.Module):
    def __init__(self, turned=False):
        super().__init__()
        torch.manual_seed(0)
        self.experts = Experts(turned)
        self.line = nn.Linear(5, 5)


def adapted(model, peft, tmp_path, merge=True):
    peft.save_pretrained(tmp_path / "adapter")
    made = Adapted(weft.load(model), load_adapter(tmp_path / "adapter"))
    return small.distance(small.state_of(made), small.merged(peft))


LLAMA = {
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 2}),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=["q_proj", "up_proj"]),
    "lokr-both": LoKrConfig(r=1, alpha=5, target_modules=["up_proj"], decompose_both=True, decompose_factor=4),
    "dora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "embed_tokens"], use_dora=True),
    "bias": LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True, bias="lora_only"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LLAMA)
def test_kinds_on_llama(tmp_path, kind):
    model = small.llama(attention_bias=True)
    assert adapted(model, small.adapted(model, LLAMA[kind]), tmp_path) < 1e-6


GPT2 = {
    "ia3": IA3Config(
        target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
    ),
    "dora": LoraConfig(r=3, target_modules=["c_attn", "c_fc"], use_dora=True, fan_in_fan_out=True),
}  # fmt: skip


@pytest.mark.parametrize("kind", GPT2)
def test_kinds_on_gpt2_which_stores_weights_transposed(tmp_path, kind, monkeypatch):
    monkeypatch.setattr("weft.checkpoints.adapted._BLOCK", 64)
    model = small.gpt2()
    assert adapted(model, small.adapted(model, GPT2[kind]), tmp_path) < 1e-6


CONVOLUTIONS = {
    "lora": LoraConfig(r=2, lora_alpha=5, target_modules=["conv", "point", "line"]),
    "dora": LoraConfig(r=2, lora_alpha=5, target_modules=["conv", "line"], use_dora=True),
    "ia3": IA3Config(target_modules=["conv", "point", "line"], feedforward_modules=["conv"]),
    "loha": LoHaConfig(r=2, target_modules=["conv", "point"]),
    "loha-tucker": LoHaConfig(r=2, target_modules=["conv"], use_effective_conv2d=True),
    "lokr": LoKrConfig(r=2, target_modules=["conv", "point"]),
    "lokr-tucker": LoKrConfig(r=1, target_modules=["conv"], use_effective_conv2d=True),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_kinds_on_convolutions(tmp_path, kind):
    model = Net()
    assert adapted(model, small.adapted(model, CONVOLUTIONS[kind]), tmp_path) < 1e-6


@pytest.mark.parametrize("turned", [False, True])
def test_stacked_experts(tmp_path, turned):
    model = Moe(turned)
    config = LoraConfig(
        r=2, lora_alpha=5, target_modules=["line"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"], rank_pattern={"experts": 2},
    )  # fmt: skip
    peft = small.adapted(model, config)
    peft.save_pretrained(tmp_path / "adapter")
    want = small.merged(peft)
    base = weft.load(model)
    got = Adapted(base, load_adapter(tmp_path / "adapter"))
    assert got.grain("experts.gate_up_proj") == model.experts.gate_up_proj.shape[-1]
    state = small.state_of(got)
    for name, value in want.items():
        assert torch.allclose(state[name], value, atol=1e-5), name
    part = got.read("experts.down_proj", got.grain("experts.down_proj") * 3, None)
    assert torch.allclose(part, state["experts.down_proj"].flatten()[-len(part) :])
    # each expert is a weight of its own to the algebra
    adapter = as_adapter(tmp_path / "adapter", base)
    assert adapter.rank("experts.down_proj[2]") == 2
    delta = adapter.factors("experts.down_proj[2]").delta()
    assert torch.allclose(delta, state["experts.down_proj"][2] - model.experts.down_proj[2].double())


def test_experts_as_older_versions_of_peft_stored_them(tmp_path):
    """≤ 0.18: A read the first axis of the expert whatever it means; told apart by shape."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 5, generator=generator)
    a, b = torch.randn(6, 8, generator=generator), torch.randn(5, 6, generator=generator)
    folder = tmp_path / "old"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.w"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    keys = [f"base_model.model.experts.lora_{x}.weight" for x in "AB"]
    save_file(dict(zip(keys, (a, b), strict=True)), folder / "adapter_model.safetensors")
    got = Adapted(StateDict({"experts.w": weight}), load_adapter(folder)).tensor("experts.w")
    delta = torch.einsum("ore,eri->eio", b.reshape(5, 2, 3), a.reshape(3, 2, 8)) * 2
    assert torch.allclose(got, (weight + delta).double(), atol=1e-5)
    with pytest.raises(DataError, match="do not fit its parameters"):
        Adapted(StateDict({"experts.w": weight[:, :7]}), load_adapter(folder))
    square = {k: torch.randn(s) for k, s in zip(keys, ((6, 5), (5, 6)), strict=True)}
    save_file(square, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match="more than one way"):
        Adapted(StateDict({"experts.w": torch.randn(3, 5, 5)}), load_adapter(folder))


def image_file(path, tensors, metadata=None):
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata)
    return path


def image_base():
    g = torch.Generator().manual_seed(3)
    return {
        "model.diffusion_model.in_blocks.1.0.to_q.weight": torch.randn(6, 4, generator=g),
        "model.diffusion_model.in_blocks.1.0.to_q.bias": torch.randn(6, generator=g),
        "model.diffusion_model.mid_block.conv.weight": torch.randn(5, 3, 3, 3, generator=g),
        "model.diffusion_model.mid_block.proj.weight": torch.randn(5, 3, 1, 1, generator=g),
    }


def test_kohya_names_are_found_by_listing_the_bases(tmp_path):
    state, g = image_base(), torch.Generator().manual_seed(4)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    q, c, p = r(2, 4), r(2, 3, 1, 1), r(2, 3)
    tensors = {
        "lora_unet_in_blocks_1_0_to_q.lora_down.weight": q,
        "lora_unet_in_blocks_1_0_to_q.lora_up.weight": (q_up := r(6, 2)),
        "lora_unet_in_blocks_1_0_to_q.alpha": torch.tensor(1.0),
        "lora_unet_in_blocks_1_0_to_q.diff_b": (bias := r(6)),
        "lora_unet_mid_block_conv.lora_down.weight": c,
        "lora_unet_mid_block_conv.lora_mid.weight": (mid := r(2, 2, 3, 3)),
        "lora_unet_mid_block_conv.lora_up.weight": (c_up := r(5, 2, 1, 1)),
        "lora_unet_mid_block_proj.lora_down.weight": p,
        "lora_unet_mid_block_proj.lora_up.weight": (p_up := r(5, 2)),
    }
    got = apply_adapters(StateDict(state), [image_file(tmp_path / "k.safetensors", tensors)])
    root = "model.diffusion_model."
    conv = torch.einsum("om,mnhw,ni->oihw", c_up[..., 0, 0], mid, c[..., 0, 0])
    want = {
        f"{root}in_blocks.1.0.to_q.weight": 0.5 * q_up @ q,
        f"{root}in_blocks.1.0.to_q.bias": bias,
        f"{root}mid_block.conv.weight": conv,
        f"{root}mid_block.proj.weight": (p_up @ p)[..., None, None],
    }
    for name, delta in want.items():
        assert torch.allclose(got.tensor(name), (state[name] + delta).double(), atol=1e-5), name
    # half the file in another's names: nothing is dropped silently
    tensors["lora_te_text_model_layers_0_q.lora_down.weight"] = q
    tensors["lora_te_text_model_layers_0_q.lora_up.weight"] = q_up
    with pytest.raises(DataError, match="have no place in it"):
        apply_adapters(StateDict(state), [image_file(tmp_path / "k2.safetensors", tensors)])
    tensors["lora_unet_mid_block_conv.lora_side.weight"] = q
    with pytest.raises(DataError, match="lora_side"):
        load_adapter(image_file(tmp_path / "k3.safetensors", tensors))


def test_underscored_names_that_two_weights_share_are_refused(tmp_path):
    tensors = {
        "lora_unet_a_b.lora_down.weight": torch.randn(1, 3),
        "lora_unet_a_b.lora_up.weight": torch.randn(3, 1),
    }
    base = StateDict({"a.b.weight": torch.randn(3, 3), "a_b.weight": torch.randn(3, 3)})
    with pytest.raises(DataError, match="may be"):
        apply_adapters(base, [image_file(tmp_path / "k.safetensors", tensors)])


def test_lycoris_files(tmp_path):
    state, g = image_base(), torch.Generator().manual_seed(4)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    name, conv = "lora_unet_in_blocks_1_0_to_q", "lycoris_mid_block_conv"
    loha = {f"{name}.hada_{k}": t for k, t in
            {"w1_a": r(6, 2), "w1_b": r(2, 4), "w2_a": r(6, 2), "w2_b": r(2, 4)}.items()}  # fmt: skip
    lokr = {f"{conv}.lokr_w1": r(5, 1), f"{conv}.lokr_w2": r(1, 3, 3, 3)}
    alphas = {f"{name}.alpha": torch.tensor(3.0), f"{conv}.alpha": torch.tensor(7.0)}
    got = apply_adapters(StateDict(state), [image_file(tmp_path / "l.safetensors", loha | lokr | alphas)])
    w1a, w1b, w2a, w2b = loha.values()
    delta = 1.5 * (w1a @ w1b) * (w2a @ w2b)
    full = "model.diffusion_model.in_blocks.1.0.to_q.weight"
    assert torch.allclose(got.tensor(full), (state[full] + delta).double(), atol=1e-5)
    w1, w2 = lokr.values()
    full = "model.diffusion_model.mid_block.conv.weight"
    # a whole product has no rank, so its alpha does not count
    assert torch.allclose(
        got.tensor(full), (state[full] + torch.kron(w1[..., None, None], w2)).double(), atol=1e-5
    )
    del loha[f"{name}.hada_w2_b"]
    with pytest.raises(DataError, match="lacks some of its factors"):
        load_adapter(image_file(tmp_path / "l2.safetensors", loha))


def test_diffusers_names_and_header(tmp_path):
    g = torch.Generator().manual_seed(4)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    base = {"blocks.0.attn1.to_q.weight": r(4, 4), "blocks.0.attn1.to_out.0.weight": r(4, 4)}
    down, up, down2, up2 = r(2, 4), r(4, 2), r(2, 4), r(4, 2)
    old = {"blocks.0.attn1.processor.to_q_lora.down.weight": down,
           "blocks.0.attn1.processor.to_q_lora.up.weight": up,
           "blocks.0.attn1.processor.to_out_lora.down.weight": down2,
           "blocks.0.attn1.processor.to_out_lora.up.weight": up2}  # fmt: skip
    new = {"unet.blocks.0.attn1.to_q.lora_A.weight": down, "unet.blocks.0.attn1.to_q.lora_B.weight": up,
           "unet.blocks.0.attn1.to_out.0.lora_A.weight": down2,
           "unet.blocks.0.attn1.to_out.0.lora_B.weight": up2}  # fmt: skip
    header = {
        "lora_adapter_metadata": json.dumps({"unet.r": 2, "unet.lora_alpha": 3, "unet.rank_pattern": {}})
    }
    for scale, path in [
        (1.0, image_file(tmp_path / "old.safetensors", old)),
        (1.0, image_file(tmp_path / "new.safetensors", new)),
        (1.5, image_file(tmp_path / "told.safetensors", new, header)),
    ]:
        got = apply_adapters(StateDict(base), [path])
        for name, delta in (("to_q", up @ down), ("to_out.0", up2 @ down2)):
            full = f"blocks.0.attn1.{name}.weight"
            assert torch.allclose(got.tensor(full), (base[full] + scale * delta).double(), atol=1e-5)


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not here")
def test_real_files(tmp_path):
    adapter = as_adapter(DATA / "pop.safetensors")
    assert len(adapter.names) == 128 and {adapter.rank(n) for n in adapter.names} == {4}
    tensors = load_file(DATA / "pop.safetensors")
    base = {n.removeprefix("unet."): torch.zeros(adapter.shapes(n)) for n in adapter.names}
    got = apply_adapters(StateDict(base), [DATA / "pop.safetensors"])
    for name in list(base)[::17]:
        module = f"unet.{name.removesuffix('.weight')}"
        want = tensors[f"{module}.lora.up.weight"].double() @ tensors[f"{module}.lora.down.weight"].double()
        assert torch.allclose(got.tensor(name), want, atol=1e-7)
    del base["up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_k.weight"]
    with pytest.raises(DataError, match=r"attn1\.to_k"):
        apply_adapters(StateDict(base), [DATA / "pop.safetensors"])


def test_strengths(tmp_path):
    model = small.llama()
    first, second = small.lora(model, 1), small.lora(model, 2, r=2)
    for i, peft in enumerate((first, second)):
        peft.save_pretrained(tmp_path / str(i))
    got = small.state_of(apply_adapters(model, [tmp_path / "0", tmp_path / "1"], [0.5, -2.0]))
    ours, one, two = model.double().state_dict(), small.merged(first), small.merged(second)
    want = {n: t + 0.5 * (one[n] - t) - 2.0 * (two[n] - t) for n, t in ours.items()}
    assert small.distance(got, want) < 1e-6
    with pytest.raises(UsageError, match="as many weights"):
        apply_adapters(model, [tmp_path / "0"], [1.0, 2.0])


def test_ia3_of_another_size_is_refused(tmp_path):
    model = small.llama()
    small.adapted(model, LLAMA["ia3"]).save_pretrained(tmp_path)
    cut = {n: t[:4] if n.endswith("k_proj.weight") else t for n, t in model.state_dict().items()}
    with pytest.raises(DataError, match=r"8 factors of \(IA\)³ do not fit"):
        Adapted(StateDict(cut), load_adapter(tmp_path))
