"""What a search may change: keys of a recipe, each with the values it may take.

    parameters.scale: {low: 0, high: 1}                      a number; log, int and step as wanted
    models[*].parameters.weight: {low: 0, high: 1, curve: 4} a curve of four over the blocks, for every model
    merge_method: [ties, dare_ties]                          a choice, of words or of any YAML values
    shares: {simplex: "models[*].parameters.weight"}         weights that are positive and sum to one

A dimension becomes one or more axes, which a sampler sees, and turns a point on them into values for keys
(`settings`). `when: {merge_method: ties}` on a dimension drops it wherever that choice is another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from weft.errors import UsageError

Raw = Mapping[str, Any]
"""Axis → value, as a sampler has it."""
Settings = dict[str, Any]
"""Key of the recipe → value."""

COARSE = 11
"""Points of a grid on an axis without a step."""
MAX_GRID = 100_000


@dataclass(frozen=True)
class Axis:
    """One number in [low, high], or one of the labels in `options`."""

    name: str
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    integer: bool = False
    step: float | None = None
    options: tuple[str, ...] = ()

    def suggest(self, trial: Any) -> Any:
        """The value an Optuna trial takes here."""
        if self.options:
            return trial.suggest_categorical(self.name, self.options)
        if self.integer:
            return trial.suggest_int(
                self.name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log
            )
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def from_unit(self, u: float) -> Any:
        """[0, 1] → [low, high], evenly, or evenly in the logarithm; rounded to the step."""
        u = min(max(u, 0.0), 1.0)
        if self.log:
            value = math.exp(math.log(self.low) + u * (math.log(self.high) - math.log(self.low)))
        else:
            value = self.low + u * (self.high - self.low)
        step = self.step or (1.0 if self.integer else None)
        if step and not self.log:
            value = self.low + round((value - self.low) / step) * step
            value = value if value <= self.high + 1e-9 * step else value - step
        value = min(max(value, self.low), self.high)
        return round(value) if self.integer else value

    def to_unit(self, value: float) -> float:
        """[low, high] → [0, 1]; an axis of one point is at 0."""
        if self.high == self.low:
            return 0.0
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def grid(self) -> list[Any]:
        """Its points in a grid, ascending: every step, or eleven; every option."""
        if self.options:
            return list(self.options)
        step = self.step or (1.0 if self.integer and self.high - self.low < COARSE else None)
        if step and not self.log:
            count = math.floor((self.high - self.low) / step + 1e-9) + 1
            points = [self.low + i * step for i in range(count)]
        else:
            points = [self.from_unit(i / (COARSE - 1)) for i in range(COARSE)]
        # 0.30000000000000004 is 0.3 to whoever wrote the step
        made = [round(p) if self.integer else float(f"{p:.12g}") for p in points]
        return list(dict.fromkeys(made))

    def check(self, value: Any) -> Any:
        """A start value, if it lies on the axis."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high or (self.integer and value != round(value)):
            whole = "a whole number" if self.integer else "a number"
            raise UsageError(f"must be {whole} in [{self.low:g}, {self.high:g}], not {value!r}")
        return round(value) if self.integer else float(value)


@dataclass(frozen=True)
class Numbers:
    """A number, or a curve of several over the blocks."""

    path: str
    axes: tuple[Axis, ...]
    curve: bool = False
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    def decode(self, raw: Raw) -> Settings:
        values = [raw[a.name] for a in self.axes]
        return {self.path: values if self.curve else values[0]}

    def encode(self, settings: Settings) -> dict[str, Any]:
        value = settings[self.path]
        values = value if isinstance(value, list) else [value] * len(self.axes)
        if len(values) != len(self.axes) or (isinstance(value, list) and not self.curve):
            raise UsageError(f"must be {len(self.axes)} number{'s' * self.curve}, not {value!r}")
        return {a.name: a.check(v) for a, v in zip(self.axes, values, strict=True)}


@dataclass(frozen=True)
class Choice:
    """One of several values, of any kind."""

    path: str
    values: Mapping[str, Any]
    """By label, which is what samplers and `when` see."""
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return (Axis(self.path, options=tuple(self.values)),)

    def decode(self, raw: Raw) -> Settings:
        return {self.path: self.values[raw[self.path]]}

    def encode(self, settings: Settings) -> dict[str, Any]:
        wanted = label(settings[self.path])
        if wanted not in self.values:
            raise UsageError(f"must be one of {', '.join(self.values)}, not {wanted}")
        return {self.path: wanted}


@dataclass(frozen=True)
class Simplex:
    """Positive numbers that sum to one, one a path; uniform on the simplex where the axes are uniform.

    Stick-breaking: w_i = (1 − Σ_{j<i} w_j) · (1 − (1 − u_i)^{1/(k−1−i)}) for i < k−1, the last takes the rest;
    each first share of a uniform point on a simplex of m+1 corners is Beta(1, m), whose quantile this is.
    """

    name: str
    paths: tuple[str, ...]
    when: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(Axis(f"{self.name}@{i}") for i in range(len(self.paths) - 1))

    def decode(self, raw: Raw) -> Settings:
        rest, shares = 1.0, []
        for i, axis in enumerate(self.axes):
            m = len(self.paths) - 1 - i
            share = rest * (1.0 - (1.0 - raw[axis.name]) ** (1.0 / m))
            shares.append(share)
            rest -= share
        return dict(zip(self.paths, [*shares, max(rest, 0.0)], strict=True))

    def encode(self, settings: Settings) -> dict[str, Any]:
        shares: list[Any] = [settings.get(p) for p in self.paths]
        if not all(isinstance(s, int | float) and s >= 0 for s in shares) or sum(shares) <= 0:
            raise UsageError(f"must be numbers that are not negative, for each of {', '.join(self.paths)}")
        total, rest, made = float(sum(shares)), 1.0, {}
        for i, axis in enumerate(self.axes):
            m = len(self.paths) - 1 - i
            share = shares[i] / total
            made[axis.name] = 1.0 - (1.0 - min(share / rest, 1.0)) ** m if rest > 1e-12 else 0.0
            rest -= share
        return made


