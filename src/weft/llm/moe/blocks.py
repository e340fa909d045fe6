"""The mixtures inside a checkpoint: which tensors are which expert's, and which are the router's.

Read off names and shapes by `llm/layout.py`, so for every architecture, with one tensor an expert or with all
experts fused along the first axis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weft.checkpoints.assembled import Assembled, Span, Whole
from weft.checkpoints.base import Checkpoint
from weft.errors import DataError, UsageError
from weft.llm.layout import Experts, layout
from weft.methods.layers import block_of

_ROUTER = re.compile(r"(gate|router|gating|moe_statics|e_score_correction_bias|expert_bias)\b")
_ROLES = {"gate": ("gate_proj", "w1"), "up": ("up_proj", "w3"), "down": ("down_proj", "w2")}


@dataclass(frozen=True)
class Block:
    """The mixture of one layer."""

    model: Checkpoint
    experts: Experts
    routers: dict[str, int]
    """Tensors with one entry an expert → the axis they are on: router rows, corrections of the choice."""

    @property
    def prefix(self) -> str:
        """`model.layers.3.mlp`."""
        return self.experts.prefix.rpartition(".")[0]

    @property
    def layer(self) -> int | None:
        block = block_of(self.prefix + ".")
        return block[1] if block else None

    @property
    def count(self) -> int:
        return self.experts.count

    @property
    def rows(self) -> str:
        """The router's matrix `[experts, hidden]`."""
        return next(n for n in self.routers if self.router_kind(n) == "rows")

    def router_kind(self, name: str) -> Literal["rows", "bias", "correction"]:
        """What a router tensor is: its rows, the bias of its logits, a correction of the choice only."""
        if "correction" in name or "expert_bias" in name:
            return "correction"
        return "rows" if self.routers[name] == 0 and len(self.model.info(name).shape) == 2 else "bias"

    def names(self, part: str) -> list[str]:
        """The tensors that hold a part of the experts: one an expert, or the fused one."""
        prefix, count = self.experts.prefix, self.count
        return [f"{prefix}.{part}"] if self.experts.fused else [f"{prefix}.{e}.{part}" for e in range(count)]

    def part(self, part: str, expert: int) -> Span:
        """One part of one expert."""
        if not self.experts.fused:
            return Span(self.model, f"{self.experts.prefix}.{expert}.{part}")
        name = f"{self.experts.prefix}.{part}"
        length = self.model.info(name).numel // self.count
        return Span(self.model, name, expert * length, (expert + 1) * length)

    def roles(self) -> dict[str, tuple[int, int]] | None:
        """Shapes of gate `[I, H]`, up `[I, H]` and down `[H, I]`; None where the experts are no such MLPs."""
        if self.experts.fused:
            shapes = {p.removesuffix(".weight"): self.model.info(f"{self.experts.prefix}.{p}").shape
                      for p in self.experts.parts}  # fmt: skip
            if shapes.keys() != {"gate_up_proj", "down_proj"}:
                return None
            (_, both, hidden), (_, out, wide) = shapes["gate_up_proj"], shapes["down_proj"]
            if both != 2 * wide or out != hidden:  # transposed, as some classes have it
                return None
            return {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        if self._split_roles() is None:
            return None
        return {role: self._shape(part) for role, part in (self._split_roles() or {}).items()}

    def _shape(self, part: str) -> tuple[int, int]:
        rows, columns = self.model.info(f"{self.experts.prefix}.0.{part}").shape
        return rows, columns

    def _split_roles(self) -> dict[str, str] | None:
        found = {role: [p for p in self.experts.parts if p.removesuffix(".weight") in names]
                 for role, names in _ROLES.items()}  # fmt: skip
        if len(self.experts.parts) != 3 or any(len(p) != 1 for p in found.values()):
            return None
        return {role: parts[0] for role, parts in found.items()}

    def part_roles(self, part: str) -> tuple[str, ...]:
        """Which of gate, up and down a part holds, one after the other. Only where `roles()` is not None."""
        if self.experts.fused:
            return ("down",) if "down" in part else ("gate", "up")
        return tuple(role for role, name in (self._split_roles() or {}).items() if name == part)

    def role(self, role: str, expert: int) -> Span:
        """gate, up or down of one expert. Only where `roles()` is not None."""
        if not self.experts.fused:
            parts = self._split_roles()
            assert parts is not None
            return self.part(parts[role], expert)
        part = next(p for p in self.experts.parts if ("down" in p) == (role == "down"))
        whole = self.part(part, expert)
        if role == "down":
            return whole
        middle = (whole.start + whole.end) // 2
        if role == "gate":
            return Span(self.model, whole.name, whole.start, middle)
        return Span(self.model, whole.name, middle, whole.end)


def blocks_of(model: Checkpoint) -> list[Block]:
    """The mixtures of a model, in the order of its layers.

    Raises UsageError where it has none, DataError where experts have no router or are not all there.
    """
    found = layout(model).experts
    if not found:
        raise UsageError(f"{model.origin} has no experts: it is no mixture")
    made = []
    for experts in found.values():
        block = Block(model, experts, _routers(model, experts))
        missing = [n for part in experts.parts for n in block.names(part) if n not in model]
        if missing:
            raise DataError(
                f"{model.origin} has no {missing[0]}: the experts of {block.prefix} are not whole"
            )
        if not any(block.router_kind(n) == "rows" for n in block.routers):
            raise DataError(f"{model.origin}: {block.prefix} has {experts.count} experts and no router")
        made.append(block)
    return sorted(made, key=lambda b: (b.layer is None, b.layer or 0, b.prefix))


def _routers(model: Checkpoint, experts: Experts) -> dict[str, int]:
    parent = experts.prefix.rpartition(".")[0] + "."
    found = {}
    for name, info in model.tensors.items():
        inside = name.removeprefix(parent)
        if inside != name and _ROUTER.match(inside) and experts.count in info.shape:
            found[name] = info.shape.index(experts.count)
    return found


def rearranged(block: Block, order: Sequence[int]) -> dict[str, Whole]:
    """The block's tensors with expert `order[i]` in place i: experts, router rows and corrections alike.

    A permutation of all experts leaves what the block computes unchanged; a shorter `order` drops experts.
    """
    made: dict[str, Whole] = {}
    for part in block.experts.parts:
        spans = [block.part(part, e) for e in order]
        if block.experts.fused:
            shape = (len(order), *block.model.info(spans[0].name).shape[1:])
            made[f"{block.experts.prefix}.{part}"] = Whole(tuple(spans), shape)
        else:
            made |= {f"{block.experts.prefix}.{i}.{part}": Whole((s,)) for i, s in enumerate(spans)}
    for name, axis in block.routers.items():
        shape = block.model.info(name).shape
        outer = 1
        for size in shape[:axis]:
            outer *= size
        inner = block.model.info(name).numel // (outer * block.count)
        starts = [(o * block.count + e) * inner for o in range(outer) for e in order]
        chosen = tuple(Span(block.model, name, s, s + inner) for s in starts)
        made[name] = Whole(chosen, (*shape[:axis], len(order), *shape[axis + 1 :]))
    return made


def view(spans: dict[str, Span]) -> Assembled:
    """Spans as tensors of their own, which can be read in any range."""
    return Assembled(dict(_flat(spans)), origin="experts")


def _flat(spans: dict[str, Span]) -> list[tuple[str, Whole]]:
    return [(name, Whole((span,), (len(span),))) for name, span in spans.items()]
