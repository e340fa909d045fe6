"""Data flow as something to search: which layers of which models a token passes, in what order, and how loud.

Evolutionary merging in data flow space (Akiba et al., arXiv:2403.13187): all layers of all models are listed,
the list repeated r times, T = r Σ L_m slots; an indicator says which slots are passed, and the activation is
scaled by s_t as it enters slot t. (The paper's scale is a matrix W_ij over pairs of layers; along one path only
the pairs of neighbours on it matter, and those are the s_t.)

The scales go into the weights. A residual network that normalises what a block reads computes
h ← s_t h, then h ← h + f_t(h/‖h‖). With C_t = Π_{u≤t} s_u, h/C obeys h ← h + f_t/C_t and is normalised to the
same, so dividing by C_t what block t writes gives the same output, but for the norm's epsilon.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.errors import UsageError
from weft.llm.slices import Layers, layers, stacked
from weft.methods.layers import block_of
from weft.methods.merge import Merge
from weft.methods.registry import METHODS
from weft.methods.step import At

WRITERS = re.compile(
    r"(?:o_proj|out_proj|c_proj|down_proj|wo|w2|dense_4h_to_h|attention\.dense|fc2|down)\.(?:weight|bias)"
)
"""The end of the name of a tensor whose product a block adds to the residual stream."""
_NORMS_BEHIND = "post_feedforward_layernorm"


def slots(models: Sequence[Any], repeats: int = 1) -> Layers:
    """All layers of all models, one model after the other, `repeats` times."""
    if repeats < 1:
        raise UsageError("repeats must be 1 or more")
    listed = layers(models[0])
    for model in models[1:]:
        listed = listed + layers(model)
    return listed * repeats


def flow(
    listed: Layers,
    use: Sequence[float],
    scale: Sequence[float] | None = None,
    writers: re.Pattern[str] = WRITERS,
) -> Checkpoint:
    """The model that passes the slots with use_t > 0 in their order; scale: one number a slot.

    What lies before and after the blocks is the first and the last passed layer's model's. Raises UsageError
    where no slot is passed, a scale is not positive, or scales cannot be folded: blocks that normalise what
    they write, or whose writing tensors are unknown (give `writers`).
    """
    if len(use) != len(listed) or (scale is not None and len(scale) != len(listed)):
        raise UsageError(f"there are {len(listed)} slots, but {len(use)} indicators")
    passed = [t for t, u in enumerate(use) if u > 0]
    if not passed:
        raise UsageError("no layer is passed")
    made = stacked(listed[passed])
    if scale is None:
        return made
    own = [float(scale[t]) for t in passed]
    if min(own) <= 0:
        raise UsageError("scales must be positive")
    _check_foldable(made, len(own), writers)
    return Merge(
        [made], method=METHODS["linear"], params=_Written(list(accumulate(own, mul)), writers.pattern),
        origin=made.origin,
    )  # fmt: skip


def _check_foldable(model: Checkpoint, count: int, writers: re.Pattern[str]) -> None:
    behind = next((n for n in model if _NORMS_BEHIND in n), None)
    if behind is not None:
        raise UsageError(f"{model.origin} normalises what its blocks write ({behind}): search without scales")
    blocks = [b[1] for n in model if (b := block_of(n)) is not None and writers.search(n)]
    silent = sorted(set(range(count)) - set(blocks))
    if silent:
        raise UsageError(
            f"{model.origin}: which tensors of block {silent[0]} write to the residual stream is not known; name "
            "them (writers)"
        )


class _Written:
    """Parameters of a sum of one model: 1/C_t for what block t writes, 1 elsewhere. A class, so that it pickles."""

    def __init__(self, loud: Sequence[float], writers: str) -> None:
        self.loud, self.writers = loud, writers

    def __call__(self, at: At) -> Mapping[str, Any]:
        written = at.layer is not None and re.search(rf"{self.writers}$", at.name)
        return {"weight": 1.0 / self.loud[at.layer or 0] if written else 1.0, "normalize": False}
