"""For which tensors a value holds: the conditions of a rule.

    filter    the name contains this text (MergeKit's; "*" holds everywhere)
    pattern   the whole name matches a glob (`*.mlp.*`), or a part of it a regular expression (`/[qk]_proj/`)
    layers    the block is in [a, b), written as a list as MergeKit's layer_range is (negative: from the end,
              null: to the end), or in a to b, both included, written "a-b"
    kind      attention, mlp, norm, embedding, head, router, expert, conv, bias or other (see kinds.py);
              `block:` is the same
    stack     the name begins with this prefix: encoder, vision_tower …

A rule with several conditions holds where all of them do; one without holds everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any

from weft.errors import did_you_mean
from weft.methods.step import At
from weft.recipes.kinds import KINDS, SYNONYMS, kinds_of
from weft.recipes.yaml import Path

KEYS = ("filter", "pattern", "layers", "block", "kind", "stack", "value")
MAX_PATTERN = 500
MAX_REPEATS = 5
_RANGE = re.compile(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?")

Report = Callable[[Path, str], None]


@dataclass(frozen=True)
class Condition:
    """Which tensors a rule is for; what is None does not matter."""

    filter: str | None = None
    pattern: str | None = None
    layers: tuple[int | None, int | None] | None = None
    kinds: tuple[str, ...] = ()
    stack: str | None = None

    @property
    def always(self) -> bool:
        return self == Condition()

    def holds(self, at: At) -> bool:
        return (
            (self.filter is None or self.filter in at.name)
            and (self.pattern is None or compiled(self.pattern).search(at.name) is not None)
            and (self.layers is None or self._in_layers(at))
            and (not self.kinds or not kinds_of(at.name).isdisjoint(self.kinds))
            and (self.stack is None or at.name.startswith(self.stack + "."))
        )

    def _in_layers(self, at: At) -> bool:
        assert self.layers is not None
        return at.layer is not None and at.layer in range(*slice(*self.layers).indices(at.layers))

    def describe(self) -> str:
        """`"mlp in blocks 0-7"`, for the printed plan."""
        parts = [
            "/".join(self.kinds),
            f"names with {self.filter!r}" if self.filter is not None else "",
            f"names like {self.pattern}" if self.pattern is not None else "",
            f"in {self.stack}" if self.stack is not None else "",
        ]
        if self.layers is not None:
            a, b = self.layers
            first, last = a or 0, "the last" if b is None else b - 1
            parts.append(f"block {first}" if first == last else f"blocks {first} to {last}")
        return " ".join(p for p in parts if p)


_cache: dict[str, re.Pattern[str]] = {}


def compiled(pattern: str) -> re.Pattern[str]:
    """The regular expression a pattern means. Patterns themselves are kept as text, so rules can travel."""
    if pattern not in _cache:
        regex = pattern[1:-1] if _is_regex(pattern) else r"\A" + translate(pattern)
        _cache[pattern] = re.compile(regex)
    return _cache[pattern]


def _is_regex(pattern: str) -> bool:
    return len(pattern) > 2 and pattern[0] == pattern[-1] == "/"


def parse_condition(raw: Mapping[str, Any], path: Path, report: Report) -> Condition:
    """Read the conditions of one rule; what is wrong goes to `report`."""
    for key in raw:
        if key not in KEYS:
            hint = did_you_mean(str(key), KEYS) or f"; a rule has {', '.join(KEYS)}"
            report((*path, key), f"unknown key {key!r}{hint}")
    texts: dict[str, str | None] = {"filter": None, "pattern": None, "stack": None}
    for key in texts:
        if raw.get(key) is not None:
            if isinstance(raw[key], str) and raw[key]:
                texts[key] = raw[key]
            else:
                report((*path, key), f"must be text, not {raw[key]!r}")
    if (pattern := texts["pattern"]) is not None and (why := _pattern_problem(pattern)):
        report((*path, "pattern"), why)
        texts["pattern"] = None
    if texts["filter"] == "*":
        texts["filter"] = None
    stack = texts["stack"]
    return Condition(
        texts["filter"], texts["pattern"], _layers(raw.get("layers"), (*path, "layers"), report),
        _kinds(raw, path, report), stack.rstrip(".") if stack else None,
    )  # fmt: skip


def _pattern_problem(pattern: str) -> str | None:
    if len(pattern) > MAX_PATTERN:
        return f"is longer than {MAX_PATTERN} characters"
    if _is_regex(pattern) and _repeats_nest(pattern[1:-1]):
        # (a+)+ takes time exponential in the length of a name, and names come with the checkpoint
        return (
            f"repeats a group that varies, refers back, or has more than {MAX_REPEATS} repeats; "
            "write it without ()* or ()+ around * + ? | {}"
        )
    try:
        compiled(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression ({error})"
    return None


def _repeats_nest(regex: str) -> bool:
    """True where matching could take very long: see the message."""
    plain = re.sub(r"\[\^?\]?(?:\\.|[^\]\\])*\]", "c", re.sub(r"\\[^\d]", "e", regex))
    if re.search(r"\\\d|\(\?P=", plain) or len(re.findall(r"[*+{]", plain)) > MAX_REPEATS:
        return True
    plain = re.sub(r"\(\?(?::|P<\w+>|<?[=!])", "(", plain)
    inside = [False]
    for i, ch in enumerate(plain):
        if ch == "(":
            inside.append(False)
        elif ch == ")" and len(inside) > 1:
            repeats = inside.pop()
            if repeats and plain[i + 1 : i + 2] in ("*", "+", "{"):
                return True
            inside[-1] = inside[-1] or repeats
        elif ch in "*+{?|":
            inside[-1] = True
    return False


def _layers(raw: Any, path: Path, report: Report) -> tuple[int | None, int | None] | None:
    if raw is None:
        return None
    if isinstance(raw, int) and not isinstance(raw, bool) and raw >= 0:
        return (raw, raw + 1)
    if isinstance(raw, str) and (found := _RANGE.fullmatch(raw)):
        first = int(found[1])
        last = int(found[2]) if found[2] else first
        if first <= last:
            return (first, last + 1)
    elif isinstance(raw, list) and len(raw) == 2 and all(_is_bound(v) for v in raw):
        a, b = raw
        if a is None or b is None or (a < 0) != (b < 0) or a < b:
            return (a, b)
    report(path, f'must be [first, end) such as [0, 8], or "first-last" such as "0-7", not {raw!r}')
    return None


def _is_bound(value: Any) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool))


def _kinds(raw: Mapping[str, Any], path: Path, report: Report) -> tuple[str, ...]:
    given = [key for key in ("kind", "block") if raw.get(key) is not None]
    if len(given) == 2:
        report((*path, "block"), "block and kind are two names of one key; give one")
    kinds: list[str] = []
    for key in given[:1]:
        values = raw[key] if isinstance(raw[key], list) else [raw[key]]
        for value in values:
            kind = SYNONYMS.get(value, value) if isinstance(value, str) else value
            if kind in KINDS:
                kinds.append(kind)
            else:
                hint = did_you_mean(str(value), (*KINDS, *SYNONYMS)) or f"; known are {', '.join(KINDS)}"
                report((*path, key), f"{value!r} is no kind of tensor{hint}")
    return tuple(kinds)
