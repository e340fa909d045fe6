"""The two ways a mixture's experts are stored, and one shown as the other.

Files have one tensor a projection and expert (`experts.3.gate_proj.weight` [ffn, hidden]); transformers 5 has in
memory, and may store, all experts' in one (`experts.gate_up_proj` [experts, 2·ffn, hidden], gate above up, and
`experts.down_proj` [experts, hidden, ffn]). The numbers are the same in another order, so that either is a
view of the other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from weft.checkpoints.assembled import Assembled, Span, Whole, joined
from weft.checkpoints.base import Checkpoint
from weft.errors import DataProblems
from weft.llm.layout import Experts, layout

_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
"""What an expert's projections are called; nothing else tells gate from up."""
FUSED = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
Role = dict[tuple[int, str], Whole]
"""(expert, role) → its matrix, [out, in]."""


def experts_like(model: Checkpoint, like: Checkpoint) -> Checkpoint:
    """`model` with its experts stored as those of `like` are, names included; itself where they are already.

    Raises DataProblems where a block has experts in one only, another number of them, or in a layout that is
    neither of the two (transposed, interleaved).
    """
    pairs = _pairs(layout(model).experts, layout(like).experts)
    if pairs is None or all(a == b for a, b in pairs):
        return model
    counts = dict.fromkeys((a.count, b.count) for a, b in pairs if a.count != b.count)
    problems = [
        f"{model.origin} has {mine} experts in a block, {like.origin} {theirs}: reduce the larger one first (weft "
        f"moe reduce)"
        for mine, theirs in counts
    ]
    if problems:
        raise DataProblems("the mixtures do not have as many experts", problems)
    pieces: dict[str, Span | Whole] = {name: Span(model, name) for name in model}
    for a, b in pairs:
        matrices = _matrices(model, a)
        if matrices is None:
            raise DataProblems(
                f"{model.origin} cannot be shown with experts as {like.origin} has them",
                [f"{a.prefix}: its tensors are {', '.join(a.parts)}; weft knows gate, up and down projections, one "
                 f"an expert or fused as [experts, 2·ffn, hidden]"],
            )  # fmt: skip
        for part in a.parts:
            for name in _stored(a, part):
                del pieces[name]
        pieces |= _written(b, matrices, like)
    modules = {a.prefix.removesuffix("experts"): b.prefix.removesuffix("experts") for a, b in pairs}
    renamed = {_moved(name, modules): piece for name, piece in pieces.items()}
    return Assembled(
        renamed, config=model.config, assets=model.assets, aliases=model.aliases, origin=model.origin
    )


def _pairs(
    mine: Mapping[str, Experts], theirs: Mapping[str, Experts]
) -> list[tuple[Experts, Experts]] | None:
    """Experts of the same block; None unless both models have them in the same blocks."""

    def by_block(found: Mapping[str, Experts]) -> dict[str, Experts]:
        return {m[0] if (m := re.match(r".*?\d+\.", p)) else p: e for p, e in found.items()}

    a, b = by_block(mine), by_block(theirs)
    return [(e, b[block]) for block, e in a.items()] if a and a.keys() == b.keys() else None


def _moved(name: str, modules: Mapping[str, str]) -> str:
    """The router goes with the module: `block_sparse_moe.gate` → `mlp.gate`."""
    old = next((m for m in modules if name.startswith(m)), None)
    return name if old is None else modules[old] + name[len(old) :]


def _stored(experts: Experts, part: str) -> list[str]:
    if experts.fused:
        return [f"{experts.prefix}.{part}"]
    return [f"{experts.prefix}.{e}.{part}" for e in range(experts.count)]


def _matrices(model: Checkpoint, experts: Experts) -> Role | None:
    """Every expert's gate, up and down as spans of what is stored; None for a layout of another kind."""
    parts = {p.removesuffix(".weight"): p for p in experts.parts}
    found: Role = {}
    if not experts.fused:
        if len(parts) != 3 or {_ROLES.get(p) for p in parts} != {"gate", "up", "down"}:
            return None
        for bare, part in parts.items():
            for e, name in enumerate(_stored(experts, part)):
                found[e, _ROLES[bare]] = Whole((Span(model, name),))
        return found
    if parts.keys() != FUSED.keys():
        return None
    for bare, roles in FUSED.items():
        (name,) = _stored(experts, parts[bare])
        shape = model.info(name).shape
        if len(shape) != 3 or shape[1] % len(roles):
            return None
        out, width = shape[1] // len(roles), shape[2]
        for e in range(experts.count):
            for i, role in enumerate(roles):
                start = (e * len(roles) + i) * out * width
                found[e, role] = Whole((Span(model, name, start, start + out * width),), (out, width))
    return found if _shape(found[0, "gate"]) == _shape(found[0, "down"])[::-1] else None


def _shape(whole: Whole) -> tuple[int, ...]:
    return whole.shape or whole.spans[0].source.info(whole.spans[0].name).shape


def _written(experts: Experts, matrices: Role, like: Checkpoint) -> dict[str, Whole]:
    """The matrices under the names, and in the shapes, of another model's block; but the module's name stays."""
    made: dict[str, Whole] = {}
    for part in experts.parts:
        bare = part.removesuffix(".weight")
        if not experts.fused:
            for e, name in enumerate(_stored(experts, part)):
                made[name] = matrices[e, _ROLES[bare]]
            continue
        roles = FUSED[bare]
        spans = [s for e in range(experts.count) for role in roles for s in matrices[e, role].spans]
        out, width = _shape(matrices[0, roles[0]])
        made[f"{experts.prefix}.{part}"] = joined(spans, (experts.count, len(roles) * out, width))
    _check(made, like)
    return made


def _check(made: Mapping[str, Whole], like: Checkpoint) -> None:
    problems = [
        f"{name}: shape {list(_shape(whole))}, and {list(like.info(name).shape)} in {like.origin}"
        for name, whole in made.items()
        if _shape(whole) != like.info(name).shape
    ]
    if problems:
        raise DataProblems("the experts of these models are not of one shape", problems)
