"""How each step reads as scalar code on the float64 values of one position.

An emitter appends lines to a `Body` and replaces its `values` (one expression a model, or one in all after a
reducing step). It must do the same operations in the same order as the step's torch function: tests compare
them bit by bit. Numbers are passed as arguments of the kernel, so that other parameters need no other code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from weft.checkpoints.bits import Array
from weft.methods.averages import coefficients
from weft.methods.dare import ratios
from weft.methods.params import per_model
from weft.methods.random import stream_key, threshold
from weft.methods.spherical import mean_coefficients, slerp_coefficients
from weft.methods.step import At
from weft.methods.stock import stock_ratio

BLOCK = 1024
"""Values that a kernel takes at a time, so that they stay in the first-level cache."""
SPAN = 8192
"""Places in the table of a row's short magnitudes: 32 octaves, 256 each."""
FEW = 64
"""Up to so many longer magnitudes of a row are put in order one by one."""


@dataclass
class Body:
    """The inner loop of one kernel under construction; several loops where a step takes whole rows."""

    values: list[str]
    lines: list[str] = field(default_factory=list)
    phases: list[tuple[list[str], list[str]]] = field(default_factory=list)
    """Loops before this one, each with what is called after it."""
    blocks: dict[str, list[str]] = field(default_factory=dict)
    """By dtype, arrays of a block's length that the kernel uses for itself, zero at first."""
    fixed: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """Others, with dtype and shape."""
    rows: bool = False
    """Whether a block must be a row."""
    floats: list[float] = field(default_factory=list)
    words: list[int] = field(default_factory=list)
    """32-bit words: hash keys and thresholds."""

    @property
    def k(self) -> int:
        return len(self.values)

    def number(self, value: float) -> str:
        if value == 1.0:
            return "1.0"  # the compiler drops a multiplication by one; the result is the same number
        self.floats.append(float(value))
        return f"p{len(self.floats) - 1}"

    def word(self, value: int) -> str:
        self.words.append(int(value))
        return f"q{len(self.words) - 1}"

    def let(self, expression: str) -> str:
        name = f"v{len(self.phases)}_{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def block(self, name: str, dtype: str) -> str:
        """An array of a block's length. Those of one dtype are parts of one argument: the compiler need not ask
        whether they overlap."""
        names = self.blocks.setdefault(dtype, [])
        if name not in names:
            names.append(name)
        return name

    def row_by_row(self, call: Callable[[list[str]], list[str]]) -> None:
        """Keep the values of a row in arrays, make `call` of their names, and go on with what is there then."""
        self.rows = True
        arrays = [self.block(f"row{len(self.phases)}_{i}", "float64") for i in range(self.k)]
        kept = [f"{a}[j] = {v}" for a, v in zip(arrays, self.values, strict=True)]
        self.phases.append(([*self.lines, *kept], call(arrays)))
        self.lines, self.values = [], [f"{a}[j]" for a in arrays]


Emitter = Callable[[Body, Mapping[str, Any], Mapping[str, Any], At], None]
EMITTERS: dict[str, Emitter] = {}


def emits(name: str) -> Callable[[Emitter], Emitter]:
    def declare(fn: Emitter) -> Emitter:
        EMITTERS[name] = fn
        return fn

    return declare


Summands = Callable[[Body, Mapping[str, Any], At], list[str]]
SUMS: dict[str, Summands] = {}
"""Step → the quantities whose sums are its statistic (`Sums`), one expression each."""


def sums(name: str) -> Callable[[Summands], Summands]:
    def declare(fn: Summands) -> Summands:
        SUMS[name] = fn
        return fn

    return declare


def _sum(body: Body, factors: list[float]) -> None:
    """Σ cᵢxᵢ, added model by model."""
    terms = [f"{v} * {body.number(c)}" for v, c in zip(body.values, factors, strict=True)]
    body.values = [body.let(" + ".join(terms))]


