"""GPTQ and AWQ against float64 references that pack by the formats' definitions, bit by bit."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.load import load
from weft.errors import DataError


def folder(path, tensors, config):
    path.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def stream(codes, bits):
    """Codes one after the other in one big number, cut into 32-bit words."""
    number = sum(int(c) << (bits * k) for k, c in enumerate(codes))
    words = [(number >> (32 * k)) & 0xFFFFFFFF for k in range(-(-len(codes) * bits // 32))]
    return np.array(words, dtype=np.uint32).view(np.int32)


def gptq(rng, out, inner, bits, size, *, version="gptq", act_order=False, sym=False, dtype=torch.float16):
    """A layer's stored tensors and its values, float64 `[out, in]`."""
    groups = -(-inner // size)
    codes = rng.integers(0, 2**bits, (inner, out))
    zeros = np.full((groups, out), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (groups, out))
    scales = torch.from_numpy(rng.random((groups, out)) * 0.1 + 0.01).to(dtype)
    group = np.arange(inner) // size
    if act_order:
        group = rng.permutation(group)
    kept = (zeros - 1) % 2**bits if version == "gptq" else zeros
    stored = {
        "qweight": torch.from_numpy(np.stack([stream(codes[:, o], bits) for o in range(out)], axis=1)),
        "qzeros": torch.from_numpy(np.stack([stream(kept[g], bits) for g in range(groups)])),
        "scales": scales,
        "g_idx": torch.from_numpy(group.astype(np.int32)),
    }
    values = (codes - zeros[group]) * scales.double().numpy()[group]
    return stored, torch.from_numpy(values.T.copy())


def config(**quantisation):
    return {"torch_dtype": "float16", "quantization_config": {"quant_method": "gptq", **quantisation}}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True], ids=["in order", "act order"])
def test_gptq(tmp_path, bits, version, act_order):
    rng = np.random.default_rng(bits)
    stored, values = gptq(rng, 64, 96, bits, 32, version=version, act_order=act_order)
    tensors = {f"l.0.q_proj.{n}": t for n, t in stored.items()} | {"l.0.q_proj.bias": torch.ones(64)}
    model = load(folder(tmp_path / "m", tensors, config(bits=bits, checkpoint_format=version, group_size=32)))
    assert list(model) == ["l.0.q_proj.bias", "l.0.q_proj.weight"]
    assert model.info("l.0.q_proj.weight").shape == (64, 96)
    assert model.info("l.0.q_proj.weight").dtype == torch.float16
    # a code less its zero point has 9 bits at most and a scale 11: float32 holds the product exactly
    assert torch.equal(model.tensor("l.0.q_proj.weight").double(), values)
    half = model.tensor("l.0.q_proj.weight", dtype=torch.float16)
    assert torch.equal(half, values.float().half())
    for start, stop in [(0, 1), (95, 97), (40 * 96 + 3, 47 * 96), (0, 0), (64 * 96 - 1, 64 * 96)]:
        part = model.read("l.0.q_proj.weight", start, stop)
        assert torch.equal(part.double(), values.flatten()[start:stop])
    assert "quantization_config" not in model.config
    assert set(model.skipped) == {*(n for n in tensors if not n.endswith("bias")),
                                  "config.json: quantization_config"}  # fmt: skip


def test_gptq_without_group_index_and_with_a_last_group_that_is_shorter(tmp_path):
    stored, values = gptq(np.random.default_rng(0), 8, 80, 4, 32)
    del stored["g_idx"]
    tensors = {f"a.{n}": t for n, t in stored.items()}
    model = load(folder(tmp_path / "m", tensors, config(bits=4, group_size=32)))
    assert torch.equal(model.tensor("a.weight").double(), values)
    with pytest.raises(DataError, match="3 groups do not make 80 inputs; state group_size"):
        load(folder(tmp_path / "unstated", tensors, config(bits=4)))


@pytest.mark.parametrize("stored_as", ["gptq", "gptq_v2"])
def test_symmetric_zero_points_whichever_way_they_are_stored(tmp_path, stored_as):
    """Writers of symmetric models label v2 zero points v1; a symmetric zero point is known anyway."""
    stored, values = gptq(np.random.default_rng(1), 16, 32, 4, 16, version=stored_as, sym=True)
    tensors = {f"a.{n}": t for n, t in stored.items()}
    model = load(folder(tmp_path / "m", tensors, config(bits=4, sym=True, checkpoint_format="gptq")))
    assert torch.equal(model.tensor("a.weight").double(), values)
    off, _ = gptq(np.random.default_rng(1), 16, 32, 4, 16, version=stored_as)
    wrong = load(folder(tmp_path / "w", {f"a.{n}": t for n, t in off.items()}, config(bits=4, sym=True)))
    with pytest.raises(DataError, match=r"'a\.qzeros': config\.json says symmetric"):
        wrong.tensor("a.weight")


