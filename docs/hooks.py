"""mkdocs hook: the generated pages are made anew before every build."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def on_pre_build(config: Any) -> None:
    """Write methods.md, systems.md and bench-results.md beside the pages that are written by hand."""
    docs = Path(config["docs_dir"])
    sys.path[:0] = [str(docs), str(docs.parent / "src")]
    try:
        from generate import write_pages
    finally:
        del sys.path[0]
    write_pages(docs)
