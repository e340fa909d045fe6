"""Names, the recipe that searches vary, and the weights that are best for it."""

from __future__ import annotations

from typing import Any

BEST = (0.7, 0.2)
NAMES = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(4)] + ["model.norm.weight"]
WEIGHTS = "models[*].parameters.weight"

RECIPE = """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.3}}
  - {model: b, parameters: {weight: 0.3}}
parameters: {normalize: false}
"""


def space(**more: Any) -> dict[str, Any]:
    """Both weights in [0, 1]."""
    return {WEIGHTS: {"low": 0, "high": 1}, **more}
