"""`check`: everything at once, and no weight read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from weft.recipes import check


def write(folder: Path, name: str, **tensors: torch.Tensor) -> str:
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return str(path)


def test_good(tmp_path: Path) -> None:
    a, b = (write(tmp_path, n, w=torch.ones(2)) for n in "ab")
    report = check(
        f"merge_method: ties\nbase_model: {a}\nmodels: [{b}]\nparameters: {{weight: 0.5}}\n", headers=True
    )
    assert report.ok and report.exit_status == 0 and not report.problems
    assert report.summary[0]["parameters"]["weight"] == "0.5"
    assert any("scope" in d for d in report.differences)
    assert "no problem found" in str(report) and "density: 0.2" in str(report)
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_all_missing_paths_at_once(tmp_path: Path) -> None:
    a = write(tmp_path, "expert", w=torch.ones(2))
    report = check(
        f"method: linear\nmodels:\n- {a}\n- {tmp_path}/exprt.safetensors\n- ./nowhere\n- {a}+./lora\n"
        "- model: {method: linear, models: [./inner, ./nowhere]}\n- org/on-the-hub\n- https://host/x\n"
    )
    assert report.exit_status == 1
    assert [p.split()[0] for p in report.problems] == [
        f"{tmp_path}/exprt.safetensors", "./nowhere", "./lora", "./inner",
    ]  # fmt: skip
    assert "did you mean 'expert.safetensors'" in report.problems[0]
    assert any("org/on-the-hub is no local path" in n for n in report.notes)


def test_problems_and_paths_together() -> None:
    report = check("name: x\nmethod: linear\nmodels: [./nowhere]\n---\nmethod: linar\nmodels: [x]\n")
    assert report.exit_status == 2 and len(report.problems) == 2 and not report.ok
    assert "cannot be run" in str(report)


def test_what_is_no_yaml() -> None:
    report = check("a: &b 1\n")
    assert report.exit_status == 2 and "anchors" in report.problems[0]
    assert check(Path("/nowhere/at/all.yml")).exit_status == 2
    assert check("x: 1\n", ["a"]).problems[0].startswith("--set")


def test_headers(tmp_path: Path) -> None:
    a = write(tmp_path, "a", w=torch.ones(2), v=torch.ones(2))
    b = write(tmp_path, "b", w=torch.ones(3))
    text = f"method: linear\nmodels: [{a}, {b}]\n"
    assert check(text).ok
    report = check(text, headers=True)
    assert report.exit_status == 1 and len(report.problems) == 2
    assert any(p.startswith("v: not in") for p in report.problems)


def test_unused_documents() -> None:
    report = check("name: x\nmethod: linear\nmodels: [.]\n---\nmethod: linear\nmodels: [.]\n")
    assert report.ok and any("'x' is not used" in n for n in report.notes)


def test_differences_only_for_mergekit_s_recipes() -> None:
    text = "method: ties\nbase: .\nmodels: [..]\nparameters: {weight: [0, 1]}\n"
    assert check(text).differences == ()
    assert check(text.replace("method", "merge_method")).differences
