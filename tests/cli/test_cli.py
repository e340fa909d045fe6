"""The command line as a user has it: every verb, what it prints, how it refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from weft._version import __version__
from weft.cli.main import main
from weft.cli.output import one_line, percent, safe

ROOT = Path(__file__).parents[2]
TENSORS = {"model.embed_tokens.weight": (6, 4), "model.norm.weight": (4,)} | {
    f"model.layers.{i}.{m}.weight": (4, 4) for i in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")
}


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Weft = Callable[..., Ran]


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Weft:
    """Run the command line in this process."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["weft", *map(str, args)])
        status = 0
        try:
            main()
        except SystemExit as exit:
            assert isinstance(exit.code, int)
            status = exit.code
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "bug in weft" not in said.err, said.err
        return Ran(status, said.out, said.err)

    return run


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """Folders base, math and code, a recipe r.yml that merges them."""
    for seed, name in enumerate(("base", "math", "code")):
        folder = tmp_path / name
        folder.mkdir()
        generator = torch.Generator().manual_seed(seed)
        state = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in TENSORS.items()}
        state["model.position_ids"] = torch.arange(3)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "tie_word_embeddings": True, "rope_theta": 10.0 + seed}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "tokenizer_config.json").write_text("{}")
    (tmp_path / "r.yml").write_text(f"""
merge_method: task_arithmetic
base_model: {tmp_path}/base
models:
  - model: {tmp_path}/math
    parameters: {{weight: 0.5}}
  - model: {tmp_path}/code
    parameters: {{weight: [0.0, 1.0]}}
""")
    return tmp_path


def hashes(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for name in ("base", "math", "code") for p in (folder / name).iterdir()}


def refused(ran: Ran, status: int, *parts: str) -> None:
    """One sentence on stderr with these parts, nothing on stdout."""
    assert ran.status == status and not ran.out, ran
    assert ran.err.startswith("weft: ") and ran.err.count("weft: ") == 1
    for part in parts:
        assert part in ran.err, ran.err


# -- merge -------------------------------------------------------------------------------------------------


