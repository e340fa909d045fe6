"""One HTML page of findings that needs nothing else: plotly.js is in it, once, so figures hover and zoom."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from weft.analysis.finding import Finding
from weft.errors import DataError, MissingExtra, UsageError

FOLD = 3
STYLE = """
:root { --ink: #1f2530; --soft: #5b6472; --line: #e3e6ec; --card: #ffffff; --page: #f5f6f9; --accent: #2f6fdb; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
header, main { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 40px; }
h1 { font-size: 28px; margin: 0 0 4px; }
h2 { font-size: 19px; margin: 0 0 6px; }
p { margin: 6px 0; }
.soft { color: var(--soft); }
.headline { font-weight: 600; }
section, nav { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 20px 24px;
  margin: 20px 0; }
nav table { border-collapse: collapse; width: 100%; }
nav td:first-child { width: 36%; }
nav td { padding: 6px 12px 6px 0; border-top: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
nav tr:first-child td { border-top: 0; }
nav summary { padding: 6px 0; cursor: pointer; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
footer { color: var(--soft); padding: 8px 0 40px; font-size: 13px; }
"""


def html_report(
    findings: Sequence[Finding], *, heading: str = "weft analyze", notes: Sequence[str] = ()
) -> str:
    """The page as text. Raises UsageError for no findings, MissingExtra without plotly."""
    if not findings:
        raise UsageError("there are no findings to report")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise MissingExtra("plotly", "plot", "an HTML report") from None
    sections, lines = [], []
    for i, found in enumerate(findings):
        title, line = html.escape(found.title), html.escape(found.headline)
        lines.append((type(found), f'<tr><td><a href="#f{i}">{title}</a></td><td>{line}</td></tr>'))
        figures = "\n".join(_figure(f, f"plot{i}-{j}") for j, f in enumerate(_figures(found)))
        sections.append(f'<section id="f{i}"><h2>{title}</h2><p class="headline">{line}</p>'
                        f'<p class="soft">{html.escape(found.about)}</p>{figures}</section>')  # fmt: skip
    told = "".join(f'<p class="soft">{html.escape(n)}</p>' for n in notes)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(heading)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head><body>\n"
        f"<header><h1>{html.escape(heading)}</h1>{told}</header>\n"
        f"<main><nav>{_contents(lines)}</nav>\n{''.join(sections)}\n"
        "<footer>Drag to zoom, double-click to go back, point at a mark for its numbers.</footer></main>"
        "</body></html>\n"
    )


def _contents(lines: Sequence[tuple[type[Finding], str]]) -> str:
    """What was found, a line each; those of one kind are folded where there are many."""
    parts = []
    for kind, group in groupby(lines, key=lambda line: line[0]):
        rows = [row for _, row in group]
        table = f"<table>{''.join(rows)}</table>"
        name = " ".join(re.findall("[A-Z][a-z]*", kind.__name__)).capitalize()
        many = f"<details><summary>{name}: {len(rows)} findings</summary>{table}</details>"
        parts.append(many if len(rows) > FOLD else table)
    return "".join(parts)


def _figures(found: Finding) -> list[Any]:
    """The finding's figure, and those it offers beside it."""
    extra = [getattr(found, n) for n in ("plot_conflicts", "plot_layers") if hasattr(found, n)]
    return [found.plot(), *(draw() for draw in extra)]


def _figure(made: Any, place: str) -> str:
    return str(made.to_html(
        full_html=False, include_plotlyjs=False, div_id=place, 
        config={"displaylogo": False, "displayModeBar": "hover", "responsive": True},
    ))  # fmt: skip


def write_report(findings: Sequence[Finding], path: str | Path, **how: Any) -> None:
    """Write the page; it has its name only when it is whole. Raises DataError where there is no such folder."""
    path = check_report(path)
    text = html_report(findings, **how)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_report(path: str | Path) -> Path:
    """Raise what would keep a report from being written there, before anything is computed."""
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: a report's name ends in .html")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder; make it first")
    try:
        import plotly  # noqa: F401
    except ImportError:
        raise MissingExtra("plotly", "plot", "an HTML report") from None
    return path
