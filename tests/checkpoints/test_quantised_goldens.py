"""Values decoded as the libraries that made the codes decode them (see make_quantised_goldens.py)."""

import json
import zlib
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.load import load


def goldens():
    """case → (stored tensors, the library's values)."""
    packed = zlib.decompress(Path(__file__).with_name("quantised_goldens.zlib").read_bytes())
    head, _, data = packed.partition(b"\n")
    found, at = {}, 0
    for case, name, dtype, shape in json.loads(head):
        kind = getattr(torch, dtype)
        size = prod(shape) * kind.itemsize
        tensor = torch.frombuffer(bytearray(data[at : at + size]), dtype=kind).reshape(shape)
        found.setdefault(case, {})[name] = tensor
        at += size
    return {case: (tensors, tensors.pop("=a.weight")) for case, tensors in found.items()}


GOLDENS = goldens()


@pytest.mark.parametrize("case", GOLDENS)
def test_values_are_the_librarys(case, tmp_path):
    stored, values = GOLDENS[case]
    save_file(stored, tmp_path / "model.safetensors")
    method = "bitsandbytes" if case.startswith("bnb") else "compressed-tensors"
    config = {"torch_dtype": "float32", "quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load(tmp_path)
    assert list(model) == ["a.weight"] and model.info("a.weight").shape == tuple(values.shape)
    # the libraries compute in the dtype they show: bfloat16 or float16 where the scales are
    loose = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[values.dtype]
    torch.testing.assert_close(
        model.tensor("a.weight", dtype=torch.float32), values.float(), rtol=loose, atol=1e-9
    )
    assert values.float().abs().max() > 0.1  # a golden of zeros would prove nothing
    whole = model.read("a.weight")
    for start, stop in [(0, 1), (1, 2), (63, 65), (5, whole.numel())]:
        assert torch.equal(model.read("a.weight", start, stop), whole[start:stop])
