"""The kinds of statistics that steps may ask for, and how they ask. See measured.py for what they get."""

from __future__ import annotations

from dataclasses import dataclass

ABOUT = "weft_statistics"
"""The key of the config under which a checkpoint of statistics says what it is."""
ELEMENTWISE = {"fisher", "sensitivity", "gradient"}
"""Kinds with one number a weight."""
NONNEGATIVE = {"fisher", "sensitivity", "gram", "kfac_a", "kfac_g", "abs_mean", "out_var", "node"}
"""Kinds that no measurement makes negative (matrices: their diagonal)."""
BASE, NORM, SAMPLES = "base_", "_norm", "_samples"


@dataclass(frozen=True)
class Need:
    """One statistic a step asks for."""

    keyword: str
    kind: str
    of_base: bool = False
    norm: bool = False
    samples: bool = False
    optional: bool = False

    @classmethod
    def parse(cls, text: str) -> Need:
        """`"gram"`, `"base_fisher?"`, `"fisher_norm"`, `"fisher_samples"` → Need."""
        keyword = text.removesuffix("?")
        kind = keyword.removeprefix(BASE).removesuffix(NORM).removesuffix(SAMPLES)
        return cls(
            keyword, kind, keyword.startswith(BASE), keyword.endswith(NORM), keyword.endswith(SAMPLES),
            text.endswith("?"),
        )  # fmt: skip

    @property
    def tensorwise(self) -> bool:
        """Whether it is something of one tensor, not a number of the whole model."""
        return not self.norm and not self.samples

    @property
    def source(self) -> str:
        """Under which name a direct call gives it: the keyword, but a norm's without "_norm"."""
        return self.keyword.removesuffix(NORM)

    @property
    def elementwise(self) -> bool:
        return self.kind in ELEMENTWISE and self.tensorwise