Dimension = Numbers | Choice | Simplex


@dataclass(frozen=True)
class Space:
    """All dimensions; those with a `when` come after the choices they depend on."""

    dimensions: tuple[Dimension, ...]

    @property
    def axes(self) -> tuple[Axis, ...]:
        return tuple(a for d in self.dimensions for a in d.axes)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(p for d in self.dimensions for p in d.paths)

    @property
    def conditional(self) -> bool:
        return any(d.when for d in self.dimensions)

    @property
    def numeric(self) -> bool:
        return not any(a.options for a in self.axes)

    def active(self, raw: Raw) -> Iterator[Dimension]:
        """The dimensions that count at a point; reads choices from `raw` as far as they are made."""
        for d in self.dimensions:
            if all(raw.get(path) in labels for path, labels in d.when.items()):
                yield d

    def suggest(self, trial: Any) -> dict[str, Any]:
        """A point chosen by an Optuna trial, axis after axis."""
        raw: dict[str, Any] = {}
        for d in self.active(raw):  # lazily: what is suggested decides what else is
            raw.update({a.name: a.suggest(trial) for a in d.axes})
        return raw

    def complete(self, raw: Raw) -> bool:
        """Whether a point has a value on every axis that counts."""
        return all(a.name in raw for d in self.active(raw) for a in d.axes)

    def decode(self, raw: Raw) -> Settings:
        """The values of the keys at a point."""
        settings: Settings = {}
        for d in self.active(raw):
            settings.update(d.decode(raw))
        return settings

    def encode(self, settings: Settings) -> dict[str, Any]:
        """The point where keys have these values; keys that are not given are left to the sampler.

        Raises UsageError for a key that the space does not have and a value outside of it.
        """
        unknown = [p for p in settings if p not in self.paths]
        if unknown:
            from weft.errors import did_you_mean

            raise UsageError(f"{unknown[0]} is not in the space{did_you_mean(unknown[0], self.paths)}")
        raw: dict[str, Any] = {}
        for d in self.dimensions:
            if any(p in settings for p in d.paths):
                try:
                    raw.update(d.encode(settings))
                except UsageError as error:
                    raise UsageError(f"{' and '.join(d.paths)} {error}") from None
        return raw

    def at(self, u: float) -> dict[str, Any]:
        """The point at the same share of every axis: 0 the lowest, 0.5 the middle, 1 the highest."""
        return {
            a.name: a.options[min(int(u * len(a.options)), len(a.options) - 1)] if a.options
            else a.from_unit(u) for a in self.axes
        }  # fmt: skip

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, ascending, each setting once. Raises UsageError where they are too many."""
        lines = [a.grid() for a in self.axes]
        count = math.prod(len(line) for line in lines)
        if count > MAX_GRID:
            raise UsageError(f"a grid of {count:,} candidates is too many: widen the steps or choose tpe")
        points: dict[str, dict[str, Any]] = {}
        for values in product(*lines):
            raw = dict(zip((a.name for a in self.axes), values, strict=True))
            points.setdefault(json.dumps(self.decode(raw), sort_keys=True), raw)
        return list(points.values())

    def describe(self) -> dict[str, str]:
        """Each dimension in a line, for messages and to see whether a stored search is the same."""
        return {
            ", ".join(d.paths) if not isinstance(d, Simplex) else d.name: show(d) for d in self.dimensions
        }


def show(d: Dimension) -> str:
    """`"0 to 1, log, curve of 4"`."""
    if isinstance(d, Choice):
        text = " | ".join(d.values)
    elif isinstance(d, Simplex):
        text = f"shares of {', '.join(d.paths)}"
    else:
        a = d.axes[0]
        text = f"{a.low!r} to {a.high!r}"
        text += ", log" * a.log + ", int" * a.integer + (f", step {a.step!r}" if a.step else "")
        text += f", curve of {len(d.axes)}" if d.curve else ""
    on = "; ".join(f"{p} is {' or '.join(labels)}" for p, labels in d.when.items())
    return f"{text}, when {on}" if on else text


def label(value: Any) -> str:
    """A value as a word that tells it from the others."""
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def numbers(path: str, low: float, high: float, *, curve: int | None = None, **how: Any) -> Numbers:
    """A `Numbers` dimension with its axes named after the path."""
    if curve is None:
        return Numbers(path, (Axis(path, low, high, **how),))
    return Numbers(path, tuple(Axis(f"{path}@{i}", low, high, **how) for i in range(curve)), True)


def choice(path: str, values: Sequence[Any]) -> Choice:
    """A `Choice` dimension."""
    return Choice(path, {label(v): v for v in values})
