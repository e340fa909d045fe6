"""What a save writes: the right values, in the right files, the same bytes however it is carried out."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_models import contents, family, header, python, sha, state, write_model
from safetensors.torch import load_file, load_model
from torch import nn

import weft
from weft.checkpoints.execution import TILE
from weft.errors import DataError, DataProblems, UsageError

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [0.3, 0.7]},
    "ties": {"density": 0.3, "scope": "tensor"},
    "ties over the model": {"method": "ties", "density": 0.3, "scope": "model"},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.5, "gamma": 0.05},
    "slerp": {"t": 0.3},
    "karcher": {},
    "model_stock": {},
}


def node(folder: Path, case: str) -> weft.Checkpoint:
    """The merge of a case over the family in `folder`, made there if need be."""
    if not (folder / "base").exists():
        family(folder)
    options = dict(METHODS[case])
    method = options.pop("method", case)
    tuned = [folder / "tuned0", folder / "tuned1"]
    needs_base = weft.METHODS[method].base == "required"
    return weft.merge(tuned, method, base=folder / "base" if needs_base else None, seed=5, **options)


@pytest.mark.parametrize("case", METHODS)
def test_output_is_the_state_dict(tmp_path: Path, case: str) -> None:
    merged = node(tmp_path, case)
    weft.save(merged, tmp_path / "out", threads=2)
    written, expected = load_file(tmp_path / "out/model.safetensors"), node(tmp_path, case).state_dict()
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        assert written[name].dtype == values.dtype
        assert written[name].shape == values.shape
        assert torch.equal(written[name], values), name


@pytest.mark.parametrize("case", METHODS)
def test_same_bytes_however_it_is_carried_out(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    family(tmp_path)
    weft.save(node(tmp_path, case), tmp_path / "ref", threads=1, kernels=False)
    expected = sha(tmp_path / "ref/model.safetensors")
    whole = weft.engine.save.Settings(threads=1).plan(node(tmp_path, case), tmp_path / "x")
    small = max(whole.cost(n, min(TILE, i.numel)) for n, i in whole.tensors.items())
    ways: dict[str, dict[str, Any]] = {
        "two threads": {"threads": 2},
        "four threads": {"threads": 4},
        "small ranges": {"threads": 2, "memory": max(4 * small, whole.largest)},
        "crowded": {"threads": 4, "memory": whole.largest},
        "kernels": {"threads": 2, "kernels": True},
        "kernels, small ranges": {"threads": 3, "kernels": True, "memory": max(4 * small, whole.largest)},
    }
    monkeypatch.setenv("WEFT_KERNELS_FROM", "0")
    for i, (way, settings) in enumerate(ways.items()):
        weft.save(node(tmp_path, case), tmp_path / f"{i}.safetensors", **{"kernels": False, **settings})
        assert sha(tmp_path / f"{i}.safetensors") == expected, way


def test_every_file_is_the_same_in_every_run(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    for out in ("a", "b"):
        merged = weft.merge(tuned, "ties", base=base, density=0.3)
        weft.save(merged, tmp_path / out / "model", threads=2, shard_size="100KB", recipe_text="x: 1\n")
    assert contents(tmp_path / "a/model") == contents(tmp_path / "b/model")
    assert len(contents(tmp_path / "a/model")) > 5


def test_kernels_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weft.engine.kernels as kernels

    class Used(Exception):
        pass

    class Refusing:
        def __init__(self) -> None:
            raise Used

    monkeypatch.setattr(kernels, "Kernels", Refusing)
    weft.save(node(tmp_path, "linear"), tmp_path / "default")  # too small to load a compiler for
    monkeypatch.setenv("WEFT_KERNELS_FROM", "0")
    weft.save(node(tmp_path, "linear"), tmp_path / "off", kernels=False)
    with pytest.raises(Used):
        weft.save(node(tmp_path, "linear"), tmp_path / "on")


# -- files --------------------------------------------------------------------------------------------


def test_shards_and_their_index(tmp_path: Path) -> None:
    merged = node(tmp_path, "linear")
    out = tmp_path / "out"
    weft.save(merged, out, shard_size=150_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) > 1
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert sorted(set(index["weight_map"].values())) == shards
    assert index["metadata"]["total_size"] == merged.nbytes
    assert list(index["weight_map"]) == list(merged)
    found = {}
    for shard in shards:
        part = load_file(out / shard)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= 150_000
        assert all(index["weight_map"][n] == shard for n in part)
        found |= part
    expected = node(tmp_path, "linear").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) for n, t in expected.items())
    assert weft.load(out).tensors.keys() == expected.keys()


def test_one_file_has_the_folder_s_weights(tmp_path: Path) -> None:
    merged = node(tmp_path, "ties")
    weft.save(merged, tmp_path / "folder")
    saved = weft.save(node(tmp_path, "ties"), tmp_path / "sub/one.safetensors", shard_size=1000)
    assert sha(tmp_path / "sub/one.safetensors") == sha(tmp_path / "folder/model.safetensors")
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["one.safetensors", "one.weft.json"]
    assert json.loads((tmp_path / "sub/one.weft.json").read_text()) == saved.manifest


def test_header_order_and_alignment(tmp_path: Path) -> None:
    mixed = {
        "z": torch.ones(3, dtype=torch.bfloat16),
        "a": torch.ones(5, dtype=torch.int8),
        "m": torch.ones(2, dtype=torch.float64),
        "b": torch.ones(3, dtype=torch.float32),
        "y": torch.ones(1, dtype=torch.bfloat16),
    }
    weft.save(mixed, tmp_path / "x.safetensors")
    found = header(tmp_path / "x.safetensors")
    assert list(found) == ["__metadata__", "m", "b", "z", "y", "a"]
    (length,) = struct.unpack("<Q", (tmp_path / "x.safetensors").read_bytes()[:8])
    assert length % 8 == 0
    end = 0
    for name in list(found)[1:]:
        first, last = found[name]["data_offsets"]
        assert first == end
        assert first % mixed[name].itemsize == 0
        end = last
    assert (tmp_path / "x.safetensors").stat().st_size == 8 + length + end


def test_nothing_else_is_left_behind(tmp_path: Path) -> None:
    merged = node(tmp_path, "linear")
    before = {p.name for p in tmp_path.iterdir()}
    weft.save(merged, tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {*before, "out"}
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "weft-manifest.json", "README.md"}


def test_an_output_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    saved = weft.save({"w": torch.ones(3)}, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "elsewhere/model.safetensors").exists()
    assert saved.path == tmp_path / "link"


# -- values -------------------------------------------------------------------------------------------

ODD = {
    "half": torch.tensor([[1.0, 2.0]], dtype=torch.float16),
    "brain": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "single": torch.tensor([[[0.1]]], dtype=torch.float32),
    "double": torch.tensor([0.1, 0.2], dtype=torch.float64),
    "eight": torch.tensor([1.0, 2.0, 0.5]).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 7),
    "steps": torch.tensor(5, dtype=torch.int64),
    "codes": torch.tensor([-3, 4], dtype=torch.int8),
    "bytes": torch.tensor([250], dtype=torch.uint8),
    "mask": torch.tensor([True, False, True]),
}


def test_every_dtype_and_shape(tmp_path: Path) -> None:
    other = {n: (t.double() * 3).to(t.dtype) if t.is_floating_point() else t * 0 for n, t in ODD.items()}
    merged = weft.merge([ODD, other], "linear", weight=[0.5, 0.5])
    saved = weft.save(merged, tmp_path / "out.safetensors", threads=2)
    written = load_file(tmp_path / "out.safetensors")
    for name, t in ODD.items():
        assert written[name].dtype == t.dtype, name
        assert written[name].shape == t.shape, name
        wanted = (t.double() * 2).to(t.dtype) if t.is_floating_point() else t
        assert torch.equal(written[name].view(torch.uint8) if t.itemsize == 1 else written[name],
                           wanted.view(torch.uint8) if t.itemsize == 1 else wanted), name  # fmt: skip
    carried = saved.manifest["carried"]
    assert carried.keys() == {"steps", "codes", "bytes", "mask"}
    assert "carried, not averaged" in carried["codes"]


def test_the_storage_dtype_is_rounded_to_once(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    a, b = ({"w": torch.randn(50_000, generator=g)} for _ in range(2))
    merged = weft.merge([a, b], "linear", weight=[0.3, 0.7])
    weft.save(merged, tmp_path / "out.safetensors", dtype=torch.bfloat16)
    exact = 0.3 * a["w"].double() + 0.7 * b["w"].double()
    written = load_file(tmp_path / "out.safetensors")["w"]
    nearest = (written.double() - exact).abs()
    for step in (1, -1):  # neither neighbour is nearer
        neighbour = (written.view(torch.int16) + step).view(torch.bfloat16).double()
        assert bool((nearest <= (neighbour - exact).abs()).all())


def test_tied_names_stay_tied(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 4)
            self.head = nn.Linear(4, 11, bias=False)
            self.head.weight = self.embed.weight

    a, b = Tied(), Tied()
    weft.save(weft.merge([a, b], "linear"), tmp_path / "out.safetensors")
    assert list(header(tmp_path / "out.safetensors"))[1:] == ["embed.weight"]
    fresh = Tied()
    assert load_model(fresh, tmp_path / "out.safetensors") == (set(), [])
    expected = (a.embed.weight.double() + b.embed.weight.double()) / 2
    assert torch.equal(fresh.head.weight, expected.float())


# -- what is beside the weights ------------------------------------------------------------------------


def test_config_says_what_the_weights_are(tmp_path: Path) -> None:
    config = {
        "architectures": ["Some"],
        "dtype": "float32",
        "tie_word_embeddings": True,
        "auto_map": {"AutoModel": "evil--code.Model"},
        "_attn_implementation": "evil/kernel",
        "text_config": {"torch_dtype": "float32", "attn_implementation_internal": "x", "layers": 2},
        "parts": [{"trust_remote_code": True, "keep": 1}],
    }
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
    source = write_model(tmp_path / "in", tensors, config)
    saved = weft.save(weft.load(source), tmp_path / "out", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == {
        "architectures": ["Some"],
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
        "text_config": {"torch_dtype": "bfloat16", "layers": 2},
        "parts": [{"keep": 1}],
    }
    told = "\n".join(saved.notes)
    for key in ("dtype", "text_config.torch_dtype", "tie_word_embeddings", "auto_map", "_attn_implementation",
                "text_config.attn_implementation_internal", "parts.0.trust_remote_code"):  # fmt: skip
        assert f"config.json: {key} " in told
    assert saved.manifest["notes"] == list(saved.notes)


def test_a_true_config_is_left_alone(tmp_path: Path) -> None:
    config = {"dtype": "bfloat16", "tie_word_embeddings": True, "x": None}
    tensors = {"model.embed_tokens.weight": torch.ones(4, 2).bfloat16(), "norm": torch.ones(2)}
    saved = weft.save(weft.load(write_model(tmp_path / "in", tensors, config)), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    assert saved.notes == ()


def test_files_that_travel(tmp_path: Path) -> None:
    base, _ = family(tmp_path)
    carried = {
        "tokenizer__json": '{"a": 1}',
        "generation_config__json": "{}",
        "chat_template__jinja": "{{x}}",
    }
    left = {"modeling__py": "boom", "NOTES__md": "mine"}
    source = write_model(tmp_path / "base", state(), {"dtype": "bfloat16"}, **carried, **left)
    weft.save(weft.merge([source, base], "linear"), tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "README.md", "weft-manifest.json",
                     *(n.replace("__", ".") for n in carried)}  # fmt: skip
    for name, text in carried.items():
        assert (tmp_path / "out" / name.replace("__", ".")).read_text() == text


def test_manifest(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    recipe = {"method": "dare_ties"}
    merged = weft.merge(tuned, "dare_ties", base=base, density=0.5, seed=42)
    saved = weft.save(merged, tmp_path / "out", recipe=recipe, shard_size=150_000)
    written = json.loads((tmp_path / "out/weft-manifest.json").read_text())
    assert written == saved.manifest
    assert written["weft"] == weft.__version__
    assert written["recipe"] == recipe
    assert written["seeds"] == [42]
    inputs = {i["path"]: i for i in written["inputs"]}
    assert inputs.keys() == {f"{p}/model.safetensors" for p in (base, *tuned)}
    for path, record in inputs.items():
        assert record["sha256"] == sha(path)
        assert record["size"] == Path(path).stat().st_size
    assert len(written["outputs"]) > 1
    for record in written["outputs"]:
        assert record["sha256"] == sha(tmp_path / "out" / record["file"])
    none = weft.save(merged, tmp_path / "quick", digests=False).manifest
    assert all(r["sha256"] is None for r in none["outputs"] + none["inputs"])


def test_manifest_tells_what_was_left_out(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(2)}, "epoch": 3}, tmp_path / "a.ckpt")
    saved = weft.save(weft.load(tmp_path / "a.ckpt"), tmp_path / "out")
    assert saved.manifest["left_out"] == {str(tmp_path / "a.ckpt"): ["epoch"]}


def test_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = write_model(Path("some/model"), state(), {"architectures": ["X"]})
    hub = weft.load(state(1, like=state()))
    hub.origin = "org/name-7b"
    weft.save(weft.merge([local, hub], "linear"), "out", recipe_text="a: `x`\n```\nb: 2\n")
    card = Path("out/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": ["org/name-7b"],  # the other is a folder, though it reads like a Hub id
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "weft"],
    }
    assert "`some/model`" in body
    assert "````yaml\na: `x`\n```\nb: 2\n````" in body
    assert Path("out/weft-recipe.yml").read_text() == "a: `x`\n```\nb: 2\n"


# -- what is refused ------------------------------------------------------------------------------------


def test_missing_and_mismatched_tensors(tmp_path: Path) -> None:
    a = {"x": torch.ones(2), "y": torch.ones(2), "z": torch.ones(3), "only_a": torch.ones(1)}
    b = {"x": torch.ones(2) * 3, "y": torch.ones(4), "z": torch.ones(5), "only_b": torch.ones(2)}
    with pytest.raises(DataProblems) as error:
        weft.merge([a, b], "linear")
    told = str(error.value)
    assert len(error.value.problems) == 4
    for part in (
        "y: shapes differ",
        "z: shapes differ",
        "only_a: not in",
        "only_b: not in",
        "missing: carry",
    ):
        assert part in told
    merged = weft.merge([a, b], "linear", missing="carry", mismatch="carry")
    saved = weft.save(merged, tmp_path / "out.safetensors")
    written = load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["x"], torch.full((2,), 2.0))
    assert all(torch.equal(written[n], t) for n, t in {**b, **a}.items() if n != "x")
    assert saved.manifest["carried"].keys() == {"y", "z", "only_a", "only_b"}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_are_named(
    tmp_path: Path, bad: float, kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_KERNELS_FROM", "0")
    base, tuned = family(tmp_path)
    spoiled = state(9, like=state())
    spoiled["layers.1.mlp.weight"][77, 3] = bad
    tuned[1] = write_model(tmp_path / "spoiled", spoiled)
    merged = weft.merge(tuned, "ties", base=base)
    with pytest.raises(
        DataError, match=r"spoiled.*layers\.1\.mlp\.weight.*NaN or infinite.*nonfinite: allow"
    ):
        weft.save(merged, tmp_path / "out", threads=2, kernels=kernels)
    assert not (tmp_path / "out").exists()
    allowed = weft.merge(tuned, "linear", nonfinite="allow")
    weft.save(allowed, tmp_path / "out", kernels=kernels)


def test_outputs_that_are_in_the_way(tmp_path: Path) -> None:
    w = {"w": torch.ones(2)}
    weft.save(w, tmp_path / "out")
    with pytest.raises(UsageError, match=r"exists and is not empty.*--overwrite"):
        weft.save(w, tmp_path / "out")
    weft.save({"v": torch.ones(2)}, tmp_path / "out", overwrite=True)
    assert load_file(tmp_path / "out/model.safetensors").keys() == {"v"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "empty").mkdir()
    weft.save(w, tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        weft.save(w, tmp_path / "file")
    (tmp_path / "d.safetensors").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        weft.save(w, tmp_path / "d.safetensors")
    weft.save(w, tmp_path / "one.safetensors")
    with pytest.raises(UsageError, match="exists"):
        weft.save(w, tmp_path / "one.safetensors")
    weft.save({"v": torch.ones(1)}, tmp_path / "one.safetensors", overwrite=True)
    assert load_file(tmp_path / "one.safetensors").keys() == {"v"}


def test_overwrite_spares_what_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="does not look like a model"):
        weft.save({"w": torch.ones(2)}, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/thesis.tex").read_text() == "years of work"


def test_inputs_are_never_outputs(tmp_path: Path) -> None:
    _, tuned = family(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    before = contents(tmp_path)
    merged = weft.merge(tuned, "linear")
    link = tmp_path / "link"
    link.symlink_to(tuned[0])
    for out in (tuned[0], tmp_path, link, f"{tuned[1]}/model.safetensors"):
        with pytest.raises(UsageError, match=r"which this merge reads"):
            weft.save(merged, out, overwrite=True)
    link.unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"threads": 0}, "at least 1"),
        ({"threads": -3}, "at least 1"),
        ({"executor": "spark"}, "use local or ray"),
        ({"memory": "lots"}, "is no size"),
        ({"memory": -1}, "is no size"),
        ({"shard_size": "5 parsecs"}, "is no size"),
        ({"device": "toaster"}, "is no device"),
        ({"device": "cuda:99"}, "is not there"),
        ({"device": "meta"}, "not supported"),
    ],
)
def test_settings_that_cannot_be_meant(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        weft.save({"w": torch.ones(2)}, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_write(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no tensors"):
        weft.save(weft.load({}), tmp_path / "out")


def test_saving_needs_no_heavy_package(tmp_path: Path) -> None:
    base, tuned = family(tmp_path)
    script = """
import sys, weft
base, a, b, out = sys.argv[1:]
weft.save(weft.merge([a, b], "ties", base=base), out)
print([m for m in ("transformers", "ray", "numba", "peft", "fsspec", "huggingface_hub") if m in sys.modules])
"""
    done = python(script, base, *tuned, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
