"""Before merging: a network's symmetries, found, and two networks brought into one order by them.

    aligned = weft.align(b, to=a)                          # a lazy checkpoint
    merged = weft.merge([a, aligned], "linear")
    spec = weft.align.discover(module, example_inputs)     # print it, spec.save(path), edit it
    spec.apply(b, weft.align.weight_matching(spec, a, b))  # the same, step by step

The package is the verb itself: calling it calls `weft.align.verb.align`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

_WHERE = {
    "DeepAlign": "deep",
    "Group": "spec",
    "Law": "laws",
    "Node": "spec",
    "PermutationSpec": "spec",
    "Permuted": "apply",
    "Symmetries": "laws",
    "Turned": "laws",
    "activation_matching": "correlate",
    "agreement": "weights",
    "annealed": "annealing",
    "bbp_map": "atoms",
    "c2m3": "many",
    "cca_merge": "cca",
    "deep_align": "deep",
    "discover": "discovery",
    "fedma": "growing",
    "graph_matching": "graphs",
    "hardened": "soft",
    "merge_many": "many",
    "neuron_alignment": "correlate",
    "ot_fusion": "transport",
    "pfnm": "growing",
    "preserved": "discovery",
    "relating": "many",
    "reordered": "apply",
    "rotation_matching": "turning",
    "sinkhorn_matching": "sinkhorn",
    "softened": "soft",
    "softly_reordered": "soft",
    "spec_of": "stored",
    "straight_through": "straight",
    "symmetries": "lie",
    "together": "many",
    "transformer_fusion": "transport",
    "weight_matching": "weights",
    "widened": "growing",
    "zip_models": "zipping",
}

__all__ = [
    "DeepAlign",
    "Group",
    "Law",
    "Node",
    "PermutationSpec",
    "Permuted",
    "Symmetries",
    "Turned",
    "activation_matching",
    "agreement",
    "annealed",
    "bbp_map",
    "c2m3",
    "cca_merge",
    "deep_align",
    "discover",
    "fedma",
    "graph_matching",
    "hardened",
    "merge_many",
    "neuron_alignment",
    "ot_fusion",
    "pfnm",
    "preserved",
    "relating",
    "reordered",
    "rotation_matching",
    "sinkhorn_matching",
    "softened",
    "softly_reordered",
    "spec_of",
    "straight_through",
    "symmetries",
    "together",
    "transformer_fusion",
    "weight_matching",
    "widened",
    "zip_models",
]


class _Verb(ModuleType):
    """A module that can be called, since importing any file of the package names it `weft.align`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from weft.align.verb import align

        return align(*args, **kwargs)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.align.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.align' has no attribute {name!r}")


sys.modules[__name__].__class__ = _Verb
