"""Parameter values that depend on the tensor, resolved outside the kernels.

A value is written as

    0.5                                     a scalar
    [0, 0.5, 1]                             a curve over the blocks (MergeKit's gradient)
    - {filter: self_attn, value: 0.3}       rules, the first that holds wins (rules.py); each value is again
    - {kind: mlp, value: [0.2, 0.8]}        a scalar or a curve
    - value: 0.5

A curve of n numbers is piecewise linear over the blocks of the tensor's stack: block i of L lies at
t = i/(L−1), and at t = 1 if it is the only one. Tensors before the blocks (embeddings) take the first
value, those after them (final norm, head) the last; MergeKit gives the first to both, and so does
`compat: mergekit`. Curves of words, booleans or whole numbers step: n values, equal shares of the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from weft.errors import Problems, UsageError
from weft.methods.params import Parameter
from weft.methods.step import At
from weft.recipes.findings import show_path
from weft.recipes.kinds import after_blocks
from weft.recipes.rules import Condition, Report, parse_condition
from weft.recipes.yaml import Path

Leaf = float | int | bool | str | None
ALWAYS = Condition()


@dataclass(frozen=True)
class Curve:
    """Values over the depth of the model."""

    values: tuple[Leaf, ...]
    smooth: bool

    def value(self, t: float) -> Leaf:
        n = len(self.values)
        if not self.smooth:
            return self.values[min(int(t * n), n - 1)]
        place = t * (n - 1)
        i = min(int(place), n - 1)
        share = place - i
        if share == 0:
            return self.values[i]
        a, b = self.values[i], self.values[i + 1]
        assert isinstance(a, int | float) and isinstance(b, int | float)
        return a * (1 - share) + b * share

    def __str__(self) -> str:
        return f"{' → '.join(map(_number, self.values))} over the blocks"


def depth(at: At, mergekit: bool = False) -> float:
    """Where a tensor lies between the first block (0) and the last (1)."""
    if at.layer is None:
        return 0.0 if mergekit or not after_blocks(at.name) else 1.0
    return min(at.layer / (at.layers - 1), 1.0) if at.layers > 1 else 1.0


@dataclass(frozen=True)
class Rule:
    """A value and the tensors it is for."""

    when: Condition
    value: Leaf | Curve

    def __str__(self) -> str:
        value = str(self.value) if isinstance(self.value, Curve) else _number(self.value)
        return value if self.when.always else f"{value} for {self.when.describe()}"


@dataclass(frozen=True)
class Schedule:
    """One parameter's value for every tensor: rules, of which the first that holds wins."""

    parameter: Parameter
    rules: tuple[Rule, ...]
    mergekit: bool = False

    @classmethod
    def parse(cls, raw: Any, parameter: Parameter, *, mergekit: bool = False) -> Schedule:
        """Read a value, every leaf checked against the parameter. Raises Problems with all that is wrong."""
        found: list[str] = []

        def report(path: Path, message: str) -> None:
            found.append(f"{show_path((parameter.name, *path))}: {message}")

        schedule = cls(parameter, parse_rules(raw, parameter, (), report), mergekit)
        if found:
            raise Problems(f"{parameter.name} is not what it should be", found)
        return schedule if parameter.required else schedule.then(constant(parameter, parameter.default))

    def then(self, other: Schedule) -> Schedule:
        """This schedule, and where no rule holds the other."""
        return replace(self, rules=self.rules + other.rules)

    def at(self, at: At) -> Any:
        """The value for one tensor; UsageError where no rule holds."""
        for rule in self.rules:
            if rule.when.holds(at):
                value = rule.value
                return value.value(depth(at, self.mergekit)) if isinstance(value, Curve) else value
        raise UsageError(
            f"{self.parameter.name} has no value for tensor {at.name!r}: no rule holds there and it has no "
            "default; end its rules with one that has only a value"
        )

    @property
    def effective(self) -> tuple[Rule, ...]:
        """The rules up to the first that always holds; the rest never matter."""
        for i, rule in enumerate(self.rules):
            if rule.when.always:
                return self.rules[: i + 1]
        return self.rules

    @property
    def constant(self) -> bool:
        """True when every tensor gets the same value."""
        values = [r.value for r in self.effective]
        whole = bool(values) and self.effective[-1].when.always
        return whole and not any(isinstance(v, Curve) for v in values) and len(set(values)) == 1

    def is_always(self, value: Any) -> bool:
        """True when every tensor gets this very value."""
        return self.constant and self.effective[0].value == value

    @property
    def curved(self) -> bool:
        return any(isinstance(r.value, Curve) for r in self.effective)

    def describe(self) -> str:
        """`"0.3 for mlp, else 0 → 1 over the blocks"`."""
        *first, last = [str(r) for r in self.effective] or ["nothing"]
        if self.constant or not first:
            return last
        return ", ".join(first) + (", else " if self.effective[-1].when.always else ", ") + last


