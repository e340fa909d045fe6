"""A way to learn by its name, with settings that are checked: what `weft learn` calls."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

from torch import nn

from weft.api import Model
from weft.errors import Problems, UsageError, did_you_mean
from weft.learn.loop import Learned, learn
from weft.learn.mergeable import Mergeable
from weft.learn.parts import Blocks

METHODS: Mapping[str, str] = {
    "adamerging": "adaptive", "adarank": "ranks", "atlas": "adaptive", "concrete": "masks", "dam": "adaptive",
    "expert_merging": "adaptive", "learned_soup": "soups", "mehl_soup": "soups", "prodistill": "distill",
    "symerge": "adaptive", "twa": "soups",
}  # fmt: skip
"""Published method → the file of this package that holds it."""
_GIVEN = {"module", "base", "models", "data", "merged", "way", "output", "how"}


def learn_by_name(
    how: str, module: nn.Module, base: Model | None, models: Sequence[Model], data: Any,
    settings: Mapping[str, Any],
) -> Learned:  # fmt: skip
    """`learn` of a `Mergeable`, or one of `METHODS`; `settings` go to whichever takes them.

    `parts` may be written "blocks:8". Problems where a setting is unknown; UsageError where the base is missing or
    idle.
    """
    if how != "learn" and how not in METHODS:
        known = ["learn", *METHODS]
        raise UsageError(
            f"there is no way to learn {how!r}{did_you_mean(how, known)}; known: {', '.join(known)}"
        )
    method: Callable[..., Any] = (
        learn if how == "learn" else getattr(import_module(f"weft.learn.{METHODS[how]}"), how)
    )
    of_method = set(inspect.signature(method).parameters) - _GIVEN
    of_merge = set(inspect.signature(Mergeable).parameters) - _GIVEN
    unknown = [s for s in settings if s not in of_method | of_merge]
    if unknown:
        known = sorted(of_method | of_merge)
        raise Problems(f"{how} has no such settings", [f"{s}{did_you_mean(s, known)}" for s in unknown])
    asked = {s: _parts(v) if s == "parts" else v for s, v in settings.items()}
    if how == "learn":
        merged = Mergeable(module, base, models, **{s: v for s, v in asked.items() if s in of_merge})
        rest = {s: v for s, v in asked.items() if s in of_method}
        loss = rest.pop("loss", None)
        if loss is None or "steps" not in rest:
            raise UsageError("say which loss to lower and in how many steps (loss, steps)")
        return learn(merged, loss, data, **rest)
    lacking = [
        n for n, p in inspect.signature(method).parameters.items()
        if n not in _GIVEN and p.default is p.empty and p.kind is p.KEYWORD_ONLY and n not in asked
    ]  # fmt: skip
    if lacking:
        raise UsageError(f"{how} needs {', '.join(lacking)}")
    takes_base = "base" in inspect.signature(method).parameters
    if takes_base is (base is None):
        raise UsageError(
            f"{how} " + ("works on task vectors and needs a base" if takes_base else "takes no base")
        )
    found: Learned = (
        method(module, base, models, data, **asked) if takes_base else method(module, models, data, **asked)
    )
    return found


def _parts(value: Any) -> Any:
    """`blocks:8` as `Blocks(8)`; anything else as it is."""
    kind, colon, count = value.partition(":") if isinstance(value, str) else ("", "", "")
    if kind != "blocks" or not colon:
        return value
    if not count.isdigit():
        raise UsageError(f"parts is blocks:N, such as blocks:8, not {value!r}")
    return Blocks(int(count))
