"""Parameters of steps and methods, read from their signatures.

A parameter is a keyword with an annotation and, unless it must be given, a default. `Annotated` adds what
an annotation cannot say: bounds, and whether each model may have its own value. Everything that needs to
know a parameter (engine, CLI, recipe schema, documentation, search space) reads it from here.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from weft.errors import UsageError

MISSING: Any = inspect.Parameter.empty


@dataclass(frozen=True)
class Bounds:
    """What values a parameter may take, beside its type. Bounds are inclusive unless `open_low`."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    per_model: bool = False


PerModel = float | Sequence[float]
Weight = Annotated[PerModel, Bounds(per_model=True)]
"""One coefficient a model; any finite number, negative ones included."""
Density = Annotated[PerModel, Bounds(0.0, 1.0, per_model=True)]
"""Fraction of entries kept, per model."""
Fraction = Annotated[float, Bounds(0.0, 1.0)]
NonNegative = Annotated[float, Bounds(0.0)]
Positive = Annotated[float, Bounds(0.0, open_low=True)]
Scope = Literal["tensor", "model"]
"""Over what a statistic is taken: each tensor by itself, or all tensors together."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter."""

    name: str
    kind: Literal["float", "int", "bool", "str", "choice"]
    default: Any
    choices: tuple[str, ...] = ()
    bounds: Bounds = Bounds()
    optional: bool = False

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def per_model(self) -> bool:
        return self.bounds.per_model

    def describe(self) -> str:
        """`"float in [0, 1], one a model"`, for tables and messages."""
        kind = " | ".join(map(repr, self.choices)) if self.choices else self.kind
        b = self.bounds
        if math.isfinite(b.low) and math.isfinite(b.high):
            kind += f" in {'(' if b.open_low else '['}{b.low:g}, {b.high:g}]"
        elif math.isfinite(b.low):
            kind += f" {'>' if b.open_low else '>='} {b.low:g}"
        return kind + (", one a model" if self.per_model else "")

    def check(self, value: Any, where: str = "") -> Any:
        """Return the value as its declared type; UsageError names the parameter, place and bounds."""
        if self.per_model and isinstance(value, list | tuple):
            return [self._check_one(v, where) for v in value]
        return self._check_one(value, where)

    def _check_one(self, value: Any, where: str) -> Any:
        place = f" ({where})" if where else ""
        if value is None and self.optional:
            return None
        expected = UsageError(f"{self.name} must be {self.describe()}, not {value!r}{place}")
        if self.kind == "bool":
            if not isinstance(value, bool):
                raise expected
            return value
        if self.kind in ("str", "choice"):
            if not isinstance(value, str) or (self.choices and value not in self.choices):
                raise expected
            return value
        if isinstance(value, str):  # YAML 1.1 reads 1e-5 as text
            try:
                value = float(value)
            except ValueError:
                raise expected from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise expected
        if self.kind == "int" and value != int(value):
            raise expected
        b = self.bounds
        if not math.isfinite(value) or not b.low <= value <= b.high or (b.open_low and value == b.low):
            raise expected
        return int(value) if self.kind == "int" else float(value)


def signature_parameters(fn: Callable[..., Any], skip: Sequence[str] = ()) -> dict[str, Parameter]:
    """The keyword-only parameters of `fn`, but for those in `skip` (filled in by the engine)."""
    hints = get_type_hints(fn, include_extras=True)
    found = {}
    for p in inspect.signature(fn).parameters.values():
        if p.kind is p.KEYWORD_ONLY and p.name not in skip:
            found[p.name] = _parameter(p.name, hints[p.name], p.default)
    return found


def _parameter(name: str, hint: Any, default: Any) -> Parameter:
    bounds = Bounds()
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        bounds = next((n for n in notes if isinstance(n, Bounds)), bounds)
    optional = False
    if type(None) in get_args(hint):
        optional = True
        rest = [a for a in get_args(hint) if a is not type(None)]
        if len(rest) == 1:
            inner = _parameter(name, rest[0], default)
            return Parameter(name, inner.kind, default, inner.choices, inner.bounds, optional=True)
        hint = Union[tuple(rest)]  # noqa: UP007
    if get_origin(hint) is Literal:
        return Parameter(name, "choice", default, get_args(hint), bounds, optional)
    if hint in (bool, int, str):
        return Parameter(name, hint.__name__, default, (), bounds, optional)
    if hint is float or bounds.per_model:
        return Parameter(name, "float", default, (), bounds, optional)
    raise TypeError(f"parameter {name}: annotation {hint!r} is not one weft can read")


def check_params(owner: str, declared: dict[str, Parameter], given: dict[str, Any]) -> dict[str, Any]:
    """Validate `given` against `declared` and fill in defaults; every problem names `owner`."""
    from weft.errors import did_you_mean

    for name in given:
        if name not in declared:
            hint = did_you_mean(name, declared) or f"; it has {', '.join(declared) or 'none'}"
            raise UsageError(f"{owner} has no parameter {name!r}{hint}")
    values = {}
    for name, p in declared.items():
        if name in given:
            values[name] = p.check(given[name], owner)
        elif p.required:
            raise UsageError(f"{owner} needs {name} ({p.describe()})")
        else:
            values[name] = p.default
    return values


def per_model(value: PerModel, k: int, name: str = "weight") -> list[float]:
    """One value a model: a number is repeated, a sequence must have length `k`."""
    if isinstance(value, int | float):
        return [float(value)] * k
    if len(value) != k:
        raise UsageError(f"{name} has {len(value)} values for {k} models")
    return [float(v) for v in value]
