"""What a search has found: the trials, the best, the Pareto front, and the winner's recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.checkpoints.base import Checkpoint
from weft.errors import DataError
from weft.search.objective import Objective
from weft.search.space import Settings


@dataclass(frozen=True)
class Trial:
    """One candidate."""

    number: int
    state: str
    """complete, pruned (the merge was refused) or failed."""
    settings: Settings
    scores: Mapping[str, float] = field(default_factory=dict)
    """Objective → number on the validation data."""
    reason: str = ""
    seconds: float = 0.0
    repeats: int | None = None
    """The earlier trial with the same settings, whose scores it has."""

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"number": self.number, "state": self.state, "settings": self.settings}
        told |= {"scores": dict(self.scores), "seconds": self.seconds}
        return told | ({"reason": self.reason} if self.reason else {}) | (
            {} if self.repeats is None else {"repeats": self.repeats}
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A search's outcome. `best` and `recipe` are the winner; `test` was measured for it alone."""

    objectives: tuple[Objective, ...]
    trials: tuple[Trial, ...]
    build: Callable[[Settings], Checkpoint] = field(repr=False)
    write: Callable[[Settings, str], str] | None = field(default=None, repr=False)
    test: Mapping[str, float] | None = None
    """Objective → the winner's number on the test data."""
    tested: int = 0
    """How many winners the test data have been used for, earlier runs of a stored search included."""
    wanted: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> list[Trial]:
        """The candidates that have scores."""
        return [t for t in self.trials if t.state == "complete"]

    @property
    def front(self) -> list[Trial]:
        """The candidates that no other is at least as good as in everything and better in something.

        Of candidates with the same scores the first stands for all.
        """
        scored = [(t, self._losses(t)) for t in self.complete]
        return [
            t for i, (t, own) in enumerate(scored)
            if not any((_dominates(other, own)) or (other == own and j < i)
                       for j, (_, other) in enumerate(scored))
        ]  # fmt: skip

    @property
    def best(self) -> Trial:
        """The best candidate, the earliest of equals; with several objectives the front's balanced member.

        Balanced: nearest to the best of every objective after each is scaled to [0, 1] over the front. Raises
        DataError with the reasons if no candidate has scores.
        """
        front = self.front
        if not front:
            reasons = dict.fromkeys(t.reason for t in self.trials if t.reason)
            raise DataError(
                "no candidate could be scored: " + ("; ".join(list(reasons)[:3]) or "none was tried")
            )
        losses = [self._losses(t) for t in front]
        low, high = [[pick(column) for column in zip(*losses, strict=True)] for pick in (min, max)]

        def far(loss: Sequence[float]) -> float:
            return float(
                sum(((v - a) / (b - a)) ** 2 for v, a, b in zip(loss, low, high, strict=True) if b > a)
            )

        return front[min(range(len(front)), key=lambda i: (far(losses[i]), i))]

    def _losses(self, trial: Trial) -> tuple[float, ...]:
        """Scores turned so that less is better."""
        return tuple(
            (-1.0 if o.direction == "maximize" else 1.0) * trial.scores[o.name] for o in self.objectives
        )

    @property
    def checkpoint(self) -> Checkpoint:
        """The winner, lazy, over inputs that are in memory as far as they fitted."""
        return self.build(self.best.settings)

    @property
    def recipe(self) -> str | None:
        """The winner's recipe as YAML for `weft merge`; None where candidates come from a function."""
        if self.write is None:
            return None
        best = self.best
        scores = ", ".join(f"{o.name} {best.scores[o.name]:.6g} on {o.validation}" for o in self.objectives)
        said = f"found by weft search: trial {best.number} of {len(self.trials)}, {scores}"
        if self.test is not None:
            tests = [f"{o.name} {self.test[o.name]:.6g} on {o.test}" for o in self.objectives
                     if o.name in self.test]  # fmt: skip
            said += f"\nreported apart: {', '.join(tests)}"
        return self.write(best.settings, said.replace("\r", " "))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        best = self.best
        return {
            "objectives": [
                {"name": o.name, "direction": o.direction, "validation": o.validation, "test": o.test}
                for o in self.objectives
            ],
            "best": best.to_json(),
            "test": None if self.test is None else dict(self.test),
            "tested": self.tested,
            "front": [t.number for t in self.front],
            "trials": [t.to_json() for t in self.trials],
            "recipe": self.recipe,
            "memory": dict(self.memory),
        }

    def plot(self, path: str | Path) -> None:
        """Draw the search (.png, .svg, .pdf): scores by trial, or the front of two objectives."""
        from weft.search.picture import draw

        draw(self, Path(path))


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)
