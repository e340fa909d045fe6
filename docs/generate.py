"""Make methods.md, systems.md, bench-results.md of registry, catalogue, results: `python docs/generate.py`."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from weft.bench.page import cost, curve
from weft.bench.results import Results, combined, read
from weft.bench.table import HEADINGS, TITLES, cells, grouped, notes
from weft.methods.params import Parameter
from weft.methods.registry import METHODS, Method
from weft.methods.step import STEPS, Step
from weft.systems import System, catalogue

ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
SECTIONS = {
    "2.1": "Baselines and platforms", "2.2.2.1": "Linearised fine-tuning",
    "2.2.2.2": "Architecture transformation", "2.2.2.3": "Weight alignment", "2.2.3.1": "Basic merging",
    "2.2.3.2": "Weighted merging", "2.2.3.3": "Subspace merging", "2.2.3.4": "Routing",
    "2.2.3.5": "Post-calibration", "2.2.4": "Theory and analysis", "2.3.1": "Language models",
    "2.3.2": "Multimodal models", "2.3.3": "Image generation", "2.4.1": "Continual learning",
    "2.4.2": "Multi-task and multi-objective learning", "2.4.3": "Out-of-distribution generalisation",
    "2.4.4": "Federated learning", "2.4.5": "Zero-shot and few-shot learning",
    "2.4.6": "Attacks and defences",
}  # fmt: skip


def cell(text: str) -> str:
    """Text for a table: no line break, no column mark, arXiv ids as links."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", plain)


def value(v: Any) -> str:
    """A value as a recipe writes it."""
    return "none" if v is None else str(v).lower() if isinstance(v, bool) else str(v)


def parameters(declared: Iterable[Parameter]) -> list[str]:
    """A table of parameters."""
    rows = [
        f"| `{p.name}` | {cell(p.describe())} | {'must be given' if p.required else value(p.default)} |"
        for p in declared
    ]
    return ["| parameter | value | default |", "|---|---|---|", *rows, ""] if rows else []


def described(thing: Method | Step) -> list[str]:
    """The docstring as paragraphs."""
    return [inspect.cleandoc(thing.__doc__ or ""), ""]


def needs(m: Method) -> str:
    """What a method takes, in words."""
    low, high = m.models
    models = f"{low} model{'s' * (low != 1)}" if low == high else f"{low} or more models"
    base = {"required": " and a base", "optional": " and, if you like, a base", "forbidden": ", no base"}[
        m.base
    ]
    space = "task vectors" if m.space == "deltas" else "weights"
    task = ", the task's number (the result is that task's model)" if "task" in m.params else ""
    return f"Works on {space}; takes {models}{base}{task}."


def methods_page() -> str:
    """Every method, its parameters and paper; then every step."""
    out = [
        "# Methods and steps", "",
        "Made from the registry, as is what `weft methods` prints. A recipe's `merge_method` and "
        "`weft.merge(…, method=…)` take any of the names; each is also a function on tensors.", "",
        "A parameter marked *one a model* may be a list, or be given under each model of a recipe. Every "
        "parameter may be a curve over the depth or a list of rules: see [Recipes](recipes.md).", "",
    ]  # fmt: skip
    out += ["## Methods", ""]
    for m in METHODS.values():
        also = f" Also called {', '.join(f'`{a}`' for a in m.aliases)}." if m.aliases else ""
        out += [f"### {m.name}", "", *described(m), needs(m) + also, ""]
        out += parameters(m.params.values())
        if m.compat.get("mergekit"):
            theirs = ", ".join(f"`{k}: {value(v)}`" for k, v in m.compat["mergekit"].items())
            out += [f"With `compat: mergekit` the defaults are {theirs}.", ""]
        if m.paper:
            out += [cell(m.paper), ""]
    out += [
        "## Steps", "",
        "What methods are made of, and what `steps:` in a recipe may list. A step maps the stack of all "
        "models' task vectors to another stack, or merges it.", "",
    ]  # fmt: skip
    for name, step in sorted(STEPS.items()):
        does = "merges the models" if step.reduces else "keeps the models apart"
        out += [f"### {name} (step)", "", *described(step), f"It {does}.", ""]
        out += parameters(step.params.values())
    return "\n".join(out) + "\n"


