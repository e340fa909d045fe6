"""Whatever tensors stand beside each other under quantisers' names: weft's own error, or values of every range."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.checkpoints.model import Model
from weft.checkpoints.quantised import dequantised
from weft.errors import WeftError

NAMES = [
    "a.qweight", "a.qzeros", "a.scales", "a.g_idx", "a.weight", "a.weight_packed", "a.weight_scale",
    "a.weight_shape", "a.weight_zero_point", "a.weight_g_idx", "a.weight_global_scale", "a.weight_scale_2",
    "a.weight.absmax", "a.weight.quant_map", "a.weight.nested_absmax", "a.weight.nested_quant_map",
    "a.weight.quant_state.bitsandbytes__nf4", "a.SCB", "a.weight_format", "e.w_blocks", "e.w_scales",
    "a.weight_scale_inv", "a.bias",
]  # fmt: skip
DTYPES = [
    torch.int32,
    torch.int8,
    torch.uint8,
    torch.float16,
    torch.float32,
    torch.float8_e4m3fn,
    torch.int64,
]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 16, 32, 33]), max_size=4).map(tuple)
ACCOUNTS = st.fixed_dictionaries(
    {},
    optional={
        "quant_method": st.sampled_from(
            ["gptq", "awq", "bitsandbytes", "compressed-tensors", "fp8", "mxfp4", 3]
        ),
        "sym": st.booleans(),
        "group_size": st.sampled_from([-1, 0, 8, 16, "x"]),
        "weight_block_size": st.sampled_from([[2, 2], [0, 1], "x"]),
        "config_groups": st.sampled_from(
            [{}, {"g": {"weights": {"group_size": 8, "num_bits": 4}}}, {"g": 1}, []]
        ),
    },
)


@st.composite
def tensors(draw):
    found = {}
    for name in draw(st.lists(st.sampled_from(NAMES), unique=True, min_size=1, max_size=6)):
        shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
        values = torch.randint(
            -100, 100, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 9)))
        )
        found[name] = values.to(dtype)
    return found


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tensors(), st.none() | ACCOUNTS)
def test_only_our_errors_escape(found, account):
    config = {} if account is None else {"quantization_config": account}
    try:
        model = dequantised(Model(StateDict(found), config, (), "fuzzed"))
        for name, info in model.tensors.items():
            whole = model.read(name)
            assert len(whole) == info.numel
            middle = info.numel // 2
            for start, stop in ((0, middle), (middle, info.numel), (middle // 2, middle)):
                part = model.read(name, start, stop)
                assert torch.equal(part.double().nan_to_num(7), whole[start:stop].double().nan_to_num(7))
    except WeftError as error:
        assert str(error)


def test_a_folder_of_codes_alone(tmp_path):
    from safetensors.torch import save_file

    save_file({"a.qweight": torch.ones(4, 8, dtype=torch.int32)}, tmp_path / "model.safetensors")
    try:
        load(tmp_path)
    except WeftError as error:
        assert "'a.qweight'" in str(error)
    else:
        raise AssertionError("codes without scales were taken for values")
