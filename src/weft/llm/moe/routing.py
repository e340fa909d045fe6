"""How the known kinds of mixture route and compute: the arithmetic that measuring and reducing them needs.

For a token x and router logits z = W x (+ bias), with s = softmax(z) or σ(z):

    chosen  = the k largest of s + correction, within the best groups where there are groups
    g_e     = s_e for the chosen, 0 for the rest; divided by their sum where the class does; times a scale
    y       = Σ_e g_e · E_e(x),      E_e(x) = down_e (act(gate_e x) ⊙ up_e x)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.errors import UsageError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "swish": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
}
_SOFTMAX = {
    "mixtral": True, "qwen2_moe": False, "qwen3_moe": False, "olmoe": False, "deepseek": False,
    "deepseek_v2": False,
}  # fmt: skip
"""Kinds that choose by softmax → whether the class always divides by the sum of the chosen."""
_SIGMOID = ("deepseek_v3", "glm4_moe", "dots1")


@dataclass(frozen=True)
class Routing:
    """How one kind of mixture chooses and weighs its experts."""

    top_k: int
    sigmoid: bool
    normalise: bool
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    best_in_group: int = 1
    """A group is as good as the sum of this many of its best experts."""
    activation: str = "silu"

    def chosen(self, logits: Tensor, correction: Tensor | None = None) -> Tensor:
        """g `[tokens, experts]`, zero where an expert is not chosen; in the logits' dtype."""
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        worth = scores if correction is None else scores + correction
        if self.groups > 1:
            apart = worth.reshape(*worth.shape[:-1], self.groups, -1)
            group = apart.topk(min(self.best_in_group, apart.shape[-1]), dim=-1).values.sum(-1)
            best = torch.zeros_like(group).scatter(-1, group.topk(self.top_groups, dim=-1).indices, 1.0)
            shut = best[..., None].expand_as(apart).flatten(-2) == 0
            worth = worth.masked_fill(shut, -torch.inf)
        index = worth.topk(min(self.top_k, worth.shape[-1]), dim=-1).indices
        weights = torch.zeros_like(scores).scatter(-1, index, scores.gather(-1, index))
        if self.normalise:
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
        return weights * self.scale

    def act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)


def routing_of(config: Mapping[str, Any] | None) -> Routing:
    """The routing that a config describes; UsageError for a kind of mixture that is not known."""
    config = config or {}
    kind = config.get("model_type")
    k = config.get("num_experts_per_tok")
    activation = config.get("hidden_act") or "silu"
    known = sorted((*_SOFTMAX, *_SIGMOID))
    if kind not in known:
        raise UsageError(f"how a {kind} routes is not known; known are {', '.join(known)}")
    if not isinstance(k, int) or k < 1:
        raise UsageError(f"the config of this {kind} does not tell num_experts_per_tok")
    if activation not in ACTIVATIONS:
        raise UsageError(f"the activation {activation!r} is not known; known are {', '.join(ACTIVATIONS)}")
    scale = float(config.get("routed_scaling_factor") or 1.0)
    groups, top = config.get("n_group") or 1, config.get("topk_group") or 1
    base = Routing(k, False, True, activation=activation)
    if kind in _SIGMOID:
        return replace(base, sigmoid=True, normalise=bool(config.get("norm_topk_prob", True)), scale=scale,
                       groups=groups, top_groups=top, best_in_group=2)  # fmt: skip
    if kind == "deepseek_v2":
        limited = config.get("topk_method") == "group_limited_greedy"
        return replace(base, normalise=False, scale=scale, groups=groups if limited else 1,
                       top_groups=top if limited else 1)  # fmt: skip
    return replace(base, normalise=_SOFTMAX[kind] or bool(config.get("norm_topk_prob", False)))


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """down (act(gate x) ⊙ up x) for rows x `[tokens, H]`."""
    return (act(x @ gate.T) * (x @ up.T)) @ down.T
