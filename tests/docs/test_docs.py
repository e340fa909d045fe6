"""Documentation is true: its Python runs, its recipes pass `weft check`, its commands and links exist."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path
from types import ModuleType

import pytest
import torch

import weft
from weft.methods.registry import METHODS
from weft.methods.step import STEPS
from weft.recipes import check
from weft.systems import catalogue

ROOT = Path(__file__).parents[2]
GENERATED = {"methods.md", "systems.md", "bench-results.md"}
PAGES = [
    p for p in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
    if p.name not in GENERATED and p.is_file()
]  # fmt: skip
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(page, line, match[1], match[2]))
    return [b for b in found if b.language in languages]


def network(seed: int, near: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Weights of a language model of two blocks, or a fine-tune of `near`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (20, 8), "model.norm.weight": (8,), "lm_head.weight": (20, 8)}
    for i in range(2):
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
            shapes[f"model.layers.{i}.{part}.weight"] = (8, 8)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (8,)
    noise = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    return noise if near is None else {n: near[n] + 0.1 * v for n, v in noise.items()}


def vision_language_model(folder: Path, seed: int) -> None:
    """The language model under another prefix, and a tower beside it."""
    from safetensors.torch import save_file

    state = {n.replace("model.", "model.language_model."): t for n, t in network(seed, network(0)).items()}
    tower = {f"model.vision_tower.layers.{i}.mlp.up_proj.weight": torch.randn(8, 8) for i in range(2)}
    folder.mkdir(parents=True)
    save_file(state | tower, folder / "model.safetensors")
    layers = {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps({"text_config": layers, "vision_config": layers}))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models that the pages speak of, as the current one."""
    from safetensors.torch import save_file

    base = network(0)
    for seed, name in enumerate(("base", "math", "code", "instruct", "toxic", "a", "b", "model")):
        folder = tmp_path / "path" / "to" / name
        folder.mkdir(parents=True)
        save_file(network(seed, base if seed else None), folder / "model.safetensors")
        words = {f"t{i}": i for i in range(18)} | ({"<|im_end|>": 18} if name == "instruct" else {})
        tokenizer = {"model": {"type": "BPE", "vocab": words, "merges": []}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    for seed, name in enumerate(("vlm", "other-vlm"), 20):
        vision_language_model(tmp_path / "path" / "to" / name, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block: Block, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "weft.demo" in block.text:
        pytest.importorskip("sklearn")
    monkeypatch.setattr(METHODS, "_methods", dict(METHODS._load()))  # what a page declares goes with it
    known = dict(STEPS)
    try:
        exec(compile(block.text, str(block), "exec"), {"__name__": "page"})
    finally:
        STEPS.clear()
        STEPS.update(known)


@pytest.mark.parametrize("block", blocks("yaml", "yml"), ids=str)
def test_recipes_pass_the_check(block: Block, models: Path) -> None:
    report = check(block.text, headers=True)
    assert report.ok, str(report)
    weft.build(block.text).state_dict()


def commands() -> list[tuple[Block, str]]:
    lines = [(b, line) for b in blocks("bash", "console", "sh") for line in b.text.splitlines()]
    return [(b, line) for b, line in lines if line.startswith("weft ")]


@pytest.mark.parametrize(("block", "line"), commands(), ids=lambda v: str(v)[:60])
def test_commands_and_their_options_exist(block: Block, line: str) -> None:
    import typer

    from weft.cli.main import app

    words = line.partition("#")[0].split()
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    while hasattr(command, "commands"):  # a verb with verbs of its own: `weft lora extract`
        words = words[1:]
        command = command.commands[words[1]]
    options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    for word in words[2:]:
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"{block}: weft {words[1]} has no {word}"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("weft_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generated_pages_name_every_method_step_and_system(tmp_path: Path) -> None:
    generator().write_pages(tmp_path)
    methods = (tmp_path / "methods.md").read_text(encoding="utf-8")
    assert all(f"\n### {name}\n" in methods for name in METHODS)
    assert all(f"\n### {name} (step)\n" in methods for name in STEPS)
    systems = (tmp_path / "systems.md").read_text(encoding="utf-8")
    assert all(f"| {s.id} | " in systems for s in catalogue())


def test_results_of_the_benchmark_are_shown_as_they_were_measured(tmp_path: Path) -> None:
    from weft.bench.results import read

    generator().write_pages(tmp_path)
    text = (tmp_path / "bench-results.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "bench").glob("*.json"))
    assert files
    for file in files:
        results = read(file)
        commands = results.command.split("; ")
        assert all(f"<code>{escape(c)}</code>" in text for c in commands) and results.date in text
        assert not re.search(r"/(home|root|tmp|work)\b", file.read_text(encoding="utf-8")), (
            "a path of a machine"
        )
        for row in results.rows:
            assert f"| {row.label} |" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
        assert Path(target).name in GENERATED or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"{p.name}" in nav for p in PAGES if p.parent.name == "docs")


def test_every_defect_of_the_list_has_a_test() -> None:
    text = (ROOT / "docs" / "differences-from-mergekit.md").read_text(encoding="utf-8")
    rows = text.partition("<!-- defects -->")[2].partition("<!-- /defects -->")[0].strip().splitlines()[2:]
    named = [re.fullmatch(r"\| .+ \| `(tests/\S+\.py)::(test_\w+)` \|", row) for row in rows]
    assert len(rows) > 20 and all(named), [r for r, m in zip(rows, named, strict=True) if not m]
    for path, name in (m.groups() for m in named if m):
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"
