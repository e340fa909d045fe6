"""From a body of scalar lines to the source of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from weft.engine.kernels.emit import Body

BLOCK = 1024
"""Values that a kernel takes at a time, so that they stay in the first-level cache."""
SPAN = 8192
"""Counts of a row's counting sort: 32 octaves of magnitudes, 256 each."""

_HEAD = """\
import numpy as np
from weft.engine.kernels.generate import BLOCK
from weft.engine.kernels.primitives import (
    bits, count_lower, count_upper, dot, from_bf16, keep_long, magnitude, short_bf16, tally, to_bf16, total,
    u32,
)


def kernel({arguments}, p, q, low):
{hoisted}    n = {first}.shape[0]
"""


class Source:
    """One kernel: inputs (raw or float), what is done to a value, and the loop over blocks around it."""

    def __init__(self, raw: Sequence[bool], base: bool | None) -> None:
        """`raw[i]`: whether input i is raw bf16; `base`: the same of the base, None without one."""
        self.raw, self.base = list(raw), base
        self.arguments = [f"x{i}" for i in range(len(raw))]
        self.sliced: list[str] = []
        """Further arguments of which a block sees its slice."""
        self._scratch: dict[str, list[str]] = {}
        self.loads: list[str] = []
        if base is not None:
            self.add_base(base)
        minus = " - base" if base is not None else ""
        self.loads += [f"d{i} = {_load(f'x{i}', is_raw)}{minus}" for i, is_raw in enumerate(raw)]
        self.body = Body([f"d{i}" for i in range(len(raw))])

    def add_base(self, raw: bool) -> None:
        """Load the base's value as `base`."""
        self.arguments.append("b")
        self.loads.append(f"base = {_load('b', raw)}")

    def block(self, name: str, dtype: str) -> str:
        """An array of a block's length that the kernel uses for itself.

        Those of one dtype are parts of one argument: the compiler need not ask whether they overlap.
        """
        self._scratch.setdefault(dtype, []).append(name)
        return name

    @property
    def scratch(self) -> dict[str, int]:
        """The lengths of the arguments behind `block`, by dtype."""
        return {dtype: len(names) * BLOCK for dtype, names in self._scratch.items()}

    def short_loads(self) -> list[str]:
        """The inputs less the base in float32: where they have no more bits, the rounding is the same."""
        minus = "" if self.base is None else f" - {_load('b', self.base, short=True)}"
        return [
            f"f{i} = np.float32({_load(f'x{i}', raw, short=True)}{minus})" for i, raw in enumerate(self.raw)
        ]

    def finish(
        self,
        extra: Sequence[str],
        per_value: Sequence[str],
        after: Sequence[str] = (),
        loads: Sequence[str] | None = None,
    ) -> str:
        """The source text: `per_value` lines after the body, `after` each block.

        `loads` replaces the loading lines and the body. Each block works on slices, whose indices the
        compiler can see not to be negative: otherwise it checks each and vectorises nothing.
        """
        body = self.body
        hoisted = [f"p{i} = p[{i}]" for i in range(len(body.floats))]
        hoisted += [f"q{i} = q[{i}]" for i in range(len(body.words))]
        for dtype, names in self._scratch.items():
            hoisted += [f"{n} = of_{dtype}[{i * BLOCK} : {(i + 1) * BLOCK}]" for i, n in enumerate(names)]
        text = _HEAD.format(
            arguments=", ".join([*self.arguments, *extra, *(f"of_{dtype}" for dtype in self._scratch)]),
            hoisted="".join(f"    {line}\n" for line in hoisted),
            first=self.arguments[0],
        )
        text += "    for s in range(0, n, BLOCK):\n        m = min(BLOCK, n - s)\n"
        text += _indent([f"{a}_ = {a}[s : s + m]" for a in [*self.arguments, *self.sliced]], 8)
        text += "        here = u32(low + u32(s))\n        for j in range(m):\n"
        lines = [*self.loads, *body.lines, *per_value] if loads is None else [*loads, *per_value]
        return text + _indent(lines, 12) + _indent(after, 8)


def _load(array: str, raw: bool, short: bool = False) -> str:
    if raw:
        return f"{'short' if short else 'from'}_bf16({array}_[j])"
    return f"np.float{32 if short else 64}({array}_[j])"


def _indent(lines: Sequence[str], by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in lines)
