"""From a body of scalar lines to the source of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

from weft.checkpoints.dtypes import BF16, F16
from weft.engine.kernels.emit import Body

_HEAD = """\
import numpy as np
from weft.engine.kernels.primitives import (
    bits, count_lower, count_upper, dot, from_bf16, from_f16, keep_long, magnitude, short_bf16, short_f16, tally,
    to_bf16, to_f16, total, u32, unbounded,
)
from weft.engine.kernels.rows import thin_row


def kernel({arguments}, p, q, low, block):
{hoisted}    n = {first}.shape[0]
"""
RAW = {BF16: "bf16", F16: "f16"}
"""Dtypes that kernels read and write as their bits, in uint16."""
_LOOP = "        for j in range(m):\n"


class Source:
    """One kernel: inputs (raw or float), what is done to a value, and the loop over blocks around it."""

    def __init__(self, raw: Sequence[str], base: str | None) -> None:
        """`raw[i]`: what input i holds the bits of, "" for floats; `base`: the same of the base, if there is."""
        self.raw, self.base = list(raw), base
        self.arguments = [f"x{i}" for i in range(len(raw))]
        self.sliced: list[str] = []
        """Further arguments of which a block sees its slice."""
        self.loads: list[str] = []
        if base is not None:
            self.add_base(base)
        minus = " - base" if base is not None else ""
        self.loads += [f"d{i} = {_load(f'x{i}', is_raw)}{minus}" for i, is_raw in enumerate(raw)]
        self.body = Body([f"d{i}" for i in range(len(raw))])

    def add_base(self, raw: str) -> None:
        """Load the base's value as `base`."""
        self.arguments.append("b")
        self.loads.append(f"base = {_load('b', raw)}")

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
        for dtype, names in body.blocks.items():
            hoisted += [f"{n} = of_{dtype}[{i} * block : {i + 1} * block]" for i, n in enumerate(names)]
        text = _HEAD.format(
            arguments=", ".join(
                [*self.arguments, *extra, *(f"of_{dtype}" for dtype in body.blocks), *body.fixed]
            ),
            hoisted="".join(f"    {line}\n" for line in hoisted),
            first=self.arguments[0],
        )
        text += "    for s in range(0, n, block):\n        m = min(block, n - s)\n"
        text += _indent([f"{a}_ = {a}[s : s + m]" for a in [*self.arguments, *self.sliced]], 8)
        text += "        here = u32(low + u32(s))\n"
        lines = [*self.loads, *body.lines, *per_value] if loads is None else [*loads, *per_value]
        for before, calls in body.phases:
            text += _LOOP + _indent([*self.loads, *before], 12) + _indent(calls, 8)
        return text + _LOOP + _indent(lines, 12) + _indent(after, 8)


def _load(array: str, raw: str, short: bool = False) -> str:
    if raw:
        return f"{'short' if short else 'from'}_{raw}({array}_[j])"
    return f"np.float{32 if short else 64}({array}_[j])"


def _indent(lines: Sequence[str], by: int) -> str:
    return "".join(f"{' ' * by}{line}\n" for line in lines)
