"""The benchmark: every merging method on every task of a suite, with experts trained here and kept in a cache.

    results = weft.bench("vision8", ["task_arithmetic", "spectral"], seeds=3)
    print(results.normalised(results.row("tsv")))

The package is the verb itself: calling it calls `weft.bench.run.bench`. A suite of one's own is a `Suite`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_WHERE = {
    "Contender": "contenders", "Outcome": "contenders", "Results": "results", "Score": "score", "Suite": "suite",
    "Task": "suite", "read": "results", "score": "score", "write_page": "page",
}  # fmt: skip

__all__ = ["Contender", "Outcome", "Results", "Score", "Suite", "Task", "read", "score", "write_page"]


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.bench`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.bench.run import bench

        return bench(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.bench.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.bench' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
