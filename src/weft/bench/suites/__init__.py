"""The suites by name. Each is a function (seed, data folder, say) → a `Suite`, or several of growing size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from weft.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from weft.bench.suite import Suite

Say = Callable[[str], None]
Named = Callable[[int, "str | Path | None", Say], "Suite | Sequence[Suite]"]

SUITES = {
    "digits": ("digits:digits", "five views of scikit-learn's digits, the demo's experts; no data folder"),
    "vision8": ("vision:vision8", "eight image sets, a small vision transformer"),
    "visionN": ("vision:vision_n", "the same with 2, 3 … all tasks"),
    "resnet": ("resnet:resnet", "four of the image sets, a ResNet with BatchNorm"),
    "text": ("text:text", "five classifications of short texts, a small encoder"),
    "lm": ("lm:lm", "five corpora, a byte-level GPT; perplexity"),
    "lora": ("lm:lora", "the same corpora, adapters of rank 8 on one base"),
    "two-init": ("two_init:two_init", "two networks from different starts; no base, no data folder"),
}
"""Name → where it is made, and what it is."""


def suite_named(name: str) -> Named:
    """A suite of SUITES, or one of a user's own, given as PKG:FUNCTION of the seed."""
    if name in SUITES:
        module, _, function = SUITES[name][0].partition(":")
        found: Named = getattr(import_module(f"weft.bench.suites.{module}"), function)
        return found
    if ":" in name:
        from weft.search.objective import imported

        own = imported(name)
        return lambda seed, data, say: own(seed)
    raise UsageError(
        f"there is no suite {name!r}{did_you_mean(name, SUITES)}; known: {', '.join(SUITES)}, or PKG:FUNCTION"
    )