def title(section: str) -> str:
    """The heading a section's systems stand under."""
    return next(f"{s} {t}" for s, t in SECTIONS.items() if section == s or section.startswith(s + "."))


def systems_page() -> str:
    """Every named system, by section."""
    rows = catalogue()
    working = sum(s.status == "works" for s in rows)
    out = [
        "# Systems", "",
        f"The survey of the field names {len(rows)} systems. **{working} work** in this version: a function "
        "runs each (✓), and an acceptance test asserts its effect on real, if small, models. The others are "
        "planned. `weft systems` prints the same list.", "",
    ]  # fmt: skip
    sections: dict[str, list[System]] = {}
    for s in rows:
        sections.setdefault(title(s.section), []).append(s)
    for heading, found in sections.items():
        out += [f"## {heading}", "", "| id | system | | what it is |", "|---|---|---|---|"]
        for s in found:
            mark, entry = ("✓", f"<br>`{s.entry}`") if s.status == "works" else ("", "")
            about = f"{cell(s.summary)}<br>{cell(s.paper)}{entry}"
            out.append(f"| {s.id} | {cell(s.name)} | {mark} | {about} |")
        out.append("")
    return "\n".join(out) + "\n"


def results_page(folder: Path) -> str:
    """The tables and drawings of `weft bench`'s results in the folder, files of one suite as one."""
    out = [
        "---", "hide: [toc]", "---", "", "# Results of the benchmark", "",
        "Made from `docs/bench/*.json`, which hold the figures of runs of [`weft bench`](bench.md): how "
        "to read the tables is said there.", "",
    ]  # fmt: skip
    style = (Path(__file__).parents[1] / "src/weft/bench/page.css").read_text(encoding="utf-8")
    variables = (
        ":root { --ink: currentColor; --muted: #777; --line: #8884; }\n"
        # wide tables: what the theme gives a cell would push half of the columns out of sight
        ".md-typeset table:not([class]) th, .md-typeset table:not([class]) td "
        "{ min-width: 0; padding: .25em .6em; white-space: nowrap; }"
    )
    out += [f"<style>{variables}\n{style}</style>".replace("\n\n", "\n"), ""]
    suites: dict[str, list[Results]] = {}
    for path in sorted(folder.glob("*.json")):
        found = read(path)
        suites.setdefault(found.suite, []).append(found)
    for parts in suites.values():
        out += _results(combined(parts))
    return "\n".join(out) + "\n"


def _results(results: Results) -> list[str]:
    facts = [results.machine, results.date, f"seeds {', '.join(map(str, results.seeds))}"]
    out = [f"## {results.suite}", "", cell(results.about), "", "; ".join(f for f in facts if f) + ".", ""]
    commands = "".join(f"<br><code>{escape(c)}</code>" for c in results.command.split("; "))
    out += [f"<details><summary>the command</summary>{commands}</details>", ""]
    for size in reversed(results.sizes):
        if len(results.sizes) > 1:
            out += [f"### {results.suite}: {size} tasks", ""]
        for name, rows in grouped(results, size).items():
            out += [f"*{TITLES[name]}*", "", f"| {' | '.join(HEADINGS)} |", "|" + "---|" * len(HEADINGS)]
            ordered = rows if name == "reference" else list(reversed(rows))
            out += [f"| {' | '.join(cell(c) for c in cells(results, r))} |" for r in ordered]
            out.append("")
    drawn = [re.sub(r"<h2>.*?</h2>", "", d(results)) for d in (cost, curve)]
    out += [f"{d}\n" for d in drawn if d]
    return [*out, *(f"- {cell(n)}" for n in notes(results)), ""]


def write_pages(docs: Path) -> None:
    """Write all pages; a page that would not change is left alone, so that `mkdocs serve` comes to rest."""
    pages = {
        "methods.md": methods_page(), "systems.md": systems_page(),
        "bench-results.md": results_page(Path(__file__).parent / "bench"),
    }  # fmt: skip
    for name, text in pages.items():
        path = docs / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write_pages(Path(__file__).parent)
