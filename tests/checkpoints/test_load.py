"""`load`: which file of a folder is read, what comes along, and what is said when nothing fits."""

import hashlib
import json
import pickle
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.checkpoints import digests
from weft.checkpoints.load import load
from weft.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    return folder


def put(folder, name, value=1.0):
    state = {"w": torch.full((2,), float(value))}
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    else:
        torch.save(state, folder / name)


def value(folder):
    return load(folder).tensor("w")[0].item()


def test_order_of_preference(folder):
    order = [
        "x.pt",
        "pytorch_model.bin",
        "diffusion_pytorch_model.safetensors",
        "x.safetensors",
        "model.safetensors",
    ]
    for i, name in enumerate(order):
        put(folder, name, i)
        assert value(folder) == i


def test_training_state_is_no_weight(folder):
    put(folder, "optimizer.pt")
    put(folder, "training_args.bin")
    with pytest.raises(DataError, match=r"holds no weights.*optimizer\.pt"):
        load(folder)
    put(folder, "last.ckpt", 5)
    assert value(folder) == 5


def test_ambiguity_is_an_error_that_lists(folder):
    put(folder, "a.safetensors")
    put(folder, "b.safetensors", 2)
    with pytest.raises(UsageError, match=r"a\.safetensors, b\.safetensors"):
        load(folder)
    assert value(folder / "b.safetensors") == 2


def test_index_given_by_itself(folder):
    put(folder, "m-1.safetensors", 7)
    (folder / "model.fp16.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"w": "m-1.safetensors"}})
    )
    assert value(folder / "model.fp16.safetensors.index.json") == value(folder) == 7


def test_company(folder):
    put(folder, "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    carried = [
        "tokenizer.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "spiece.model",
        "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "generation_config.json",
        "preprocessor_config.json", "processor_config.json", "modules.json",
    ]  # fmt: skip
    left = [
        "README.md",
        "modeling_toy.py",
        "notes.txt",
        "tokenizer.py",
        "old.gguf",
        "model.onnx",
        ".gitattributes",
    ]
    for name in carried + left:
        (folder / name).write_text(name)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("")
    model = load(folder)
    assert model.config == {"model_type": "toy"}
    assert {a.name for a in model.assets} == {*carried, "1_Pooling/config.json"}
    assert all(a.read() == a.name.encode() for a in model.assets if "/" not in a.name)


def test_tie_stated_by_the_config(folder):
    save_file({"model.embed_tokens.weight": torch.ones(3, 2)}, folder / "model.safetensors")
    assert not load(folder).aliases
    (folder / "config.json").write_text('{"tie_word_embeddings": true}')
    model = load(folder)
    assert dict(model.aliases) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert model.tensor("lm_head.weight").shape == (3, 2)
    both = {"model.embed_tokens.weight": torch.ones(3, 2), "lm_head.weight": torch.zeros(3, 2)}
    save_file(both, folder / "model.safetensors")
    assert not load(folder).aliases  # both are there, so they are what the file says


def test_missing_paths_name_what_is_near(folder, tmp_path):
    put(folder, "model.safetensors")
    with pytest.raises(DataError, match=r"did you mean 'model'"):
        load(tmp_path / "modle")
    with pytest.raises(DataError, match=r"did you mean 'model\.safetensors'"):
        load(str(folder / "model.safetensor"))
    with pytest.raises(DataError, match="nor does its folder"):
        load("./no/such/model")
    with pytest.raises(UsageError, match="revision"):
        load(f"{folder}@main")
    with pytest.raises(DataError, match="does not exist"):
        load(Path("org/name"))  # a Path is never a Hub id


def test_another_process_can_have_it_unless_the_file_changed(folder):
    put(folder, "model.safetensors", 4)
    there = pickle.dumps(load(folder))
    assert pickle.loads(there).tensor("w").tolist() == [4, 4]
    time.sleep(0.01)
    put(folder, "model.safetensors", 5)
    with pytest.raises(DataError, match="changed"):
        pickle.loads(there)


def test_sources_in_memory_and_what_is_none():
    checkpoint = load({"w": torch.ones(2)})
    assert load(checkpoint) is checkpoint
    with pytest.raises(UsageError, match="cannot load a int"):
        load(3)
    with pytest.raises(UsageError, match="base="):
        load({"w": torch.ones(2)}, base="x")


def test_digests_are_remembered_and_survive_a_damaged_cache(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    put(folder, "model.safetensors")
    path = folder / "model.safetensors"
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    (file,) = load(folder).files
    assert file.digest() == expected
    monkeypatch.setattr(digests, "_SETTLED", -1)
    assert file.digest() == expected
    monkeypatch.setattr(digests.hashlib, "file_digest", lambda *a: pytest.fail("hashed twice"))
    assert file.digest() == expected
    monkeypatch.undo()
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "digests.json").write_text("{damaged")
    assert file.digest() == expected
    time.sleep(0.01)
    put(folder, "model.safetensors", 2)
    assert digests.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest() != expected
