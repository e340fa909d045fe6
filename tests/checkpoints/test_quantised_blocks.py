"""4-bit blocks (bitsandbytes, MXFP4, NVFP4), packed integers in order of activations; what is refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import weft
from weft.checkpoints.load import load
from weft.errors import DataError

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]


def folder(path, tensors, **config):
    path.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def every_range_agrees(model, name, values, seed=0):
    flat = values.flatten()
    rng = np.random.default_rng(seed)
    assert torch.equal(model.tensor(name).double(), values.float().double())
    for start, stop in np.sort(rng.integers(0, len(flat) + 1, (25, 2)), axis=1).tolist():
        assert torch.equal(model.read(name, start, stop), flat[start:stop].float())


def bnb(rng, shape, blocksize, nested=None):
    """A weight in 4-bit blocks: what is stored, and float64 values by the definition, element by element."""
    numel = int(np.prod(shape))
    codes = rng.integers(0, 16, numel + numel % 2)
    table, blocks = rng.standard_normal(16).astype(np.float32), -(-numel // blocksize)
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "bfloat16", "shape": list(shape)}
    stored = {"": torch.from_numpy((codes[0::2] << 4 | codes[1::2]).astype(np.uint8)).reshape(-1, 1)}
    if nested is None:
        absmax = rng.random(blocks).astype(np.float32)
        stored["absmax"], factors = torch.from_numpy(absmax), absmax.astype(np.float64)
    else:
        bytes_, outer = rng.integers(0, 256, blocks), rng.standard_normal(256).astype(np.float32)
        scale = rng.random(-(-blocks // nested)).astype(np.float32)
        stored |= {"absmax": torch.from_numpy(bytes_.astype(np.uint8)),
                   "nested_absmax": torch.from_numpy(scale),
                   "nested_quant_map": torch.from_numpy(outer)}  # fmt: skip
        state |= {"nested_blocksize": nested, "nested_dtype": "float32", "nested_offset": 0.125}
        factors = [float(outer[bytes_[b]]) * float(scale[b // nested]) + 0.125 for b in range(blocks)]
    stored["quant_map"] = torch.from_numpy(table)
    text = json.dumps(state).encode()
    stored["quant_state.bitsandbytes__nf4"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    values = [float(table[codes[i]]) * float(factors[i // blocksize]) for i in range(numel)]
    tensors = {f"a.weight.{n}".rstrip("."): t for n, t in stored.items()}
    return tensors, torch.tensor(values, dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("nested", [None, 3, 256])
@pytest.mark.parametrize("shape", [(7, 11), (4, 64), (2, 3, 40)], ids=str)
def test_bitsandbytes_4_bit(tmp_path, shape, nested):
    tensors, values = bnb(np.random.default_rng(0), shape, 16, nested)
    tensors["b.weight"] = torch.ones(2)
    model = load(folder(tmp_path / "m", tensors, quantization_config={"quant_method": "bitsandbytes"}))
    assert dict(model.tensors)["a.weight"].shape == shape and set(model) == {"a.weight", "b.weight"}
    every_range_agrees(model, "a.weight", values)
    assert torch.equal(model.tensor("a.weight", dtype=torch.float64), values)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("absmax", None, "'a.weight.absmax' is missing"),
        ("absmax", torch.ones(3), "should be 5 of torch.float32, but is 3"),
        ("quant_map", torch.ones(15), "should be 16"),
        ("quant_state.bitsandbytes__nf4", b"{", "a.weight"),
        ("quant_state.bitsandbytes__nf4", b'{"shape": [7, 11], "blocksize": 0}', "no shape and blocksize"),
        ("quant_state.bitsandbytes__nf4", b'{"shape": [7, -1], "blocksize": 4}', "no shape and blocksize"),
        ("quant_state.bitsandbytes__nf4", b'{"shape": [7, 13], "blocksize": 16}', "should be 46"),
    ],
)
def test_damaged_bitsandbytes(tmp_path, name, change, message):
    tensors, _ = bnb(np.random.default_rng(0), (7, 11), 16)
    if change is None:
        del tensors[f"a.weight.{name}"]
    elif isinstance(change, bytes):
        tensors[f"a.weight.{name}"] = torch.frombuffer(bytearray(change), dtype=torch.uint8)
    else:
        tensors[f"a.weight.{name}"] = change
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_format": torch.ones(1, dtype=torch.uint8)}, "layout made for one GPU"),
        ({"a.weight_format": torch.ones(0, dtype=torch.uint8)}, "layout made for one GPU"),
        ({"a.SCB": torch.ones(3)}, r"'a\.SCB' of shape \[3\] does not fit"),
        ({"a.SCB": torch.ones(4, dtype=torch.int32)}, "does not fit"),
    ],
)
def test_damaged_llm_int8(tmp_path, change, message):
    tensors = {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)} | change
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path / "m", tensors))


def mxfp4(rng, experts, rows, groups):
    """gpt-oss blocks, and the values by the definition."""
    blocks = rng.integers(0, 256, (experts, rows, groups, 16))
    scales = rng.integers(110, 140, (experts, rows, groups))
    values = np.zeros((experts, 32 * groups, rows))
    for e, r, g, k in np.ndindex(experts, rows, groups, 32):
        byte = int(blocks[e, r, g, k // 2])
        code = byte >> 4 if k % 2 else byte & 15
        values[e, 32 * g + k, r] = E2M1[code] * 2.0 ** (int(scales[e, r, g]) - 127)
    stored = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    return {n: torch.from_numpy(v.astype(np.uint8)) for n, v in stored.items()}, torch.from_numpy(values)


def test_gpt_oss_experts_are_what_transformers_makes_of_them(tmp_path):
    mxfp4_of = pytest.importorskip("transformers.integrations.mxfp4")
    stored, values = mxfp4(np.random.default_rng(0), 3, 10, 2)
    tensors = stored | {"e.gate_up_proj_bias": torch.ones(3, 10)}
    model = load(folder(tmp_path / "m", tensors, quantization_config={"quant_method": "mxfp4"}))
    assert model.info("e.gate_up_proj").shape == (3, 64, 10)
    assert "e.gate_up_proj_bias" in model and len(model) == 2
    every_range_agrees(model, "e.gate_up_proj", values)
    theirs = mxfp4_of.convert_moe_packed_tensors(*stored.values(), dtype=torch.float32)
    assert torch.equal(model.tensor("e.gate_up_proj"), theirs)


def test_nvfp4_as_modelopt_writes_it(tmp_path):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (6, 32))
    packed = torch.from_numpy((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8))
    scale = (torch.rand(6, 2, generator=torch.Generator().manual_seed(0)) + 0.5).to(torch.float8_e4m3fn)
    tensors = {"a.weight": packed, "a.weight_scale": scale, "a.weight_scale_2": torch.tensor(0.07),
               "a.input_scale": torch.tensor(1.0)}  # fmt: skip
    model = load(folder(tmp_path / "m", tensors))
    factors = scale.double().repeat_interleave(16, 1) * torch.tensor(0.07).double()
    every_range_agrees(model, "a.weight", torch.tensor(E2M1, dtype=torch.float64)[codes] * factors)
    assert model.skipped == ["a.input_scale", "a.weight_scale", "a.weight_scale_2"]


def test_packed_integers_in_order_of_activations(tmp_path):
    rng = np.random.default_rng(2)
    codes, group = rng.integers(-8, 8, (5, 64)), rng.permutation(np.arange(64) // 16)
    words = ((codes + 8).reshape(5, 8, 8).astype(np.uint64) << np.arange(0, 32, 4, dtype=np.uint64)).sum(2)
    scale = torch.from_numpy(rng.random((5, 4))).float()
    tensors = {
        "a.weight_packed": torch.from_numpy(words.astype(np.uint32).view(np.int32)),
        "a.weight_scale": scale, "a.weight_g_idx": torch.from_numpy(group.astype(np.int32)),
        "a.weight_shape": torch.tensor([5, 64]),
    }  # fmt: skip
    model = load(folder(tmp_path / "m", tensors))
    every_range_agrees(model, "a.weight", torch.from_numpy(codes * scale.double().numpy()[:, group]))
    tensors["a.weight_shape"] = torch.tensor([5, 200])
    with pytest.raises(DataError, match=r"does not hold a weight of shape \[5, 200\]"):
        load(folder(tmp_path / "m", tensors))
    del tensors["a.weight_shape"]
    with pytest.raises(DataError, match=r"has no 'a\.weight_shape'"):
        load(folder(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("account", "message"),
    [
        ({"quant_method": "hqq"}, "quantised by hqq.*load it with hqq.*bfloat16"),
        ({"quant_method": "aqlm"}, "load it with aqlm"),
        ({"quant_method": "torchao"}, "load it with torchao"),
        ({"quant_method": "compressed-tensors", "format": "marlin-24"}, "'marlin-24'.*common layout"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "no tensor holds codes that weft knows"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"R1": {}}}},
            "rotated",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "int-quantized",
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            "'sparse-24-bitmask'",
        ),
        ({"quant_method": "awq"}, "remove quantization_config"),
    ],
)
def test_what_no_formula_decodes_says_what_to_do(tmp_path, account, message):
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path / "m", {"a.weight": torch.ones(2, 2)}, quantization_config=account))


def test_what_scales_activations_is_left_out_and_what_scales_inputs_is_refused(tmp_path):
    codes = {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.weight_scale": torch.ones(4, 1)}
    others = {"attn.k_scale": torch.ones(1), "mask_scale": torch.ones(1), "logit_scale": torch.ones(1)}
    model = load(folder(tmp_path / "m", codes | others))
    assert set(model) == {"a.weight", "mask_scale", "logit_scale"}
    assert model.skipped == ["a.weight_scale", "attn.k_scale"]
    with pytest.raises(DataError, match=r"'a\.pre_quant_scale' scales a layer's input"):
        load(folder(tmp_path / "m", codes | {"a.pre_quant_scale": torch.ones(4)}))


def test_a_node_travels_to_another_process(tmp_path):
    tensors, values = bnb(np.random.default_rng(0), (4, 64), 16)
    model = load(folder(tmp_path / "m", tensors))
    again = pickle.loads(pickle.dumps(model))
    every_range_agrees(again, "a.weight", values)
    assert again.identity() == model.identity()


def test_int8_codes_without_scales(tmp_path):
    tensors = {"a.weight": torch.ones(2, 2, dtype=torch.int8), "b.weight": torch.ones(2, dtype=torch.int8)}
    with pytest.raises(DataError) as raised:
        load(folder(tmp_path / "m", tensors, quantization_config={"quant_method": "compressed-tensors"}))
    assert "'a.weight' holds torch.int8 codes" in str(raised.value) and "'b.weight'" in str(raised.value)


def test_a_lone_file_is_decoded_too(tmp_path):
    tensors, values = bnb(np.random.default_rng(0), (4, 64), 16)
    save_file(tensors, tmp_path / "unet.safetensors")
    every_range_agrees(load(tmp_path / "unet.safetensors"), "a.weight", values)


def test_merging_a_quantised_model_streams_and_says_what_was_left(tmp_path):
    rng = np.random.default_rng(3)
    stored, experts = mxfp4(rng, 2, 24, 16)
    tensors, values = bnb(rng, (300, 700), 64)
    quantised = load(folder(tmp_path / "q", tensors | stored, torch_dtype="float32"))
    plain = {"a.weight": torch.randn(300, 700), "e.gate_up_proj": torch.randn(2, 512, 24)}
    base = load(folder(tmp_path / "p", plain, torch_dtype="float32"))
    saved = weft.save(weft.merge([quantised, base]), tmp_path / "out", memory="48MiB", threads=2)
    merged = load(tmp_path / "out")
    for name, value in (("a.weight", values), ("e.gate_up_proj", experts)):
        expected = (value.float().double() + plain[name].double()) / 2
        torch.testing.assert_close(merged.tensor(name).double(), expected, rtol=2e-7, atol=1e-30)
    assert "quantization_config" not in (merged.config or {})
    assert "a.weight.absmax" in saved.manifest["left_out"][str(tmp_path / "q")]
