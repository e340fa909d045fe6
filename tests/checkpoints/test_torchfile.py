"""torch's own files against torch.load, in both formats, by ranges."""

import collections

import pytest
import torch

from weft.checkpoints.load import load
from weft.errors import DataError


def check(path, expected):
    read = load(path)
    for name, tensor in expected.items():
        mine = read.tensor(name)
        assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
        assert (
            torch.equal(mine.view(torch.uint8), tensor.contiguous().view(torch.uint8))
            if tensor.dim()
            else (torch.equal(mine, tensor))
        )
    assert {*read.tensors, *read.aliases} == set(expected)
    return read


DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8,
          torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16]  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_as_torch_reads_it(tmp_path, zipped):
    dtypes = DTYPES if zipped else DTYPES[:-3]  # torch cannot read its own legacy float8
    state = collections.OrderedDict((str(d), torch.randn(4, 6).abs().to(d)) for d in dtypes)
    state["scalar"] = torch.tensor(3.0)
    state["parameter"] = torch.nn.Parameter(torch.randn(2, 3))
    state["turned"] = torch.randn(3, 4).T
    state["row"] = torch.arange(12.0).reshape(3, 4)[1]
    state["empty"] = torch.ones(0, 3)
    torch.save(state, tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    expected = torch.load(tmp_path / "m.pt", weights_only=True)
    read = check(tmp_path / "m.pt", {n: t.detach() for n, t in expected.items()})
    assert torch.equal(read.read("torch.float32", 5, 11), state["torch.float32"].flatten()[5:11])
    assert read.grain("turned") == 12 and read.grain("row") == 1


def test_module_state_with_metadata_and_ties(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    read = check(tmp_path / "pytorch_model.bin", module.state_dict())
    assert dict(read.aliases) == {"2.weight": "0.weight"}


def test_wrappers_are_opened_and_the_rest_is_reported(tmp_path):
    inner = {"w": torch.ones(3)}
    torch.save({"epoch": 3, "state_dict": inner, "optimizer": {"lr": 0.1}}, tmp_path / "a.ckpt")
    read = check(tmp_path / "a.ckpt", inner)
    assert sorted(read.skipped) == ["epoch", "optimizer"]
    torch.save({"model": {"w": torch.ones(2), "note": "x"}}, tmp_path / "b.pth")
    assert check(tmp_path / "b.pth", {"w": torch.ones(2)}).skipped == ["note"]
    torch.save({"enc": {"w": torch.ones(2)}, "dec": {"w": torch.zeros(2)}}, tmp_path / "c.pth")
    check(tmp_path / "c.pth", {"enc.w": torch.ones(2), "dec.w": torch.zeros(2)})
    torch.save({"lr": 0.1}, tmp_path / "d.pth")
    with pytest.raises(DataError, match="no tensors"):
        load(tmp_path / "d.pth")


def test_protocols(tmp_path):
    for protocol in (2, 4, 5):
        torch.save({"w": torch.ones(3)}, tmp_path / "p.pt", pickle_protocol=protocol)
        check(tmp_path / "p.pt", {"w": torch.ones(3)})
