"""`weft lora`: every verb from files to files, and its refusals."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft.cli import main as entry


def run(*words, capsys, status=0):
    sys.argv = ["weft", *map(str, words)]
    if status:
        with pytest.raises(SystemExit) as stop:
            entry.main()
        assert stop.value.code == status
    else:
        entry.main()
    told = capsys.readouterr()
    return told.err if status else told.out


@pytest.fixture
def models(tmp_path, monkeypatch):
    g = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.q.weight": torch.randn(6, 5, generator=g) for i in range(2)} | {
        "norm.weight": torch.ones(5)
    }
    for name in ("base", "a", "b"):
        (tmp_path / name).mkdir()
        state = {n: t.clone() for n, t in base.items()}
        if name != "base":
            for t in state.values():
                t.add_(torch.randn(t.shape, generator=g) * 0.1)
        save_file(state, tmp_path / name / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_models_to_adapters_and_back(models, capsys):
    for name in "ab":
        told = run("lora", "extract", name, "base", f"lora-{name}", "--rank", 5, capsys=capsys)
        assert "kept 100.00 %" in told and "lora-" in told
    report = json.loads(run("lora", "resize", "lora-a", "small", "--rank", 1, "--json", capsys=capsys))[
        "report"
    ]
    assert {r["rank"] for r in report.values()} == {1} and all(0 < r["error"] < 1 for r in report.values())
    run("lora", "merge", "lora-a", "lora-b", "-o", "both", "--how", "concat", "-w", 1, "-w", 1, capsys=capsys)
    run("lora", "apply", "base", "both", "-o", "out", capsys=capsys)
    base, a, b, out = (load_file(models / n / "model.safetensors") for n in ("base", "a", "b", "out"))
    for name in ("layers.0.q.weight", "layers.1.q.weight"):
        assert torch.allclose(out[name], a[name] + b[name] - base[name], atol=1e-5)
    assert torch.equal(out["norm.weight"], base["norm.weight"])
    told = run("lora", "inspect", "lora-a", "small", capsys=capsys)
    assert "A-overlap" in told and "‖ΔW‖" in told
    found = json.loads(run("lora", "inspect", "lora-a", "--json", capsys=capsys))["adapters"][0]
    assert [w["rank"] for w in found["weights"]] == [5, 5] and found["base"] == "base"


def test_kohya_for_vllm_and_refusals(models, capsys):
    run("lora", "extract", "a", "base", "k.safetensors", "--format", "kohya", "--rank", 2, capsys=capsys)
    assert "layers.0.q.lora_up.weight" in load_file(models / "k.safetensors")
    assert "one file" in run(
        "lora", "extract", "a", "base", "k", "--format", "kohya", capsys=capsys, status=2
    )
    run("lora", "extract", "a", "base", "served", "--for", "vllm", "--energy", 0.5, capsys=capsys)
    assert json.loads((models / "served" / "adapter_config.json").read_text())["r"] in (1, 8)
    told = run(
        "lora", "extract", "a", "base", "no", "--for", "vllm", "--rest", "save", capsys=capsys, status=1
    )
    assert "norm.weight" in told and not (models / "no").exists()
    assert "did you mean" in run(
        "lora", "extract", "a", "base", "no", "--rest", "sav", capsys=capsys, status=2
    )
    assert "say what to keep" in run("lora", "resize", "served", "no", capsys=capsys, status=2)
    assert "KEY=VALUE" in run(
        "lora", "merge", "served", "-o", "no", "--set", "density", capsys=capsys, status=2
    )
