"""The catalogue: every named system of the survey, one entry each, with what runs it and the test that does.

Rows keep the ids and names of the project's list: M for methods and theory (sections 2.1 and 2.2), S for
applications (2.3 and 2.4). A row `works` when it names a function that builds it and an acceptance test that
runs it on real inputs and asserts its effect; every other row is `planned`. Nothing heavy is imported here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

Kind = Literal["merge", "training", "inference", "search", "alignment", "analysis", "platform", "study"]
Status = Literal["works", "planned"]

FAMILIES = (
    "platforms", "linearised", "architectures", "alignment", "basic", "weighted", "subspace", "routing",
    "theory", "llm", "multimodal", "image", "continual", "multitask", "ood", "federated", "fewshot",
    "adversarial",
)  # fmt: skip
"""The modules of this package that declare `SYSTEMS`, in the order of the survey's sections."""


@dataclass(frozen=True)
class System:
    """One named system of the field."""

    id: str
    name: str
    section: str
    """Section of the survey."""
    kind: Kind
    """What it is in the first place; many are a training procedure and a merge."""
    paper: str
    summary: str
    """What it is, in one line."""
    aliases: tuple[str, ...] = ()
    entry: str | None = None
    """`module:function` that runs it."""
    test: str | None = None
    """pytest node id of its acceptance test."""

    @property
    def status(self) -> Status:
        return "works" if self.entry and self.test else "planned"

    def load(self) -> Any:
        """The function that runs it. LookupError for a planned system."""
        if self.entry is None:
            raise LookupError(f"{self.id} {self.name} is planned: nothing runs it yet")
        module, _, name = self.entry.partition(":")
        return getattr(import_module(module), name)

    def to_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return {
            "id": self.id, "name": self.name, "aliases": list(self.aliases), "section": self.section,
            "kind": self.kind, "paper": self.paper, "summary": self.summary, "status": self.status,
            "entry": self.entry, "test": self.test,
        }  # fmt: skip


def catalogue() -> list[System]:
    """Every system, in the order of the survey's sections and of the ids within a family."""
    return [s for family in FAMILIES for s in import_module(f"{__name__}.{family}").SYSTEMS]


__all__ = ["System", "catalogue"]
