"""Before merging: networks of different shape, depth, origin or vocabulary made alike.

wide = widened(network, {"layer.*": 512}, example_inputs=x)     computes what it did (net2net)
deep = deepened(network, 3, example_inputs=x)
short = shortened(network, [3], batches)                          fewer layers, nearly the same
cla_fusion(shallow, deep, batches).merged()                      other depth and width, fused
fusellm((model, tokenizer), sources, texts, steps=500)           taught by models of any kind
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_WHERE = {
    "CrossLayer": "heterogeneous", "Fused": "fuse", "FusedChat": "fuse", "Reshaped": "reshaped",
    "cla_fusion": "heterogeneous", "deepened": "deepen", "fuse": "fuse", "fusechat": "fuse", "fusellm": "fuse",
    "shortened": "shorten", "widened": "widen",
}  # fmt: skip

__all__ = [
    "CrossLayer", "FusedChat", "Reshaped", "cla_fusion", "deepened", "fusechat", "fusellm", "shortened", "widened",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"weft.transform.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'weft.transform' has no attribute {name!r}")
