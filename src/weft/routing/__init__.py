"""Merging anew for each input: a shared merge, a residual an expert, and a gate that weighs them.

    routed = weft.route(module, base, experts, shared="task_arithmetic", residual="lowrank:16", gate="prototype",
                        data={"digits": x, "letters": z})
    routed(x);  routed.weights_for(x);  print(routed.cost());  routed.save("out")
    routed = weft.routing.load("out", module)

SMEAR, Twin-Merging, WEMoE, PWE-MoE, SMILE, ESM++, MASS, DaWin, EMR, TALL masks and TSV-C are settings of it
(docs/routing.md has them in a table).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.routing.build import route
    from weft.routing.export import mixture
    from weft.routing.gating import Gating
    from weft.routing.learning import fit_router, train
    from weft.routing.preferences import Front, front, pareto
    from weft.routing.routed import Routed
    from weft.routing.stored import load

_WHERE = {
    "Front": "preferences", "Gating": "gating", "Routed": "routed", "fit_router": "learning",
    "front": "preferences", "load": "stored", "mixture": "export", "pareto": "preferences", "route": "build",
    "train": "learning",
}  # fmt: skip

__all__ = [
    "Front", "Gating", "Routed", "fit_router", "front", "load", "mixture", "pareto", "route", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.routing.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.routing' has no attribute {name!r}")
