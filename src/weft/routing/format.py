"""`weft_routing.json`: what a routed model says of itself, read as input from a stranger.

Names, types and ranges are checked here; from the description, the module and the stored tensors' shapes follows
every stored part, and a file that has others is refused before a value is used (stored.py).
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown, tensor_name_problem
from weft.checkpoints.load import ROUTING_CONFIG
from weft.checkpoints.strictjson import parse_json
from weft.deltas.format import Entry, parse_entry, told_entry
from weft.errors import DataProblems, Problems, UnsafeFile, UsageError
from weft.methods.registry import METHODS
from weft.routing.blocks import Block
from weft.routing.gated import HOW
from weft.routing.gating import Gating
from weft.routing.residuals import STORED
from weft.routing.routed import Combining, Fitted

FILE, WEIGHTS = ROUTING_CONFIG, "routing.safetensors"
VERSION = 1
MOST_EXPERTS = 4096
_KEYS = {
    "format", "version", "module", "tasks", "blocks", "gating", "rest", "combine", "how", "residuals",
    "fitted",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """A routed model without its numbers."""

    module: str
    """Class of the network, to tell a wrong one by."""
    tasks: tuple[str, ...]
    blocks: tuple[Block, ...]
    gating: Gating
    rest: tuple[float, ...]
    combining: Combining
    how: str
    residuals: Mapping[str, tuple[Entry | None, ...]]
    fitted: tuple[Fitted, ...]

    def to_json(self) -> bytes:
        told = {
            "format": "weft-routing", "version": VERSION, "module": self.module, "tasks": list(self.tasks),
            "blocks": [
                {"name": b.name, "parameters": list(b.parameters), "buffers": list(b.buffers)} for b in self.blocks
            ],
            "gating": {f.name: getattr(self.gating, f.name) for f in fields(Gating)},
            "rest": list(self.rest),
            "combine": None if self.combining.method is None
            else {"method": self.combining.method, "params": dict(self.combining.params or {})},
            "how": self.how,
            "residuals": {
                n: [None if e is None else told_entry(e) for e in each] for n, each in self.residuals.items()
            },
            "fitted": [{"what": f.what, "data": f.data, "split": f.split} for f in self.fitted],
        }  # fmt: skip
        return (json.dumps(told, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def parse_document(data: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> Document:
    """The document in `data`. UnsafeFile where it is none, DataProblems listing all that is wrong."""
    found = parse_json(data, where, "routing-json", depth=limits.config_depth)
    if found.get("format") != "weft-routing":
        raise UnsafeFile("routing-json", f"{where} is no routed model of weft's")
    if found.get("version") != VERSION or type(found["version"]) is not int:
        raise UnsafeFile(
            "routing-version",
            f"{where} is of version {shown(found.get('version'))}, which this weft does not read; update weft",
        )
    problems = [f"{shown(k)} is not known" for k in sorted(found.keys() - _KEYS)]
    problems += [f"{k} is missing" for k in sorted(_KEYS - found.keys())]
    if not problems:
        problems = _problems(found, limits)
    made = None if problems else _document(found, problems)
    if problems or made is None:
        raise DataProblems(f"{where} cannot be read", problems)
    return made


def _problems(found: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is wrong with the kinds and sizes of the values."""
    problems = []
    tasks, rest = found["tasks"], found["rest"]
    if not _texts(tasks) or not 1 <= len(tasks) <= MOST_EXPERTS or len(set(tasks)) < len(tasks):
        return [f"tasks must be 1 to {MOST_EXPERTS} different names"]
    if not isinstance(found["module"], str):
        problems.append("module must be text")
    if not isinstance(rest, list) or len(rest) != len(tasks) or not all(_number(v) for v in rest):
        problems.append("rest must be one number a task")
    if found["how"] not in HOW:
        problems.append(f"how must be one of {', '.join(HOW)}")
    blocks = found["blocks"]
    if not isinstance(blocks, list) or not blocks or not all(_is_block(b) for b in blocks):
        problems.append("blocks must be a list of objects with just name, parameters and buffers")
    fitted = found["fitted"]
    if not isinstance(fitted, list) or not all(
        isinstance(f, dict) and f.keys() == {"what", "data", "split"} and _texts(list(f.values()))
        for f in fitted
    ):
        problems.append("fitted must be a list of objects with just what, data and split, all text")
    residuals = found["residuals"]
    if not isinstance(residuals, dict) or not residuals:
        return [*problems, "residuals must be an object with entries"]
    if len(residuals) > limits.tensors:
        problems.append(f"it lists more than {limits.tensors:,} tensors")
    for name, each in residuals.items():
        why = tensor_name_problem(name, limits)
        if why:
            problems.append(f"the name {shown(name)} {why}")
        if not isinstance(each, list) or len(each) != len(tasks):
            problems.append(f"{shown(name)} must have one entry a task")
    return problems


def _document(found: Mapping[str, Any], problems: list[str]) -> Document | None:
    gating, combining = _gating(found["gating"], problems), _combining(found["combine"], problems)
    residuals: dict[str, tuple[Entry | None, ...]] = {}
    for name, each in found["residuals"].items():
        entries: list[Entry | None] = []
        for told in each:
            entry = None if told is None else parse_entry(told, STORED)
            if isinstance(entry, str):
                problems.append(f"{shown(name)}: {entry}")
            else:
                entries.append(entry)
        residuals[name] = tuple(entries)
    if problems or gating is None:
        return None
    blocks = tuple(Block(b["name"], tuple(b["parameters"]), tuple(b["buffers"])) for b in found["blocks"])
    return Document(
        found["module"], tuple(found["tasks"]), blocks, gating, tuple(map(float, found["rest"])),
        combining, found["how"], residuals, tuple(Fitted(**f) for f in found["fitted"]),
    )  # fmt: skip


def _gating(told: Any, problems: list[str]) -> Gating | None:
    hints = get_type_hints(Gating)
    wanted = {f.name: hints[f.name] for f in fields(Gating)}
    if not isinstance(told, dict) or told.keys() != wanted.keys():
        problems.append("gating must be an object with just the settings of a gate")
        return None
    wrong = [k for k, hint in wanted.items() if not _fits(told[k], hint)]
    if wrong:
        problems += [f"gating: {k} = {shown(told[k])} is of the wrong kind" for k in wrong]
        return None
    try:
        return Gating(**told)
    except (Problems, UsageError) as error:
        problems.append(f"gating: {error}")
        return None


def _combining(told: Any, problems: list[str]) -> Combining:
    if told is None:
        return Combining()
    if (
        not isinstance(told, dict)
        or told.keys() != {"method", "params"}
        or not isinstance(told["params"], dict)
    ):
        problems.append("combine must be null, or an object with just method and params")
        return Combining()
    name = told["method"]
    if (
        not isinstance(name, str)
        or name not in METHODS
        or METHODS[name].space != "deltas"
        or METHODS[name].needs
    ):
        problems.append(f"combine: {shown(name)} is no method that merges task vectors alone")
        return Combining()
    try:
        METHODS[name].check(told["params"])
    except UsageError as error:
        problems.append(f"combine: {error}")
    return Combining(name, told["params"])


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value from JSON is of the kind that a setting is declared with."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is float:
        return _number(value)
    return type(value) is hint


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) and len(v) <= 4096 for v in value)


def _is_block(told: Any) -> bool:
    return (
        isinstance(told, dict)
        and told.keys() == {"name", "parameters", "buffers"}
        and isinstance(told["name"], str)
        and _texts(told["parameters"])
        and _texts(told["buffers"])
    )
