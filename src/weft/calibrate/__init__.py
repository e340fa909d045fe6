"""After merging: `weft.calibrate` mends a merged model with a little data.

    found = weft.calibrate(merged, batches, "repair", parents=[a, b], module=network)
    weft.save(found.checkpoint, "out")          # an ordinary checkpoint where that is exact
    found.added                                 # parameters beside the weights, else

The package is the verb itself: calling it calls `weft.calibrate.run.calibrate`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_WHERE = {
    "Adapted": "adapted", "Calibrated": "result", "calibrate": "run", "calibration_error": "temperature",
    "load_adapted": "adapted", "magnitude": "magnitude", "reestimate": "batchnorm", "refit_head": "head",
    "repair": "repair", "surgery": "surgery", "temperature": "temperature",
}  # fmt: skip

__all__ = [
    "Adapted", "Calibrated", "calibrate", "calibration_error", "load_adapted", "reestimate", "refit_head",
]  # fmt: skip


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.calibrate`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.calibrate.run import calibrate

        return calibrate(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.calibrate.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.calibrate' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
