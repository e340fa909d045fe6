"""The user's cache: what took minutes to train or to unpack, under the hash of everything it was made from.

`WEFT_CACHE` names the folder (by default `weft` in XDG_CACHE_HOME or ~/.cache). A file is there only when it is
whole. What is made anew from other settings, data or code has another name; the folder may be deleted at any time.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weft.errors import WeftError

VARIABLE = "WEFT_CACHE"


def cache_folder() -> Path:
    """Where experts are kept."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "weft"


def key(made_from: Mapping[str, Any]) -> str:
    """sha256 of plain data, as 32 hex digits."""
    text = json.dumps(made_from, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def code(*objects: Any) -> list[str]:
    """What functions and classes do, as text in which comments, layout and documentation do not count."""
    return [_plain(inspect.getsource(o)) for o in objects]


def _plain(source: str) -> str:
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                node.body = body[1:] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.dump(tree)


def stored(
    kind: str, made_from: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors that `make` gives: read if they were made before from the same, else made and written.

    Where the folder cannot be written they are made each time. A file that cannot be read is made anew.
    """
    from safetensors.torch import save_file

    from weft.checkpoints.load import load

    path = cache_folder() / "bench" / f"{kind}-{key(made_from)}.safetensors"
    if path.is_file():
        try:
            return load(path).state_dict()
        except (WeftError, OSError):
            pass
    made = {n: t.detach().cpu().contiguous() for n, t in make().items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(made, partial, {"weft": json.dumps(made_from, sort_keys=True, default=str)})
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
    return made
