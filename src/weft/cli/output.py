"""Printing: plain text that no tensor name can turn into terminal commands."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def safe(text: object) -> str:
    """The text with control characters shown rather than obeyed."""
    return _CONTROL.sub(lambda m: f"\\x{ord(m[0]):02x}", str(text))


def report_error(message: str) -> None:
    """`weft: message` on stderr."""
    print(f"weft: {safe(message)}", file=sys.stderr)


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


def console(stderr: bool = False) -> Console:
    """A rich console that does not interpret markup in data."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else 160
    return Console(
        stderr=stderr, markup=False, highlight=False, width=width, soft_wrap=not sys.stdout.isatty()
    )