def test_merge_into_a_folder(weft: Weft, models: Path) -> None:
    before = hashes(models)
    ran = weft("merge", models / "r.yml", models / "out")
    assert ran.status == 0 and f"{models}/out: 7 tensors" in ran.out
    assert "carried, not merged: model.position_ids" in ran.out
    names = {p.name for p in (models / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer_config.json", "weft-manifest.json"}
    base, math, code, out = (
        load_file(models / n / "model.safetensors") for n in ("base", "math", "code", "out")
    )
    name = "model.layers.1.mlp.up_proj.weight"
    b, m, c = (s[name].double() for s in (base, math, code))
    assert torch.equal(out[name], (b + 0.5 * (m - b) + (c - b)).bfloat16())
    assert hashes(models) == before
    assert not [p for p in models.iterdir() if p.name.startswith(".")]


def test_merge_into_a_file_with_json(weft: Weft, models: Path) -> None:
    ran = weft("merge", models / "r.yml", models / "one.safetensors", "--json", "--dtype", "float32")
    assert ran.status == 0 and ran.json["tensors"] == 7 and ran.json["path"] == f"{models}/one.safetensors"
    assert load_file(models / "one.safetensors")["model.norm.weight"].dtype == torch.float32


def test_quiet(weft: Weft, models: Path) -> None:
    ran = weft("merge", models / "r.yml", models / "out", "--quiet")
    assert (ran.status, ran.out, ran.err) == (0, "", "")


def test_dry_run(weft: Weft, models: Path) -> None:
    ran = weft("merge", models / "r.yml", models / "out", "--dry-run")
    assert ran.status == 0 and not (models / "out").exists()
    assert "model.layers.0.mlp.up_proj.weight" in ran.out and "weighted_sum(weight=[0.5, 0.0]" in ran.out
    assert "7 tensors" in ran.out and "memory: at most" in ran.out and not ran.err


def test_dry_run_json(weft: Weft, models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "x").touch()
    ran = weft("merge", models / "r.yml", models / "out", "--dry-run", "--json", "--threads", "2")
    assert ran.status == 0 and ran.json["tensors"] == 7 and ran.json["threads"] == 2
    rows = {r["name"]: r for r in ran.json["plan"]}
    assert rows["model.norm.weight"]["shape"] == [4] and rows["model.norm.weight"]["dtype"] == "bfloat16"
    assert ran.json["bytes_read"] > 0 and ran.json["peak_memory"] > 0
    assert "note: this plan could not be carried out" in ran.err and "--overwrite" in ran.err


def test_explain(weft: Weft, models: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    ran = weft("merge", models / "r.yml", models / "out", "--explain", name)
    assert ran.status == 0 and "task vectors (model − base)" in ran.out
    assert all(f"{models}/{m}: 4×4 bfloat16" in ran.out for m in ("base", "math", "code"))
    told = weft("merge", models / "r.yml", models / "out", "--explain", name, "--json").json
    assert told["method"] == "task_arithmetic" and len(told["inputs"]) == 3
    tied = weft("merge", models / "r.yml", models / "out", "--explain", "lm_head.weight")
    assert "model.embed_tokens.weight, to which lm_head.weight is tied" in tied.out
    wrong = weft("merge", models / "r.yml", models / "out", "--explain", "model.layers.1.mlp.up_prj.weight")
    refused(wrong, 2, "has no tensor", f"did you mean {name!r}")


def test_set(weft: Weft, models: Path) -> None:
    assert weft("merge", models / "r.yml", models / "out", "--set", "parameters.scale=0").status == 0
    merged, base = (load_file(models / n / "model.safetensors") for n in ("out", "base"))
    assert all(torch.equal(merged[n], base[n]) for n in base)
    refused(
        weft("merge", models / "r.yml", models / "o2", "--set", "parameters.scal=0"),
        2,
        "did you mean",
        "scale",
    )
    refused(weft("merge", models / "r.yml", models / "o2", "--set", "nonsense"), 2, "nonsense")


def test_log(weft: Weft, models: Path) -> None:
    log = models / "log.jsonl"
    assert weft("merge", models / "r.yml", models / "out", "--log-json", log).status == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert events[0]["event"] == "plan" and events[-1]["event"] == "done"
    assert len([e for e in events if e["event"] == "tensor"]) == 7
    ran = weft("merge", models / "r.yml", models / "o2", "--log-json", "-")
    assert (
        ran.status == 0 and all(json.loads(line) for line in ran.out.splitlines()) and "7 tensors" in ran.err
    )
    refused(weft("merge", models / "r.yml", models / "o3", "--log-json", "-", "--json"), 2, "stdout")


def test_existing_output_and_overwrite(weft: Weft, models: Path) -> None:
    assert weft("merge", models / "r.yml", models / "out").status == 0
    refused(weft("merge", models / "r.yml", models / "out"), 2, f"{models}/out exists", "--overwrite")
    assert weft("merge", models / "r.yml", models / "out", "--overwrite").status == 0


@pytest.mark.parametrize("out", ["math", "math/model.safetensors", "."])
def test_output_is_an_input(weft: Weft, models: Path, out: str) -> None:
    before = hashes(models)
    why = "does not look like a model" if out == "." else "which this merge reads"
    refused(weft("merge", models / "r.yml", models / out, "--overwrite"), 2, why)
    assert hashes(models) == before


@pytest.mark.parametrize(
    ("args", "status", "parts"),
    [
        (["merge", "{d}/nope.yml", "{d}/o"], 2, ["there is no recipe", "nope.yml"]),
        (["merge", "{d}", "{d}/o"], 2, ["is a folder"]),
        (["merge", "{d}/r.yml", "{d}/o", "--memry", "1GB"], 2, ["option --memry; did you mean --memory?"]),
        (["merge", "{d}/r.yml", "{d}/o", "--memory", "lots"], 2, ["'lots' is no size"]),
        (["merge", "{d}/r.yml", "{d}/o", "--memory", "100"], 1, ["not enough"]),
        (["merge", "{d}/r.yml", "{d}/o", "--threads", "0"], 2, ["--threads"]),
        (["merge", "{d}/r.yml", "{d}/o", "--device", "tpu9"], 2, ["'tpu9'"]),
        (["merge", "{d}/r.yml", "{d}/o", "--dtype", "float31"], 2, ["float31", "did you mean 'float"]),
        (["merge", "{d}/r.yml", "{d}/o", "--executor", "moon"], 2, ["no executor 'moon'"]),
        (["merge", "{d}/r.yml"], 2, ["OUT"]),
        (["mrge"], 2, ["mrge", "merge"]),
        (["inspect", "{d}/mth"], 1, ["does not exist", "did you mean 'math'"]),
        (["inspect", "{d}/r.yml"], 2, ["no weight file"]),
        (["diff", "{d}/math", "{d}/math", "--plot", "{d}/p.jpg"], 2, [".png"]),
        (["diff", "{d}/math", "{d}/math", "--plot", "{d}/no/p.png"], 1, ["no is no folder"]),
        (["methods", "tise"], 2, ["no method or step 'tise'", "did you mean 'ties'"]),
        (["systems", "--section", "99"], 2, ["no section '99'"]),
        (["--vresion"], 2, ["--vresion"]),
    ],
)  # fmt: skip
def test_refusals(weft: Weft, models: Path, args: list[str], status: int, parts: list[str]) -> None:
    before = sorted(models.iterdir())
    refused(weft(*(a.replace("{d}", str(models)) for a in args)), status, *parts)
    assert sorted(models.iterdir()) == before


def test_recipe_problems_come_all_at_once(weft: Weft, models: Path) -> None:
    text = (
        (models / "r.yml")
        .read_text()
        .replace("merge_method", "merge_metod")
        .replace("weight: 0.5", "wight: 1")
    )
    (models / "r.yml").write_text(text)
    ran = weft("merge", models / "r.yml", models / "out")
    refused(ran, 2, "merge_metod", "merge_method")
    missing = (models / "r.yml").read_text().replace("merge_metod", "merge_method").replace("/math", "/mth")
    (models / "r.yml").write_text(missing.replace("wight", "weight"))
    refused(weft("merge", models / "r.yml", models / "out"), 1, "mth does not exist", "did you mean 'math'")


def test_truncated_input(weft: Weft, models: Path) -> None:
    file = models / "math" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused(weft("merge", models / "r.yml", models / "out"), 1, "math/model.safetensors")
    assert not (models / "out").exists()


# -- check, inspect, diff, the lists -------------------------------------------------------------------------


def test_check(weft: Weft, models: Path) -> None:
    ran = weft("check", models / "r.yml")
    assert ran.status == 0 and "no problem found" in ran.out and "method: task_arithmetic" in ran.out
    told = weft("check", models / "r.yml", "--json").json
    assert told["ok"] and told["documents"][0]["models"] == [f"{models}/math", f"{models}/code"]
    save_file({"other": torch.ones(1)}, models / "code" / "model.safetensors")
    headers = weft("check", models / "r.yml")
    assert headers.status == 1 and "model.norm.weight: not in" in headers.out
    assert weft("check", models / "r.yml", "--no-headers").status == 0
    wrong = weft("check", models / "r.yml", "--set", "parameters.scal=1", "--json")
    assert wrong.status == 2 and not wrong.json["ok"] and "scale" in wrong.json["problems"][0]
    assert weft("check", models / "nope.yml").status == 2


def test_inspect(weft: Weft, models: Path) -> None:
    ran = weft("inspect", models / "math")
    assert ran.status == 0 and "model.layers.{0,1}.mlp.up_proj.weight" in ran.out and "×2" in ran.out
    assert "lm_head.weight → model.embed_tokens.weight" in ran.out and "tokenizer_config.json" in ran.out
    told = weft("inspect", models / "math", "--json").json
    assert told["parameters"] == 95 and told["tensor_count"] == 7 and told["layers"] == {"model.layers": 2}
    assert told["dtypes"] == {"bfloat16": 92, "int64": 3} and "values" not in told["tensors"][0]


def test_inspect_values(weft: Weft, models: Path) -> None:
    state = load_file(models / "math" / "model.safetensors")
    state["model.norm.weight"][:2] = torch.tensor([float("nan"), 0.0])
    save_file(state, models / "math" / "model.safetensors")
    ran = weft("inspect", models / "math", "--values")
    assert ran.status == 0 and "NaN or infinite values in 1 tensor:\n  model.norm.weight" in ran.out
    told = {
        t["name"]: t["values"] for t in weft("inspect", models / "math", "--values", "--json").json["tensors"]
    }
    assert told["model.norm.weight"]["nan"] == 1 and told["model.norm.weight"]["zero_fraction"] == 0.25
    name = "model.embed_tokens.weight"
    assert told[name]["norm"] == pytest.approx(state[name].double().norm().item(), rel=1e-12)


def test_diff(weft: Weft, models: Path) -> None:
    ran = weft("diff", models / "math", models / "code")
    assert ran.status == 0 and "model.layers.1" in ran.out and "7 tensors compared" in ran.out
    assert "rope_theta: 11.0 in A, 12.0 in B" in ran.out
    same = weft("diff", models / "math", models / "math")
    assert same.status == 0 and "identical: all 7 tensors" in same.out
    told = weft("diff", models / "math", models / "code", "--base", models / "base", "--json").json
    assert told["base"] == f"{models}/base" and -1 <= told["total"]["cosine"] <= 1
    assert weft("diff", models / "math", models / "math", "--json").json["identical"] is True


def test_diff_picture(weft: Weft, models: Path) -> None:
    pytest.importorskip("matplotlib")
    ran = weft("diff", models / "math", models / "code", "--plot", models / "p.svg")
    assert ran.status == 0 and f"{models}/p.svg" in ran.err and b"<svg" in (models / "p.svg").read_bytes()


def test_methods(weft: Weft) -> None:
    listed = weft("methods")
    assert listed.status == 0 and "breadcrumbs_ties" in listed.out
    one = weft("methods", "ties")
    assert "trim(density=0.2, scope=model)" in one.out and "float in [0, 1], one a model" in one.out
    assert "arXiv:2306.01708" in one.out and "mergekit: density=1" in one.out
    assert "a step" in weft("methods", "trim").out
    rows = weft("methods", "--json").json
    assert {"linear", "slerp", "ties", "dare"} <= {r["name"] for r in rows}
    for row in rows:
        assert row["summary"] and row["steps"] and row["space"] in ("weights", "deltas")
        assert row["models"]["min"] >= 1 and row["base"] in ("required", "optional", "forbidden")
        for p in row["parameters"]:
            assert p["type"] in ("float", "int", "bool", "str", "choice") and p["description"]
            assert p["required"] or p["default"] is not None or p["nullable"]


def test_systems(weft: Weft) -> None:
    rows = weft("systems", "--json").json
    assert len(rows) > 150
    assert all({"id", "name", "section", "status", "entry", "test"} <= set(r) for r in rows)
    assert {r["status"] for r in rows} <= {"works", "planned"}
    part = weft("systems", "--section", "2.2.3", "--json").json
    assert part and all(r["section"].startswith("2.2.3") for r in part) and len(part) < len(rows)
    assert re.search(rf"{len(rows)} systems: \d+ work, \d+ planned", weft("systems").out)


def test_schema_and_version(weft: Weft) -> None:
    assert "$defs" in weft("schema").json
    assert weft("--version").out == f"weft {__version__}\n"
    assert (help := weft("--help")).status == 0 and "merge" in help.out
    assert (bare := weft()).status == 2 and bare.out == help.out


# -- errors nobody planned, and what a terminal must not obey ------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
        (MemoryError(), 1, "out of memory"),
        (OSError(28, "No space left on device", "/x/y"), 1, "/x/y: No space left on device"),
        (BrokenPipeError(32, "Broken pipe"), None, ""),
    ],
)
def test_what_goes_wrong_outside_weft(
    weft: Weft, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int | None, said: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("weft.cli.inspecting.inspect_model", fail)
    stdout, stderr = sys.stdout, sys.stderr
    try:
        ran = weft("inspect", "x")
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    assert said in ran.err and (status is None or ran.status == status)


def test_a_bug_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("\x1b[31mred")

    monkeypatch.setattr("weft.cli.inspecting.inspect_model", fail)
    monkeypatch.setattr(sys, "argv", ["weft", "inspect", "x"])
    monkeypatch.delenv("WEFT_DEBUG", raising=False)
    with pytest.raises(SystemExit) as exit:
        main()
    said = capsys.readouterr().err
    assert exit.value.code == 1 and "a bug in weft" in said and "\x1b" not in said and "\\x1b[31mred" in said


def test_control_characters_are_shown(weft: Weft, tmp_path: Path) -> None:
    evil = tmp_path / "a\x1b[2Jb\u202e\nc"
    evil.mkdir()
    save_file({"w": torch.ones(2)}, evil / "model.safetensors")
    for args in (
        ["inspect", evil],
        ["diff", evil, evil],
        ["inspect", evil / "no"],
        ["inspect", evil, "--json"],
    ):
        ran = weft(*args)
        assert not re.search("[\x1b\u202e]", ran.out + ran.err)
    assert json.loads(weft("inspect", evil, "--json").out)["origin"] == str(evil)
    assert safe("a\n\tb\x9b\udc80é−") == "a\n\tb\\x9b\\udc80é−" and one_line("a\nb") == "a\\nb"


def test_a_share_is_never_rounded_to_nothing_or_all() -> None:
    assert [percent(x) for x in (0, 1e-9, 0.5, 1 - 1e-9, 1)] == [
        "0.00 %", "<0.01 %", "50.00 %", ">99.99 %", "100.00 %"
    ]  # fmt: skip


# -- as a process --------------------------------------------------------------------------------------------


def process(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("args", [["--help"], ["merge", "--help"], ["systems", "--json"]])
def test_light_verbs_import_nothing_heavy(args: list[str]) -> None:
    ran = process("-X", "importtime", "-m", "weft.cli.main", *args)
    assert ran.returncode == 0, ran.stderr
    imported = {line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if "|" in line}
    # typer itself imports pydantic to read a verb's arguments
    assert "typer" in imported and not imported & {"torch", "numpy", "rich", "numba", "yaml"}


def test_a_process_ends_at_once_but_in_order() -> None:
    """What is printed arrives, and whoever asked to be called at the end is called."""
    code = "import atexit, sys\nfrom weft.cli.main import process\n{}\nsys.argv[1:] = {!r}\nprocess()"
    last = "atexit.register(lambda: print('last'))"
    told = process("-c", code.format(last, ["--version"]))
    assert told.returncode == 0 and told.stdout.startswith("weft ") and told.stdout.endswith("last\n")
    wrong = process("-c", code.format(last, ["merg"]))
    assert wrong.returncode == 2 and wrong.stdout == "last\n" and "No such command" in wrong.stderr
    after = "(threading.main_thread().join(), print('done'))"
    thread = f"import threading\nthreading.Thread(target=lambda: {after}).start()"
    waited = process("-c", code.format(thread, ["--version"]))
    assert waited.returncode == 0 and waited.stdout.endswith("done\n")


def test_statuses_and_a_terminal_without_unicode(models: Path) -> None:
    missing = process("-m", "weft.cli.main", "diff", str(models / "nope"), str(models / "math"))
    assert (
        missing.returncode == 1 and missing.stderr.startswith("weft: ") and "Traceback" not in missing.stderr
    )
    shown = process("-m", "weft.cli.main", "diff", str(models / "math"), str(models / "code"))
    assert shown.returncode == 0 and "\\u2016" in shown.stdout and not shown.stderr
