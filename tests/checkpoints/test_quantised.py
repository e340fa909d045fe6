"""float8 weights with scales, read as what they stand for; packed formats refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.load import load
from weft.errors import DataError

F8 = torch.float8_e4m3fn


def folder(tmp_path, tensors, **config):
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return load(tmp_path)


def expand(scale, block, shape):
    rows = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return rows.repeat_interleave(block[1], 1)[:, : shape[1]]


def test_blocks(tmp_path):
    weight = torch.randn(7, 10).to(F8)
    scale = torch.rand(3, 3) + 0.5
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale, "b.weight": torch.ones(3)}
    quantisation = {"quant_method": "fp8", "weight_block_size": [3, 4]}
    model = folder(tmp_path, tensors, quantization_config=quantisation, model_type="toy")
    assert list(model) == ["a.weight", "b.weight"] or set(model) == {"a.weight", "b.weight"}
    assert model.info("a.weight").dtype == torch.bfloat16
    expected = weight.float() * expand(scale, (3, 4), (7, 10))
    assert torch.equal(model.tensor("a.weight"), expected)
    for start, stop in [(0, 70), (3, 4), (9, 31), (69, 70), (20, 20)]:
        assert torch.equal(model.read("a.weight", start, stop), expected.flatten()[start:stop])
    exact = (weight.double() * expand(scale, (3, 4), (7, 10)).double()).to(torch.bfloat16)
    assert torch.equal(model.tensor("a.weight", dtype=torch.bfloat16), exact)
    assert model.config == {"model_type": "toy"}
    assert model.skipped == ["a.weight_scale_inv", "config.json: quantization_config"]


def test_stacked_experts_in_default_blocks(tmp_path):
    weight, scale = torch.randn(2, 130, 140).to(F8), torch.rand(2, 2, 2)
    model = folder(tmp_path, {"e.w": weight, "e.w_scale_inv": scale})
    expected = torch.stack([weight[i].float() * expand(scale[i], (128, 128), (130, 140)) for i in range(2)])
    assert torch.equal(model.tensor("e.w"), expected)
    low, high = 129 * 140 + 130, 131 * 140 + 5  # across the boundary of two experts
    assert torch.equal(model.read("e.w", low, high), expected.flatten()[low:high])


@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,)], ids=str)
def test_one_scale_a_tensor_or_a_row(tmp_path, shape):
    weight, scale = torch.randn(6, 4).to(F8), torch.rand(shape) + 0.5
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.input_scale": torch.ones(())}
    model = folder(tmp_path, tensors, torch_dtype="float16")
    factor = scale if scale.numel() == 1 else scale.reshape(6, 1)
    assert set(model) == {"a.weight"} and model.info("a.weight").dtype == torch.float16
    assert torch.equal(model.tensor("a.weight"), weight.float() * factor)
    assert torch.equal(model.read("a.weight", 5, 11), (weight.float() * factor).flatten()[5:11])


def test_float8_without_scales_is_left_alone(tmp_path):
    model = folder(tmp_path, {"a.weight": torch.ones(2, 2).to(F8)})
    assert model.info("a.weight").dtype == F8


def test_packed_and_misfitting_are_refused(tmp_path):
    with pytest.raises(DataError, match="gptq"):
        folder(tmp_path, {"a.weight": torch.ones(2)}, quantization_config={"quant_method": "gptq"})
    with pytest.raises(DataError, match=r"a\.qweight"):
        folder(tmp_path, {"a.qweight": torch.ones(2, dtype=torch.int32)})
    with pytest.raises(DataError, match="weight_block_size"):
        folder(tmp_path, {"a.weight": torch.ones(8, 8).to(F8), "a.weight_scale_inv": torch.ones(3, 3)})
