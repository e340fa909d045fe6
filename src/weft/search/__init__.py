"""Choosing coefficients: `weft.search` tries candidates of a recipe and keeps the best by validation data.

    found = weft.search("search.yml")                                   a search file, as `weft search` takes it
    found = weft.search("recipe.yml", {"parameters.scale": {"low": 0, "high": 1}}, accuracy,
                        validation="validation", direction="maximize")

The package is the verb itself: calling it calls `weft.search.run.search`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.search`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.search.run import search

        return search(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in ("Objective", "Result", "search"):
        from importlib import import_module

        room = {"Objective": "objective", "Result": "result", "search": "run"}[name]
        return getattr(import_module(f"weft.search.{room}"), name)
    raise AttributeError(f"module 'weft.search' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