def test_conv1d_of_gpt2_is_shown_transposed(tmp_path):
    stored, values = gptq(np.random.default_rng(2), 24, 16, 4, 16)
    tensors = {f"h.0.attn.c_attn.{n}": t for n, t in stored.items()}
    model = load(folder(tmp_path / "m", tensors, {**config(bits=4), "model_type": "gpt2"}))
    assert torch.equal(model.tensor("h.0.attn.c_attn.weight").double(), values.T)
    assert model.grain("h.0.attn.c_attn.weight") == 24 * 16
    account = {"quant_method": "bitsandbytes"}
    with pytest.raises(DataError, match="stores gpt2's weights transposed"):
        load(folder(tmp_path / "b", {"a.weight": torch.ones(4, 4, dtype=torch.int8), "a.SCB": torch.ones(4)},
                    {"model_type": "gpt2", "quantization_config": account}))  # fmt: skip


def awq(rng, out, inner, size):
    groups = inner // size
    codes, zeros = rng.integers(0, 16, (inner, out)), rng.integers(0, 16, (groups, out))
    scales = torch.from_numpy(rng.random((groups, out)) * 0.1 + 0.01).half()

    def pack(table):
        words = np.zeros((len(table), out // 8), dtype=np.uint64)
        for i, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words |= table[:, column::8].astype(np.uint64) << np.uint64(4 * i)
        return torch.from_numpy(words.astype(np.uint32).view(np.int32))

    group = np.arange(inner) // size
    values = (codes - zeros[group]) * scales.double().numpy()[group]
    return {"qweight": pack(codes), "qzeros": pack(zeros), "scales": scales}, torch.from_numpy(
        values.T.copy()
    )


def test_awq(tmp_path):
    stored, values = awq(np.random.default_rng(3), 48, 64, 32)
    tensors = {f"a.{n}": t for n, t in stored.items()}
    account = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    model = load(folder(tmp_path / "m", tensors, {"quantization_config": account}))
    assert model.info("a.weight").dtype == torch.float16  # config.json states none: the scales'
    assert torch.equal(model.tensor("a.weight").double(), values)
    for start, stop in [(64 * 33 + 5, 64 * 40 + 1), (63, 64), (0, 64 * 9)]:
        assert torch.equal(model.read("a.weight", start, stop).double(), values.flatten()[start:stop])
    with pytest.raises(DataError, match=r"'gemv'.*made for one kernel"):
        account["version"] = "gemv"
        load(folder(tmp_path / "m", tensors, {"quantization_config": account}))


def test_holding_reads_the_codes_once(tmp_path):
    stored, values = gptq(np.random.default_rng(4), 32, 64, 4, 32)
    model = load(folder(tmp_path / "m", {f"a.{n}": t for n, t in stored.items()}, config(bits=4)))
    reads = []
    plain = model._model.read
    model._model.read = lambda *a, **k: reads.append(a[0]) or plain(*a, **k)
    assert model.held_bytes("a.weight") == sum(t.nbytes for t in stored.values())
    model.hold("a.weight")
    for start in range(0, 32 * 64, 256):
        part = model.read("a.weight", start, start + 256).double()
        assert torch.equal(part, values.flatten()[start : start + 256])
    assert len(reads) == 4
    model.release("a.weight")
    model.read("a.weight", 0, 1)
    assert len(reads) > 4


def broken(**change):
    stored, _ = gptq(np.random.default_rng(5), 16, 32, 4, 16)
    tensors = {f"a.{n}": t for n, t in (stored | change).items() if t is not None}
    return tensors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "'a.qweight' has no scales beside it"),
        ({"scales": None, "qzeros": None}, "no qzeros and no scales"),
        ({"scales": torch.ones(0, 16)}, "not empty"),
        ({"scales": torch.ones(3, 16)}, "qzeros .* do not fit scales"),
        ({"qweight": torch.ones(4, 12, dtype=torch.int32)}, "qweight .* does not fit scales"),
        ({"qweight": torch.ones(4, 16)}, "must be int32"),
        ({"g_idx": torch.zeros(31, dtype=torch.int32)}, "each of the 32 inputs"),
        ({"qweight": None}, "a.qzeros' belongs to no weight"),
        ({"weight": torch.ones(16, 32)}, "'a.weight' is there both as codes and as values"),
    ],
)
def test_damage_is_named_when_loading(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load(folder(tmp_path / "m", broken(**change), config(bits=4)))


def test_all_damaged_layers_are_named_at_once(tmp_path):
    good = broken()
    tensors = {n.replace("a.", f"{m}."): t.clone() for m in "xyz" for n, t in good.items()}
    del tensors["x.scales"], tensors["z.qzeros"]
    with pytest.raises(DataError) as raised:
        load(folder(tmp_path / "m", tensors, config(bits=4)))
    assert "'x.qweight'" in str(raised.value) and "'z.qweight'" in str(raised.value)
    assert "'y.qweight'" not in str(raised.value)


def test_a_group_that_is_not_there(tmp_path):
    tensors = broken(g_idx=torch.full((32,), 2, dtype=torch.int32))
    model = load(folder(tmp_path / "m", tensors, config(bits=4)))
    with pytest.raises(DataError, match=r"'a\.g_idx' names groups 2 to 2, but there are 2"):
        model.tensor("a.weight")
