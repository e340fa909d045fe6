"""Looking at checkpoints before they are merged, and proposing a recipe with reasons.

    advice = weft.advise(["path/math", "path/code"], base="path/base")
    print(advice)
    Path("recipe.yml").write_text(advice.recipe)

The package is the verb itself: calling it calls `weft.advise.propose.advise`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_WHERE = {"Advice": "propose", "Look": "look", "look": "look", "propose": "propose"}

__all__ = ["Advice", "Look", "look", "propose"]


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.advise`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.advise.propose import advise

        return advise(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.advise.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.advise' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
