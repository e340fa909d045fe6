"""Which weights are stored [in, out] rather than [out, in]: told by the architecture's name, without its code.

transformers' Conv1D keeps its weights that way (GPT-2 and a few of its age), and some mixtures of experts their
stacks. Methods that take a weight's rows for what one output reads must know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
"""Model types of transformers whose linear layers are Conv1D."""
_CONV1D = re.compile(r"(^|\.)(c_attn|c_proj|c_fc|q_attn)\.weight$")


def inputs_first(name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None) -> bool:
    """Whether a tensor of a model with this config is stored [in, out], or [experts, in, out]."""
    if len(shape) == 2:
        return (config or {}).get("model_type") in CONV1D_MODELS and _CONV1D.search(name) is not None
    return experts_inputs_first(name, shape, config) is True


def experts_inputs_first(name: str, shape: tuple[int, ...], config: Mapping[str, Any] | None) -> bool | None:
    """Whether a stack of experts is [experts, in, out]: the side of the hidden size tells; None if it cannot."""
    if len(shape) != 3 or "expert" not in name:
        return None
    text = (config or {}).get("text_config", config) or {}
    hidden = text.get("hidden_size") if isinstance(text, Mapping) else None
    inputs = 1 if "down" in name else 0  # which of the two sides has the hidden size if they are [in, out]
    sides = shape[1:]
    if sides[0] == sides[1] or hidden not in sides:
        return None
    return bool(sides[inputs] == hidden)
