"""What becomes of every tensor of a merge: merged from which models, or carried from where, and why.

Decided from names, shapes and dtypes alone, so that every problem is known before a value is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from weft.checkpoints.base import Checkpoint, TensorInfo
from weft.errors import DataProblems

if TYPE_CHECKING:
    from weft.methods.merge import Merge


@dataclass(frozen=True)
class Part:
    """How one output tensor comes about: merged from `sources` (indices of models), or carried."""

    info: TensorInfo
    sources: tuple[int, ...] = ()
    carried_from: Checkpoint | None = None
    reason: str = ""


def stored_name(source: Checkpoint, name: str) -> str:
    """The name a source keeps the tensor under: its own, or the one it is tied to."""
    return name if name in source else source.aliases.get(name, name)


def _has(source: Checkpoint, name: str) -> bool:
    return name in source or source.aliases.get(name) in source.tensors


def _output_names(inputs: Sequence[Checkpoint]) -> Iterator[str]:
    """Every tensor of every input once: in the first input's order, then what the others add."""
    seen: set[str] = set()
    for source in inputs:
        for name in source:
            if name not in seen:
                seen.add(name)
                yield name


def parts_of(merge: Merge) -> dict[str, Part]:
    """Decide for every output tensor, and list every problem at once."""
    parts: dict[str, Part] = {}
    problems: list[str] = []
    for name in _output_names(merge.inputs):
        holders = [s for s in merge.inputs if _has(s, name)]
        info = holders[0].info(stored_name(holders[0], name))
        lacking = [s for s in merge.inputs if not _has(s, name)]
        if not info.kind.mergeable:
            parts[name] = Part(
                info, carried_from=holders[0], reason=f"torch.{info.kind} is carried, not averaged"
            )
            continue
        if lacking and merge.missing == "error":
            problems.append(f"{name}: not in {', '.join(s.origin for s in lacking)}")
            continue
        shapes = [(s.origin, s.info(stored_name(s, name)).shape) for s in holders]  # origins may be alike
        if len({shape for _, shape in shapes}) > 1:
            if merge.mismatch == "error":
                told = ", ".join(f"{list(shape)} in {origin}" for origin, shape in shapes)
                problems.append(f"{name}: shapes differ: {told}")
            else:
                parts[name] = Part(info, carried_from=holders[0], reason="shapes differ")
            continue
        sources = tuple(i for i, m in enumerate(merge.models) if _has(m, name))
        too_few = len(sources) < merge.method.models[0] or (merge.base is not None and merge.base in lacking)
        if lacking and (merge.missing == "carry" or too_few):
            reason = f"not in {', '.join(s.origin for s in lacking)}"
            parts[name] = Part(info, carried_from=holders[0], reason=reason)
            continue
        parts[name] = Part(info, sources)
    if problems:
        raise DataProblems(
            f"{merge.origin} cannot be merged as it is: align the checkpoints, or choose a policy "
            f"(missing: carry | available, mismatch: carry)",
            problems,
        )
    return parts
