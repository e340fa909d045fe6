"""Merge-friendly fine-tuning: plain, in part, low-rank or in the tangent space, with hooks on the trajectory.

    made = weft.finetune(module, (images, labels), mode="tangent", epochs=5, lr=1e-3)
    weft.save(made.checkpoint, "out")              # an ordinary checkpoint of θ
    again = load_linearised("out", module)         # the model that θ was trained for

`Training` is the loop, one step at a time; `objectives` are losses and regularisers that add up;
`callbacks` bring hooks and regularisers into the trainers of others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "Charted": "model", "Direct": "chart", "Finetuned": "loop", "Linearised": "model", "LowRank": "lowrank",
    "Shared": "chart", "Trace": "trace", "Training": "loop", "Valley": "valley", "chosen": "select",
    "finetune": "loop", "load_linearised": "stored",
}  # fmt: skip

__all__ = [
    "Charted", "Direct", "Finetuned", "Linearised", "LowRank", "Shared", "Trace", "Training", "Valley", "chosen",
    "finetune", "load_linearised",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.train.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.train' has no attribute {name!r}")
