"""What a search makes large or small: numbers that are measured of a candidate on named data.

Every objective names the data that candidates are chosen on (`validation`) and may name others that the
winner alone is measured on (`test`). The two may not be the same, neither by name nor by content.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from torch import nn

from weft.checkpoints.base import Checkpoint
from weft.errors import MissingExtra, UsageError, did_you_mean

Direction = Literal["maximize", "minimize"]
DIRECTIONS = ("maximize", "minimize")


class ObjectiveError(UsageError):
    """An objective that fails by itself: a bug of the function, not of the candidate."""


@dataclass(frozen=True)
class Objective:
    """One number, and which way is better."""

    score: Callable[..., float]
    """`score(candidate)` or `score(candidate, split)`, by whether it has a parameter `split`."""
    direction: Direction = "maximize"
    validation: str = ""
    test: str | None = None
    name: str = ""
    module: Callable[[], nn.Module] | str | None = None
    """Makes the module that `score` is given instead of the checkpoint, with the candidate's weights in it."""

    def __post_init__(self) -> None:
        if self.direction not in DIRECTIONS:
            hint = did_you_mean(str(self.direction), DIRECTIONS)
            raise UsageError(f"direction must be maximize or minimize, not {self.direction!r}{hint}")
        if not self.name:
            object.__setattr__(self, "name", called(self.score))
        if not self.validation:
            raise UsageError(
                f"objective {self.name}: name the data that candidates are chosen on (validation), so that "
                "nobody takes the winner's score there for its quality"
            )
        if self.test is not None:
            self._check_splits(self.test)

    def _check_splits(self, test: str) -> None:
        if test == self.validation or _same_content(self.validation, test):
            raise UsageError(
                f"objective {self.name}: test ({test}) is the data that candidates are chosen on "
                f"({self.validation}): the winner would be reported on what it was picked by; split the data"
            )
        if not self.takes_split:
            raise UsageError(
                f"objective {self.name} has no parameter `split`, so it would measure the same on {test} as on "
                f"{self.validation}; write it as score(candidate, split), or leave test out"
            )

    @property
    def function(self) -> Callable[..., float]:
        """What is called: the score, wherever it was named."""
        return imported(self.score) if isinstance(self.score, str) else self.score

    @property
    def takes_split(self) -> bool:
        return "split" in inspect.signature(self.function).parameters

    def measure(self, candidate: Checkpoint, split: str) -> float:
        """The candidate's number on one split."""
        what: Any = candidate if self.module is None else _filled(self, candidate)
        value = self.function(what, split) if self.takes_split else self.function(what)
        try:
            return float(value)
        except (TypeError, ValueError):
            raise ObjectiveError(
                f"objective {self.name} gave {type(value).__name__} {str(value)[:60]!r}, which is no number"
            ) from None

    def describe(self) -> dict[str, Any]:
        """What a stored search is compared by: a changed file is other data."""
        return {"name": self.name, "direction": self.direction, "validation": self.validation,
                "content": _digest(self.validation)}  # fmt: skip


_MODULES = threading.local()


def _filled(objective: Objective, candidate: Checkpoint) -> nn.Module:
    """This thread's module with the candidate's weights copied into it."""
    from weft.api import materialize

    made: dict[Any, nn.Module] = _MODULES.__dict__.setdefault("made", {})
    make = objective.module
    if make not in made:
        module = imported(make)() if isinstance(make, str) else make() if make is not None else None
        if not isinstance(module, nn.Module):
            raise ObjectiveError(f"objective {objective.name}: {make} gave no torch module")
        made[make] = module.eval()
    return materialize(candidate, made[make])


@lru_cache
def imported(text: str) -> Callable[..., Any]:
    """`package.module:function` → the function; modules of the current folder are found as well."""
    place, colon, name = text.partition(":")
    if not colon or not place or not name:
        raise UsageError(f"{text!r} is no function: write it as package.module:function")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = importlib.import_module(place)
    except ImportError as error:
        raise UsageError(f"{text}: module {place} cannot be imported ({error})") from None
    finally:
        if here in sys.path:
            sys.path.remove(here)
    found = getattr(module, name, None)
    if not callable(found):
        hint = did_you_mean(name, [n for n in vars(module) if callable(getattr(module, n))])
        raise UsageError(f"{text}: {place} has no function {name!r}{hint}")
    return found  # type: ignore[no-any-return]


def called(score: Callable[..., float] | str) -> str:
    """A short name of a function, for tables."""
    if isinstance(score, str):
        return score.rpartition(":")[2]
    return str(getattr(score, "name", None) or getattr(score, "__name__", None) or type(score).__name__)


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _same_content(a: str, b: str) -> bool:
    return _is_file(a) and _is_file(b) and (Path(a).samefile(b) or _digest(a) == _digest(b))


def _digest(text: str) -> str | None:
    if not _is_file(text):
        return None
    with open(text, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# -- objectives that weft brings ---------------------------------------------------------------------


@dataclass(frozen=True)
class Perplexity:
    """The perplexity of a text file under the candidate, a language model with a config of transformers."""

    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    name: str = "perplexity"

    def __call__(self, candidate: Checkpoint, split: str) -> float:
        from weft.llm.perplexity import perplexity

        return float(perplexity(candidate, Path(split), **self.options))


@dataclass(frozen=True)
class LmEval:
    """A metric of a task of lm-evaluation-harness; the split is the task's name."""

    metric: str = "acc,none"
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.metric.partition(",")[0]

    def __call__(self, candidate: Checkpoint, split: str) -> float:
        try:
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
        except ImportError:
            raise MissingExtra("lm-eval", "eval", "an objective of lm-evaluation-harness") from None
        from weft.llm.hf import to_transformers, tokenizer_of

        model = HFLM(pretrained=to_transformers(candidate), tokenizer=tokenizer_of(candidate))
        found = simple_evaluate(model=model, tasks=[split], **self.options)["results"][split]
        key = self.metric if self.metric in found else f"{self.metric},none"
        if key not in found:
            numbers = [k for k, v in found.items() if isinstance(v, int | float)]
            raise ObjectiveError(
                f"task {split} has no metric {self.metric}{did_you_mean(self.metric, numbers)}; it has "
                f"{', '.join(numbers)}"
            )
        return float(found[key])
