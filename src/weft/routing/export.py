"""A routed language model as a mixture of experts of transformers, where one computes the same.

A mixture weighs experts' outputs, a routed model their weights. The two agree exactly where a token has one expert
of weight one: parts that are the gated MLPs of a dense model, a gate at each that looks at every token
(`scope="layer"`, `per="token"`), `top=1`, and scores that one matrix without a bias puts in the same order
(prototypes, since ‖x‖ is the same for all tasks; routers with `bias=False` and no hidden layer). Nothing else
of routing/ fits a class there is: weights by sequence, several experts at once, gates by energy, entropy or
preference. Thin and masked residuals become full matrices in a mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weft.checkpoints.assembled import Assembled, Span
from weft.checkpoints.base import Checkpoint
from weft.errors import Problems, UsageError
from weft.routing.gates import Prototypes, Router
from weft.routing.routed import Routed


def mixture(routed: Routed, *, architecture: str | None = None, layout: str = "split") -> Checkpoint:
    """The mixture of experts that computes what `routed` computes; `weft.save` it like any model.

    `architecture` and `layout` are those of `weft moe`. Raises Problems with all that keeps it from fitting.
    """
    from weft.llm.moe.build import Known, build_moe

    if routed.config is None:
        raise UsageError(f"a {routed.kind} is no model of transformers, so there is no mixture of its kind")
    problems, rows = _problems(routed), {}
    for part in routed.parts:
        found = None if part.gate is None else _rows(part.gate)
        if found is None:
            problems.append(f"the gate of {part.block.name} is no matrix without a bias")
        else:
            rows[part.block.name] = found
    if problems:
        raise Problems("this routed model fits no mixture of experts", dict.fromkeys(problems))
    count = len(routed.tasks)
    eye = torch.eye(count)
    known: dict[str, Checkpoint] = {f"expert{t}": routed.checkpoint(weights=eye[t]) for t in range(count)}
    known["shared"] = routed.checkpoint(weights=torch.zeros(count))
    recipe: dict[str, Any] = {
        "base_model": "shared", "experts": [{"source_model": f"expert{t}"} for t in range(count)],
        "experts_per_token": 1, "gate_mode": "random", "layout": layout,
    }  # fmt: skip
    if architecture is not None:
        recipe["architecture"] = architecture
    made = build_moe(recipe, loader=lambda ref: known[str(ref)])
    if not made.family.normalises:
        raise UsageError(
            f"a {made.family.name} does not give its one expert a weight of one: choose another architecture"
        )
    whole = made.checkpoint
    routers = Known(_named(rows, whole, count), origin="gates")
    return Assembled(
        {n: Span(routers if n in routers else whole, n) for n in whole}, config=whole.config, assets=whole.assets,
        aliases=whole.aliases, origin=whole.origin,
    )  # fmt: skip


def _problems(routed: Routed) -> list[str]:
    """What of the settings a mixture cannot do."""
    gating, found = routed.gating, []
    if gating.scope != "layer" or gating.per != "token":
        found.append("its weights are not chosen for each token at each layer (scope='layer', per='token')")
    if gating.top != 1 or not gating.softmax or gating.scale != 1 or gating.unsure is not None:
        found.append("a token does not have just one expert of weight one (top=1)")
    if routed.combining.method is not None:
        found.append("experts are merged by a method, not chosen")
    found += [
        f"the routed part {b.name or 'all'} is no MLP of a layer"
        for b in routed.blocks
        if not b.name.endswith(".mlp")
    ]
    return found


def _rows(gate: object) -> Tensor | None:
    """The router's rows [T, d] with the same order of scores; None where there are none."""
    if isinstance(gate, Prototypes):
        return gate.get_buffer("centres").detach().clone()
    if not isinstance(gate, Router) or gate.normed or len(gate.layers) != 1:
        return None
    last = gate.layers[0]
    assert isinstance(last, torch.nn.Linear)
    if last.bias is not None or bool(gate.get_buffer("shift").any()):
        return None
    return (last.weight / gate.get_buffer("size")).detach().clone()


def _named(rows: Mapping[str, Tensor], whole: Checkpoint, count: int) -> dict[str, Tensor]:
    """Rows under the names that the mixture's routers have."""
    found: dict[str, Tensor] = {}
    for block, values in rows.items():
        layer = block.removesuffix("mlp")
        names = [
            n for n, i in whole.tensors.items()
            if n.startswith(layer) and n.endswith(".gate.weight") and i.shape == (count, values.shape[1])
        ]  # fmt: skip
        if len(names) != 1:
            raise UsageError(
                f"the mixture has {len(names)} routers in {layer}: its architecture is not understood"
            )
        found[names[0]] = values.to(whole.info(names[0]).dtype)
    return found