def constant(parameter: Parameter, value: Leaf) -> Schedule:
    """The same value everywhere."""
    return Schedule(parameter, (Rule(ALWAYS, value),))


def parse_rules(raw: Any, parameter: Parameter, path: Path, report: Report) -> tuple[Rule, ...]:
    """The rules a raw value stands for; what is wrong goes to `report`."""
    alone = isinstance(raw, Mapping)
    if alone:
        raw = [raw]
    if not isinstance(raw, list | tuple) or not any(isinstance(entry, Mapping) for entry in raw):
        value = _value(raw, parameter, path, report)
        return () if value is _BAD else (Rule(ALWAYS, value),)
    rules = []
    for i, entry in enumerate(raw):
        place = path if alone else (*path, i)
        if not isinstance(entry, Mapping):
            report(place, "a list holds either numbers (a curve) or rules ({filter: …, value: …}), not both")
        elif "value" not in entry:
            report(place, "a rule needs value:")
            parse_condition(entry, place, report)
        else:
            value = _value(entry["value"], parameter, (*place, "value"), report)
            when = parse_condition(entry, place, report)
            if value is not _BAD:
                rules.append(Rule(when, value))
    return tuple(rules)


_BAD: Any = object()


def _value(raw: Any, parameter: Parameter, path: Path, report: Report) -> Any:
    if not isinstance(raw, list | tuple):
        return _leaf(raw, parameter, path, report)
    if not raw:
        report(path, "a curve needs at least one value")
        return _BAD
    values = [_leaf(v, parameter, (*path, i), report) for i, v in enumerate(raw)]
    if any(v is _BAD for v in values):
        return _BAD
    smooth = parameter.kind == "float" and all(isinstance(v, float) for v in values)
    return Curve(tuple(values), smooth) if len(values) > 1 else values[0]


def _leaf(raw: Any, parameter: Parameter, path: Path, report: Report) -> Any:
    single = replace(parameter, bounds=replace(parameter.bounds, per_model=False))
    if isinstance(raw, list | tuple | Mapping):
        report(path, f"{parameter.name} must be {single.describe()} here, not a list or mapping")
        return _BAD
    try:
        return single.check(raw)
    except UsageError as error:
        report(path, str(error))
    except (ValueError, OverflowError):  # NaN and infinity have no whole part
        report(path, f"{parameter.name} must be {single.describe()}, not {raw!r}")
    return _BAD


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Schedules:
    """All parameters of a method: what a merge node calls with the tensor at hand."""

    by_name: Mapping[str, Schedule | tuple[Schedule, ...]]
    """A tuple has one schedule a model, in the order of the models."""

    def __call__(self, at: At) -> dict[str, Any]:
        return {
            name: [s.at(at) for s in schedule] if isinstance(schedule, tuple) else schedule.at(at)
            for name, schedule in self.by_name.items()
        }

    def describe(self) -> dict[str, str]:
        """Name → how the value comes about, models separated by `|`."""
        told = {}
        for name, schedule in self.by_name.items():
            each = [s.describe() for s in schedule] if isinstance(schedule, tuple) else [schedule.describe()]
            told[name] = each[0] if len(set(each)) == 1 else " | ".join(each)
        return told

    def each(self, name: str) -> tuple[Schedule, ...]:
        found = self.by_name[name]
        return found if isinstance(found, tuple) else (found,)
