"""`weft regmean-pp`, `iteris`, `route` and `evaluate`, on a plain module and on a folder of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import weft
from weft.cli.main import app
from weft.errors import WeftError

TASK = """
import torch
from torch import nn

def net():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

def inputs():
    g = torch.Generator().manual_seed(1)
    return {"a": torch.randn(40, 4, generator=g), "b": torch.randn(40, 4, generator=g) + 3}

def data():
    return [[x] for x in inputs().values()]

def by_task():
    return {t: [x] for t, x in inputs().items()}

def labelled():
    return {t: (x, (x.sum(1) > 0).long()) for t, x in inputs().items()}

def far(outputs, labels):
    return (outputs[:, 0] - labels).abs().mean()
"""


def run(*args: object) -> str:
    found = CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.output


def refused(match: str, *args: object) -> None:
    with pytest.raises(WeftError, match=match):
        CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False, standalone_mode=False)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "routetask.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import routetask  # type: ignore[import-not-found]

    torch.manual_seed(0)
    base = routetask.net()
    for name in ("base", "a", "b"):
        weft.save(base, name)
        with torch.no_grad():
            for p in base.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return tmp_path


def test_merges_by_the_merged_models_own_inputs(folder: Path) -> None:
    import routetask

    how = ("--data", "routetask:data", "--module", "routetask:net")
    told = json.loads(run("regmean-pp", "a", "b", "pp", *how, "--set", "off_diagonal=1.0", "--json"))
    assert told["models"] == ["a", "b"] and told["tensors"] == 4
    want = weft.regmean_pp(["a", "b"], routetask.data(), module=routetask.net(), off_diagonal=1.0)
    for name in want:
        torch.testing.assert_close(weft.load("pp").tensor(name), want.tensor(name))
    assert "4 tensors of 2 models" in run("iteris", "a", "b", "it", *how, "--rounds", "2")
    want = weft.iteris(["a", "b"], routetask.data(), module=routetask.net(), rounds=2)
    torch.testing.assert_close(weft.load("it").tensor("0.weight"), want.tensor("0.weight"))
    for match, args in (
        ("name the models", ("a", "out", *how)), ("one of both", ("a", "b", "out")),
        ("no such setting", ("a", "b", "out", *how, "--set", "ridgee=1")),
        ("there is an option", ("a", "b", "out", *how, "--set", "samples=1")),
    ):  # fmt: skip
        refused(match, "iteris", *args)
    refused("give one a model", "regmean-pp", "a", "b", "out", "--texts", "routetask.py")
    refused("exists", "regmean-pp", "a", "b", "pp", *how)


def test_a_routed_model_is_built_shown_and_written_out(folder: Path) -> None:
    import routetask

    experts = ("--expert", "a=a", "--expert", "b=b", "--module", "routetask:net")
    told = json.loads(run("route", "build", "base", "routed", *experts, "--gate", "prototype", "--data",
                          "routetask:by_task", "--residual", "full", "--json"))  # fmt: skip
    assert told["tasks"] == ["a", "b"] and told["cost"]["experts"] == 2
    shown = json.loads(run("route", "show", "routed", "--module", "routetask:net", "--json"))
    assert shown["gate"] == "prototype" and shown["cost"] == told["cost"]
    run("route", "export", "routed", "only-b", "--task", "b", "--module", "routetask:net")
    for name in weft.load("b"):
        torch.testing.assert_close(weft.load("only-b").tensor(name), weft.load("b").tensor(name))
    run("route", "export", "routed", "half", "--weights", "0.5,0.5", "--module", "routetask:net")
    assert not torch.equal(weft.load("half").tensor("0.weight"), weft.load("b").tensor("0.weight"))
    run("route", "build", "base", "learned", *experts, "--gate", "router", "--data", "routetask:by_task",
        "--set", "rests_on=base")  # fmt: skip
    again = weft.routing.load("learned", routetask.net())
    found = again.weights_for(routetask.inputs()["b"][:8])
    assert bool((next(iter(found.values())) if isinstance(found, dict) else found)[:, 1].mean() > 0.8)
    for match, args in (
        ("two experts", ("build", "base", "out", "--expert", "a=a")),
        ("TASK=MODEL", ("build", "base", "out", "--expert", "a")),
        ("given twice", ("build", "base", "out", "--expert", "a=a", "--expert", "a=b")),
        ("learns from inputs", ("build", "base", "out", *experts, "--gate", "router")),
        ("no such setting", ("build", "base", "out", *experts, "--set", "resst=1")),
        ("one of them", ("export", "routed", "out", "--module", "routetask:net")),
        ("numbers, one a task", ("export", "routed", "out", "--weights", "x", "--module", "routetask:net")),
        ("code is yours", ("show", "routed")),
        ("is no routed model", ("show", "a", "--module", "routetask:net")),
    ):  # fmt: skip
        refused(match, "route", *args)


def test_any_model_is_evaluated_and_a_routed_one_tells_where_inputs_went(folder: Path) -> None:
    import routetask

    net = ("--module", "routetask:net")
    data = ("--data", "routetask:labelled", *net)
    told = json.loads(run("evaluate", "a", *data, "--json"))
    want = weft.evaluate("a", routetask.labelled(), module=routetask.net())
    assert [t["accuracy"] for t in told["tasks"]] == [t.accuracy for t in want.tasks]
    assert told["parameters"] == 51 and told["cost"] is None and told["mean"] == want.mean
    said = run("evaluate", "a", *data)
    assert (
        "51 parameters in 204 bytes" in said
        and "sent to" not in said
        and f"mean accuracy {100 * want.mean:.2f} %" in said
    )
    experts = ("--expert", "a=a", "--expert", "b=b", *net)
    for gate, more in (("oracle", ()), ("prototype", ("--data", "routetask:by_task"))):
        run("route", "build", "base", gate, *experts, "--gate", gate, "--residual", "full", *more)
        told = json.loads(run("evaluate", gate, *data, "--json"))
        shown = json.loads(run("route", "show", gate, *net, "--json"))
        assert told["cost"] == shown["cost"] and told["told"] == (gate == "oracle")
        for task in told["tasks"]:
            assert task["sent"][task["task"]] > 0.8 and sum(task["sent"].values()) <= 1
    said = run("evaluate", "oracle", *data)
    assert "a 100 %" in said and "the task was told" in said and "× one expert" in said
    own = json.loads(run("evaluate", "a", *data, "--loss", "routetask:far", "--samples", "10", "--json"))
    assert own["metric"] == "loss" and own["tasks"][0]["examples"] == 10
    for match, args in (
        ("one of both", ("a", *net)),
        ("one of both", ("a", *data, "--texts", "a=routetask.py")),
        ("give one of them", ("oracle", "--base", "base", *data)),
        ("code is yours", ("oracle", "--data", "routetask:labelled")),
        ("does not exist", ("nothing", *data)),
        ("no function", ("a", *net, "--data", "routetask:labeled")),
        ("no labels", ("a", *net, "--data", "routetask:inputs")),
        ("did you mean 'mse'", ("a", *data, "--loss", "msee")),
        ("TASK=FILE", ("a", *net, "--texts", "routetask.py")),
        ("base's tokenizer", ("oracle", *net, "--texts", "a=routetask.py")),
        ("must give a torch module, not a dict", ("a", *data[:2], "--module", "routetask:inputs")),
        ("numbers, one a task", ("a", *data, "--preference", "x")),
        ("is not", ("a", *data, "--preference", "1,2")),
    ):  # fmt: skip
        refused(match, "evaluate", *args)


def test_folders_of_transformers_bring_their_network_and_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config)
    for name in ("base", "a", "b"):
        model.save_pretrained(name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn_like(p))
    Path("a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 8)
    Path("b.txt").write_text("0123456789 9876543210\n" * 16)
    texts = ("--texts", "a.txt", "--texts", "b.txt", "--length", "16")
    run("regmean-pp", "a", "b", "merged", *texts, "--by-block", "--quiet")
    merged = weft.load("merged")
    name = "model.layers.1.mlp.down_proj.weight"
    mean = (weft.load("a").tensor(name) + weft.load("b").tensor(name)) / 2
    assert merged.config is not None and merged.config["model_type"] == "llama"
    assert 0 < float((merged.tensor(name) - mean).norm()) < float(mean.norm())
    run("route", "build", "base", "routed", "--expert", "a=a", "--expert", "b=b", "--gate", "prototype", "--where",
        "mlp", "--residual", "lowrank:4", "--texts", "a=a.txt", "--texts", "b=b.txt", "--length", "16")  # fmt: skip
    run("route", "export", "routed", "static", "--task", "a", "--base", "base")
    static = weft.load("static")
    assert static.config is not None and set(static) >= set(weft.load("a"))
    held = ("--texts", "a=a.txt", "--texts", "b=b.txt", "--length", "16", "--json")
    told = json.loads(run("evaluate", "routed", "--base", "base", *held))
    assert told["metric"] == "perplexity" and [t["task"] for t in told["tasks"]] == ["a", "b"]
    assert all(t["sent"][t["task"]] > 0.5 and t["perplexity"] > 1 for t in told["tasks"])
    alone = json.loads(run("evaluate", "static", *held))
    assert alone["tasks"][0]["perplexity"] > 1 and alone["tasks"][0]["sent"] is None
