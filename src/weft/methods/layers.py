"""Which block a tensor belongs to, read off its name.

Block indices are the integers between dots: `model.layers.17.mlp.up_proj.weight` is in block 17. Only the
first counts (a mixture's `layers.3.experts.7.w1` is in block 3). A model may have several stacks
(encoder and decoder); depth is counted in each by itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)*)(?P<index>\d+)\.")


def block_of(name: str) -> tuple[str, int] | None:
    """(stack prefix, block index), or None for a tensor outside the blocks (embeddings, head, final norm)."""
    found = _BLOCK.match(name)
    return (found["stack"], int(found["index"])) if found else None


def count_layers(names: Iterable[str]) -> dict[str, int]:
    """Stack prefix → number of blocks (the greatest index plus one)."""
    layers: dict[str, int] = {}
    for name in names:
        if block := block_of(name):
            stack, index = block
            layers[stack] = max(layers.get(stack, 0), index + 1)
    return layers
