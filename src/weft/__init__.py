"""weft weaves the weights of several trained networks into one.

    merged = weft.merge(["path/a", "path/b"], base="path/base", method="ties", density=0.3)
    weft.save(merged, "path/out")

`load`, `merge` and arithmetic build lazy checkpoints; `save` (or `materialize`) moves the bytes. Every method
and every step is also a function on tensors under its own name: `weft.ties(deltas, density=0.3)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weft._version import __version__

if TYPE_CHECKING:
    from weft.api import load, materialize, merge, save
    from weft.checkpoints.base import Checkpoint
    from weft.errors import DataError, UsageError, WeftError
    from weft.recipes.build import build

_API = {"load": "weft.api", "merge": "weft.api", "save": "weft.api", "materialize": "weft.api",
        "build": "weft.recipes", "Checkpoint": "weft.checkpoints.base", "METHODS": "weft.methods.registry",
        "WeftError": "weft.errors", "DataError": "weft.errors", "UsageError": "weft.errors"}  # fmt: skip

__all__ = [
    "Checkpoint", "DataError", "UsageError", "WeftError", "__version__", "build", "load", "materialize",
    "merge", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Everything is imported when first used, so that `import weft` costs nothing."""
    from importlib import import_module

    if name in _API:
        return getattr(import_module(_API[name]), name)
    if not name.startswith("_"):
        from weft.methods.registry import METHODS
        from weft.methods.step import STEPS

        if name in METHODS:
            return METHODS[name]
        if name in STEPS:
            return STEPS[name]
    raise AttributeError(f"module 'weft' has no attribute {name!r}")


def __dir__() -> list[str]:
    from weft.methods.registry import METHODS
    from weft.methods.step import STEPS

    return sorted({*__all__, *METHODS, *STEPS})
