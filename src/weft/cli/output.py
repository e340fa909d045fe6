"""Printing: plain text that no tensor name can turn into terminal commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

UNLIMITED = 100_000
"""The width of what is not a terminal: a name in a pipe or a file is never cut short."""


def safe(text: object) -> str:
    """The text with control characters shown rather than obeyed; line breaks and tabs stay."""
    told = str(text)
    return told if told.isprintable() else "".join(map(_shown, told))


def one_line(text: object) -> str:
    """As `safe`, and line breaks are shown, too: for names and paths, which could fake a line."""
    return safe(text).replace("\n", "\\n").replace("\t", "\\t")


def _shown(char: str) -> str:
    # what Python does not call printable: controls, bidirectional overrides, lone surrogates …
    return char if char.isprintable() or char in "\n\t" else char.encode("unicode_escape").decode()


def report_error(message: str) -> None:
    """`weft: message` on stderr."""
    print(f"weft: {safe(message)}", file=sys.stderr)


def note(message: str) -> None:
    """`note: message` on stderr."""
    print(f"note: {safe(message)}", file=sys.stderr)


def print_json(data: Any) -> None:
    """JSON on stdout, readable in any script, with what a terminal might obey escaped."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    print(re.sub(r"[^\x20-\x7e\n]", lambda m: m[0] if m[0].isprintable() else json.dumps(m[0])[1:-1], text))


def console(stderr: bool = False) -> Console:
    """A rich console that does not interpret markup in data."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else UNLIMITED
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False, width=width)


def table(*columns: str, title: str | None = None) -> Table:
    """An empty table; a column whose name begins with `>` is flush right. Long names fold, none is cut."""
    from rich import box
    from rich.table import Table

    made = Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        title=title, title_justify="left", title_style="bold",
    )  # fmt: skip
    for name in columns:
        right = name.startswith(">")
        made.add_column(
            name.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return made


def shape_text(shape: Sequence[int]) -> str:
    """(3072, 1024) → `"3072×1024"`."""
    return "×".join(map(str, shape)) or "scalar"


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """0.1234 → `"12.34 %"`; a share that is not quite nothing or all is never shown as such."""
    if value is None:
        return "–"
    if 0 < value < 0.00005:
        return "<0.01 %"
    if 0.99995 <= value < 1:
        return ">99.99 %"
    return f"{100 * value:.2f} %"


def key_values(given: list[str]) -> dict[str, Any]:
    """KEY=VALUE of `--set`, values read as YAML. UsageError for what is neither."""
    import yaml

    from weft.errors import UsageError

    found: dict[str, Any] = {}
    for item in given:
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise UsageError(f"--set is KEY=VALUE, such as rank=64, not {item!r}")
        try:
            found[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UsageError(f"--set {key}: {text!r} cannot be read as a value") from None
    return found