@emits("weighted_sum")
def weighted_sum(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _sum(body, coefficients(params, body.k))


@emits("scaled")
def scaled(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    scale = body.number(params["scale"])
    body.values = [body.let(f"{v} * {scale}") for v in body.values]


@emits("trim")
def trim(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    bounds = found["threshold"][:, 0].tolist()
    body.values = [
        body.let(f"{v} if magnitude({v}) >= {body.number(t)} else 0.0")
        for v, t in zip(body.values, bounds, strict=True)
    ]


@emits("band")
def band(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    kept = []
    for v, (high, low) in zip(body.values, found["bounds"].tolist(), strict=True):
        size = body.let(f"magnitude({v})")
        kept.append(
            body.let(f"{v} if ({size} <= {body.number(high)}) & ({size} >= {body.number(low)}) else 0.0")
        )
    body.values = kept


@emits("elect_sign")
def elect_sign(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    w = per_model(params["weight"], body.k)
    weighted = [body.let(f"{v} * {body.number(c)}") for v, c in zip(body.values, w, strict=True)]
    votes = weighted
    if params["elect"] == "count":
        votes = [body.let(f"(1.0 if {t} > 0.0 else 0.0) - (1.0 if {t} < 0.0 else 0.0)") for t in weighted]
    total = body.let(" + ".join(votes))
    plus = body.let(f"{total} >= 0.0" if params["tie"] == "plus" else f"{total} > 0.0")
    minus = body.let(f"{total} < 0.0")
    body.values = [
        body.let(f"{v} if (({t} > 0.0) & {plus}) | (({t} < 0.0) & {minus}) else 0.0")
        for v, t in zip(body.values, weighted, strict=True)
    ]


@emits("disjoint_mean")
def disjoint_mean(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    w = per_model(params["weight"], body.k)
    if not params["normalize"]:
        _sum(body, w)
        return
    names = [body.number(c) for c in w]
    total = body.let(" + ".join(f"{v} * {c}" for v, c in zip(body.values, names, strict=True)))
    mass = body.let(
        " + ".join(f"({c} if {v} != 0.0 else 0.0)" for v, c in zip(body.values, names, strict=True))
    )
    body.values = [body.let(f"{total} / ({mass} if {mass} != 0.0 else 1.0) if {mass} != 0.0 else 0.0")]


def _kept(body: Body, density: Any, at: At) -> list[str]:
    """The values that survive a random draw; zero for the others."""
    kept = []
    for i, (v, p) in enumerate(zip(body.values, per_model(density, body.k), strict=True)):
        if p < 1.0:
            k0, k1 = (body.word(key) for key in stream_key(at.seed, i, at.name, at.start >> 32))
            draw = body.let(f"bits(u32(here + u32(j)), {k0}, {k1})")
            v = body.let(f"{v} if {draw} < {body.word(threshold(p))} else 0.0")
        kept.append(v)
    return kept


@emits("drop")
def drop(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    body.values = _kept(body, params["density"], at)
    if params["rescale"]:
        body.values = [
            body.let(f"{v} / {body.number(p)}") if p > 0 else v
            for v, p in zip(body.values, per_model(params["density"], body.k), strict=True)
        ]


@emits("drop_keep_l1")
def drop_keep_l1(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    body.values = [
        body.let(f"{v} * {body.number(r)}")
        for v, r in zip(_kept(body, params["density"], at), ratios(found["masses"]).tolist(), strict=True)
    ]


@sums("drop_keep_l1")
def drop_masses(body: Body, params: Mapping[str, Any], at: At) -> list[str]:
    kept = _kept(body, params["density"], at)
    return [f"abs({v})" for v in (*body.values, *kept)]


def _thin(body: Body, params: Mapping[str, Any], at: At, rescale: bool) -> None:
    """DELLA's dropping by rank within a row."""
    words = [body.block(f"words{i}", "uint32") for i in range(2)]
    chances = body.block("chances", "float64")
    longs = [body.block(f"longs{i}", "uint64") for i in range(2)]
    body.fixed |= {"short_counts": ("uint16", (SPAN,)), "longer": ("uint32", (FEW + 1,)),
                   "table": ("float64", (SPAN + FEW + 1,)), "used": ("uint64", (SPAN + 4,)),
                   "counts": ("int32", (4, 256))}  # fmt: skip
    scratch = ", ".join([*words, chances, *longs, *body.fixed])

    def call(rows: list[str]) -> list[str]:
        calls = []
        for i, (row, p) in enumerate(zip(rows, per_model(params["density"], body.k), strict=True)):
            density, window = body.number(p), body.number(min(params["epsilon"], p, 1.0 - p))
            k0, k1 = (body.word(key) for key in stream_key(at.seed, i, at.name, at.start >> 32))
            calls.append(f"thin_row({row}[:m], {density}, {window}, {rescale}, here, {k0}, {k1}, {scratch})")
        return calls

    body.row_by_row(call)


@emits("thin")
def thin(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _thin(body, params, at, params["rescale"])


@emits("thin_keep_l1")
def thin_keep_l1(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _thin(body, params, at, False)
    body.values = [
        body.let(f"{v} * {body.number(r)}")
        for v, r in zip(body.values, ratios(found["masses"]).tolist(), strict=True)
    ]


@sums("thin_keep_l1")
def thin_masses(body: Body, params: Mapping[str, Any], at: At) -> list[str]:
    before = [body.block(f"before{i}", "float64") for i in range(body.k)]
    body.lines += [f"{b}[j] = {v}" for b, v in zip(before, body.values, strict=True)]
    _thin(body, params, at, False)
    return [f"abs({v})" for v in (*(f"{b}[j]" for b in before), *body.values)]


def _combination(body: Body, factors: Array) -> None:
    _sum(body, np.broadcast_to(factors, body.k).tolist())


@emits("turn")
def turn(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _combination(body, slerp_coefficients(found["gram"], **params))


@emits("mean_direction")
def mean_direction(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _combination(body, mean_coefficients(found["gram"], **params))


@emits("shrink_mean")
def shrink_mean(body: Body, params: Mapping[str, Any], found: Mapping[str, Any], at: At) -> None:
    _combination(body, stock_ratio(found["gram"], params["clamp"]) / body.k)
