"""Fused kernels for hot pipelines: the same arithmetic as the torch steps, in one pass over raw values.

A pipeline is cut into the longest runs of steps that have an emitter (emit.py); each run becomes one compiled
loop from raw inputs to the rounded output (or to a float64 stack, where a step without an emitter comes next
and runs in torch on that stack). Statistics get fused loops too where they are order statistics or Gram
matrices. What is computed never depends on whether kernels are in use.
"""

from __future__ import annotations

from weft.engine.kernels.fused import Kernels

__all__ = ["Kernels"]
