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
    from weft.adapters.apply import apply_adapters
    from weft.adapters.extract import extract_lora
    from weft.adapters.merge import merge_adapters
    from weft.adapters.resize import resize_lora
    from weft.advise.propose import advise
    from weft.analysis.analyze import analyze
    from weft.analysis.evaluation import evaluate
    from weft.api import load, materialize, merge, save
    from weft.bench.run import bench
    from weft.calibrate.run import calibrate
    from weft.checkpoints.base import Checkpoint
    from weft.deltas.family import pack_family
    from weft.deltas.pack import pack_delta
    from weft.errors import DataError, UsageError, WeftError
    from weft.llm.moe.build import build_moe
    from weft.llm.moe.match import match_experts
    from weft.llm.moe.reduce import reduce_experts
    from weft.llm.shuffle import shuffled
    from weft.llm.slices import layers, stacked
    from weft.llm.tokens.share import share_vocabulary
    from weft.llm.tokens.transplant import transplant
    from weft.llm.upscale import expanded, upscaled
    from weft.recipes.build import build
    from weft.routing.build import route
    from weft.statistics.iterated import iteris
    from weft.statistics.measure import measure
    from weft.statistics.remeasured import regmean_pp
    from weft.train.loop import finetune

_API = {"load": "weft.api", "merge": "weft.api", "save": "weft.api", "materialize": "weft.api",
        "build": "weft.recipes", "search": "weft.search", "calibrate": "weft.calibrate",
         "Checkpoint": "weft.checkpoints.base",
        "METHODS": "weft.methods.registry", "apply_adapters": "weft.adapters.apply",
        "extract_lora": "weft.adapters.extract", "merge_adapters": "weft.adapters.merge",
        "resize_lora": "weft.adapters.resize", "build_moe": "weft.llm.moe.build",
        "match_experts": "weft.llm.moe.match", "reduce_experts": "weft.llm.moe.reduce",
        "share_vocabulary": "weft.llm.tokens.share", "transplant": "weft.llm.tokens.transplant",
        "pack_delta": "weft.deltas.pack", "pack_family": "weft.deltas.family",
        "layers": "weft.llm.slices", "stacked": "weft.llm.slices", "shuffled": "weft.llm.shuffle",
        "analyze": "weft.analysis.analyze", "evaluate": "weft.analysis.evaluation",
        "upscaled": "weft.llm.upscale", "expanded": "weft.llm.upscale",
        "finetune": "weft.train.loop", "route": "weft.routing.build", "bench": "weft.bench.run",
        "measure": "weft.statistics.measure", "iteris": "weft.statistics.iterated",
        "regmean_pp": "weft.statistics.remeasured",
        "advise": "weft.advise.propose",
        "WeftError": "weft.errors", "DataError": "weft.errors", "UsageError": "weft.errors"}  # fmt: skip

_VERBS = ("align", "learn")
"""Packages that can be called."""

__all__ = [
    "Checkpoint",
    "DataError",
    "UsageError",
    "WeftError",
    "__version__",
    "advise",
    "align",
    "analyze",
    "apply_adapters",
    "bench",
    "build",
    "build_moe",
    "calibrate",
    "evaluate",
    "expanded",
    "extract_lora",
    "finetune",
    "iteris",
    "layers",
    "learn",
    "load",
    "match_experts",
    "materialize",
    "measure",
    "merge",
    "merge_adapters",
    "pack_delta",
    "pack_family",
    "reduce_experts",
    "regmean_pp",
    "resize_lora",
    "route",
    "save",
    "search",
    "share_vocabulary",
    "shuffled",
    "stacked",
    "transplant",
    "upscaled",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Everything is imported when first used, so that `import weft` costs nothing."""
    from importlib import import_module

    if name in _API:
        return getattr(import_module(_API[name]), name)
    if name in _VERBS:
        return import_module(f"weft.{name}")
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
