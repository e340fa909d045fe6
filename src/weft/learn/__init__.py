"""Choosing coefficients by gradient: `weft.learn` trains what a merge is made of, with any loss.

    merged = Mergeable(module, base, experts, parts="tensor", tasks=("digits", "letters"))
    found = weft.learn(merged, "entropy", {"digits": x, "letters": z}, steps=500, lr=1e-3)
    weft.save(found.checkpoint(), "out")           # lazy: the coefficients over the same checkpoints

The package is the verb itself: calling it calls `weft.learn.loop.learn`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_WHERE = {
    "Blocks": "parts", "ByMethod": "by_method", "Learned": "loop", "Masked": "masks", "Mergeable": "mergeable",
    "Weighed": "weighed", "Weighted": "weighted", "adamerging": "adaptive", "adarank": "ranks", "atlas": "adaptive",
    "atlas_test_time": "adaptive", "concrete": "masks", "dam": "adaptive", "expert_merging": "adaptive",
    "learned_soup": "soups", "mehl_soup": "soups", "prodistill": "distill", "symerge": "adaptive",
    "twa": "soups",
}  # fmt: skip

__all__ = [
    "Blocks", "ByMethod", "Learned", "Masked", "Mergeable", "Weighed", "Weighted", "adamerging", "adarank", "atlas",
    "atlas_test_time", "concrete", "dam",
    "expert_merging", "learned_soup", "mehl_soup", "prodistill", "symerge", "twa",
]  # fmt: skip


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.learn`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.learn.loop import learn

        return learn(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name == "learn":
        return sys.modules[__name__]
    if name in _WHERE:
        return getattr(import_module(f"weft.learn.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.learn' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
