"""Our reader against the safetensors library, on every dtype, by ranges, sharded and tied."""

import json

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints.dtypes import DTYPES
from weft.checkpoints.load import load
from weft.checkpoints.memory import StateDict
from weft.checkpoints.safetensors import SafetensorsFile
from weft.errors import DataError, UsageError


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.randn(*shape, generator=generator, dtype=torch.float32)
        return real.to(dtype) if dtype != torch.float8_e8m0fnu else real.abs().to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    assert (a.dtype, a.shape) == (b.dtype, b.shape)
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


@pytest.mark.parametrize("dtype", [d.torch for d in DTYPES.values()], ids=DTYPES)
def test_every_dtype(tmp_path, dtype):
    tensors = {
        "a": random_tensor(dtype, 3, 5),
        "b": random_tensor(dtype, 1),
        "none": random_tensor(dtype, 0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors")
    assert set(file) == set(tensors)
    for name, tensor in tensors.items():
        assert same_bits(file.tensor(name), tensor)
    assert same_bits(file.read("a", 4, 9), tensors["a"].flatten()[4:9])


def test_order_is_that_of_the_offsets_and_metadata_is_kept(tmp_path):
    save_file(
        {"z": torch.ones(2), "a": torch.ones(2, dtype=torch.float64)},
        tmp_path / "x.safetensors",
        {"format": "pt"},
    )
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert list(file) == ["a", "z"]  # the library lays out wide dtypes first
    assert file.metadata == {"format": "pt"}
    assert [f.size for f in file.files] == [(tmp_path / "x.safetensors").stat().st_size]


def test_rounding_happens_once_when_a_dtype_is_asked_for(tmp_path):
    x = torch.tensor([1 + 2**-8 + 2**-30, 3.0], dtype=torch.float64)
    save_file({"x": x}, tmp_path / "x.safetensors")
    read = load(tmp_path / "x.safetensors").read("x", dtype=torch.bfloat16)
    assert read[0].item() == 1 + 2**-7  # by way of float32 it would land on the tie and go to 1


def test_bad_ranges_and_names_are_usage_errors(tmp_path):
    save_file({"weight": torch.ones(4)}, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="do not lie in"):
        file.read("weight", 2, 5)
    with pytest.raises(UsageError, match="did you mean 'weight'"):
        file.read("weigth")


def test_a_file_cut_short_while_open_is_reported(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, path)
    file = load(path)
    with open(path, "r+b") as handle:
        handle.truncate(200)
    with pytest.raises(DataError, match="changed while being read"):
        file.read("x")


def shard(folder, shards: dict[str, dict[str, torch.Tensor]], **metadata):
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {t: name for name, tensors in shards.items() for t in tensors}
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_sharded(tmp_path):
    a, b, c = torch.randn(3, 4), torch.randn(5), torch.arange(6)
    shard(
        tmp_path, {"model-2.safetensors": {"a": a}, "model-1.safetensors": {"c": c, "b": b}}, total_size=116
    )
    whole = load(tmp_path)
    assert list(whole)[-1] == "a" and len(whole.files) == 2
    assert torch.equal(whole.tensor("a"), a) and torch.equal(whole.tensor("c"), c)
    assert torch.equal(whole.read("b", 1, 3), b[1:3])


def test_all_missing_shards_are_listed_at_once(tmp_path):
    shard(tmp_path, {f"m-{i}.safetensors": {f"t{i}": torch.ones(2)} for i in range(3)})
    for i in (0, 2):
        (tmp_path / f"m-{i}.safetensors").unlink()
    with pytest.raises(DataError, match=r"(?s)m-0.*m-2"):
        load(tmp_path)


def test_tied_names_in_memory_are_aliases_and_overlapping_views_are_not():
    module = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(6, 4), "head": torch.nn.Linear(4, 6, bias=False)}
    )
    module["head"].weight = module["embed"].weight
    tied = load(module)
    assert dict(tied.aliases) == {"head.weight": "embed.weight"} and list(tied) == ["embed.weight"]
    assert tied.tensor("head.weight") is not None
    fused = torch.arange(12.0).reshape(4, 3)
    views = StateDict(
        {"fused": fused, "top": fused[:2], "turned": fused.T, "empty": fused[:0], "none": fused[:0]}
    )
    assert not views.aliases and len(views) == 5
    assert torch.equal(views.tensor("turned"), fused.T)
    assert torch.equal(views.read("turned", 5, 10), fused.T.flatten()[5:10])


def test_memory_takes_arrays_and_reports_what_is_no_tensor():
    numpy = pytest.importorskip("numpy")
    state = StateDict({"a": numpy.arange(6)[::-1], "step": 3, "b": torch.tensor(2.0)})
    assert state.tensor("a").tolist() == [5, 4, 3, 2, 1, 0] and state.tensor("b").item() == 2
    assert state.skipped == ["step"]
    with pytest.raises(DataError, match="meta device"):
        load({"x": torch.empty(3, device="meta")})
    assert list(load(torch.ones(2))) == ["tensor"]
