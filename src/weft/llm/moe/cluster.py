"""Which experts are alike enough to become one.

By what they do, not by their weights (permuted neurons do the same): E_e(x) is computed on the inputs x that
the layer sees (as HC-SMoE's mean outputs, arXiv 2410.08589, but token by token), or, without data, on random
inputs of the norm's scale. Experts are then joined greedily by Ward's rule with usage u as weight: the pair
that adds least to

    Σ_e u_e Σ_x ‖E_e(x) − mean of e's cluster‖²,     namely  u_a u_b / (u_a + u_b) · ‖μ_a − μ_b‖².
"""

from __future__ import annotations

import torch
from torch import Tensor

from weft.checkpoints.base import Checkpoint
from weft.llm.moe.blocks import Block, view
from weft.llm.moe.noise import normal
from weft.llm.moe.routing import Routing, mlp
from weft.methods.step import At

TOKENS = 256
"""Inputs that experts are compared on."""


def outputs(block: Block, x: Tensor, routing: Routing) -> Tensor:
    """E_e(x) `[experts, tokens, hidden]` in float32, one expert in memory at a time."""
    return torch.stack(
        [mlp(x.double(), **weights(block, e), act=routing.act).float() for e in range(block.count)]
    )


def weights(block: Block, expert: int) -> dict[str, Tensor]:
    """gate, up and down of one expert, float64."""
    shapes = block.roles() or {}
    read = view({role: block.role(role, expert) for role in shapes})
    read.survey()
    found = {}
    for role, shape in shapes.items():
        read.ready(role)
        found[role] = read.read(role).double().reshape(shape)
        read.release(role)
    return found


def probes(block: Block, hidden: int, seed: int = 0) -> Tensor:
    """Random inputs `[tokens, hidden]`, scaled as the norm before the mixture scales its output."""
    drawn = normal(At("moe/probes", (TOKENS, hidden), seed=seed), 0, TOKENS * hidden).reshape(TOKENS, hidden)
    name = f"{block.prefix.rpartition('.')[0]}.post_attention_layernorm.weight"
    model: Checkpoint = block.model
    if name not in model or model.info(name).shape != (hidden,):
        return drawn
    model.ready(name)
    return drawn * model.tensor(name).double()


def evenly(x: Tensor, most: int = TOKENS) -> Tensor:
    """At most `most` rows of x, evenly spread."""
    if len(x) <= most:
        return x
    return x[torch.linspace(0, len(x) - 1, most).round().long()]


def ward(features: Tensor, usage: Tensor, n: int) -> list[list[int]]:
    """Indices of `features` `[E, …]` in n clusters; each sorted, and the clusters by their first member."""
    flat = features.flatten(1).double()
    gram = flat @ flat.T
    squares = gram.diagonal()
    apart = (squares[:, None] + squares[None, :] - 2 * gram).clamp(min=0)
    # experts never used weigh next to nothing, but still join the nearest
    mass = usage.double() + 1e-6 * usage.double().mean().clamp(min=1e-30)
    members: list[list[int]] = [[e] for e in range(len(flat))]
    while len(members) > n:
        cost = mass[:, None] * mass[None, :] / (mass[:, None] + mass[None, :]) * apart
        cost.fill_diagonal_(torch.inf)
        a, b = sorted(divmod(int(cost.argmin()), len(members)))
        p = mass[a] / (mass[a] + mass[b])
        joined = p * apart[a] + (1 - p) * apart[b] - p * (1 - p) * apart[a, b]
        apart[a], apart[:, a] = joined, joined
        apart[a, a] = 0
        mass[a] += mass[b]
        members[a] += members[b]
        keep = [i for i in range(len(members)) if i != b]
        apart, mass = apart[keep][:, keep], mass[keep]
        members = [members[i] for i in keep]
    return sorted(sorted(m) for m in members)
