"""`weft_delta.json`: what a pack says of itself, read as input from a stranger.

Names, types and ranges are checked here; shapes follow from the base and are held against the stored parts by the
node. Everything unknown is refused: a newer format must not be half understood.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from weft.checkpoints.dtypes import DTYPES, dtype_name
from weft.checkpoints.limits import DEFAULT_LIMITS, Limits, shown, tensor_name_problem
from weft.checkpoints.load import DELTA_CONFIG, DELTA_WEIGHTS
from weft.checkpoints.strictjson import parse_json
from weft.deltas.exact import Exact, Whole
from weft.deltas.lowrank import LowRank
from weft.deltas.onebit import Sign
from weft.deltas.quantised import Quantised
from weft.deltas.scheme import Scheme
from weft.deltas.sparse import Sparse
from weft.errors import DataProblems, UnsafeFile

DELTA_FILE, WEIGHTS = DELTA_CONFIG, DELTA_WEIGHTS
VERSION = 1
SCHEMES: dict[str, type] = {s.kind: s for s in (Exact, Whole, Sparse, LowRank, Sign, Quantised)}
_KEYS = {"format", "version", "base", "config", "aliases", "removed", "dropped_files", "tensors"}
_DTYPES = {d.name: d.torch for d in DTYPES.values()}
_MOST = 2**62


@dataclass(frozen=True, slots=True)
class BaseRecord:
    """Which model the differences are from: how it was called, and how to know it again."""

    ref: str | None
    signature: str
    """sha256 of names, shapes and dtypes."""
    sample: str | None
    """sha256 of some of its values; None where it is computed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: how it is stored, and its dtype where that is not the base's."""

    scheme: Scheme
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A pack without its weights. Tensors of the base that are neither listed nor removed are as they were."""

    base: BaseRecord
    tensors: Mapping[str, Entry]
    config: Mapping[str, Any] | None = None
    """config.json; None for the base's."""
    aliases: Mapping[str, str] | None = None
    """Tied names; None for the base's."""
    removed: tuple[str, ...] = ()
    """Tensors of the base that the model does not have."""
    dropped_files: tuple[str, ...] = field(default=())
    """Files that travel with the base and not with the model."""

    def to_json(self) -> bytes:
        """The file's bytes."""
        told = {
            "format": "weft-delta",
            "version": VERSION,
            "base": {"ref": self.base.ref, "signature": self.base.signature, "sample": self.base.sample},
            "config": self.config,
            "aliases": self.aliases,
            "removed": list(self.removed),
            "dropped_files": list(self.dropped_files),
            "tensors": {name: told_entry(entry) for name, entry in self.tensors.items()},
        }
        return (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode()


def told_entry(entry: Entry) -> dict[str, Any]:
    scheme = entry.scheme
    told = {"scheme": scheme.kind} | {f.name: getattr(scheme, f.name) for f in fields(scheme)}  # type: ignore[arg-type]
    return told if entry.dtype is None else told | {"dtype": dtype_name(entry.dtype)}


def parse_document(data: bytes, where: str, limits: Limits = DEFAULT_LIMITS) -> Document:
    """The document in `data`. UnsafeFile where it is none, DataProblems listing every entry that is wrong."""
    found = parse_json(data, where, "delta-json", depth=limits.config_depth)
    if found.get("format") != "weft-delta":
        raise UnsafeFile("delta-json", f"{where} is no delta of weft's")
    if found.get("version") != VERSION or type(found["version"]) is not int:
        raise UnsafeFile(
            "delta-version",
            f"{where} is of version {shown(found.get('version'))}, which this weft does not read; update weft",
        )
    problems = [f"{shown(k)} is not known" for k in sorted(found.keys() - _KEYS)]
    problems += [f"{k} is missing" for k in sorted(_KEYS - found.keys())]
    if not problems:
        problems = _problems(found, limits)
    entries: dict[str, Entry] = {}
    for name, told in found["tensors"].items() if not problems else ():
        entry = parse_entry(told)
        if isinstance(entry, Entry):
            entries[name] = entry
        else:
            problems.append(f"{shown(name)}: {entry}")
    if problems:
        raise DataProblems(f"{where} cannot be read", problems)
    base = found["base"]
    return Document(
        BaseRecord(base["ref"], base["signature"], base["sample"]), entries, found["config"], found["aliases"],
        tuple(found["removed"]), tuple(found["dropped_files"]),
    )  # fmt: skip


def _problems(found: Mapping[str, Any], limits: Limits) -> list[str]:
    """What is wrong with the kinds of the values, entries excepted."""
    problems = []
    base, tensors, aliases = found["base"], found["tensors"], found["aliases"]
    if not isinstance(base, dict) or base.keys() != {"ref", "signature", "sample"}:
        problems.append("base must have just ref, signature and sample")
    elif not isinstance(base["signature"], str) or not all(
        base[k] is None or isinstance(base[k], str) for k in ("ref", "sample")
    ):
        problems.append("base: ref, signature and sample must be text")
    for key in ("removed", "dropped_files"):
        if not isinstance(found[key], list) or not all(isinstance(n, str) for n in found[key]):
            problems.append(f"{key} must be a list of names")
    if found["config"] is not None and not isinstance(found["config"], dict):
        problems.append("config must be an object or null")
    if aliases is not None and not (
        isinstance(aliases, dict) and all(isinstance(v, str) for v in aliases.values())
    ):
        problems.append("aliases must map names to names")
    if not isinstance(tensors, dict):
        return [*problems, "tensors must be an object"]
    if len(tensors) > limits.tensors:
        problems.append(f"it lists more than {limits.tensors:,} tensors")
    names = [*tensors, *(aliases if isinstance(aliases, dict) else ())]
    wrong = [(name, tensor_name_problem(name, limits)) for name in names]
    return problems + [f"the name {shown(name)} {why}" for name, why in wrong if why]


def parse_entry(told: object, schemes: Mapping[str, type] = SCHEMES) -> Entry | str:
    """The entry, or what is wrong with it."""
    if not isinstance(told, dict):
        return "is no object"
    kind = told.get("scheme")
    made = schemes.get(kind) if isinstance(kind, str) else None
    if made is None:
        return f"the scheme {shown(kind)} is not known"
    dtype = _DTYPES.get(told["dtype"]) if isinstance(told.get("dtype"), str) else None
    if "dtype" in told and dtype is None:
        return f"the dtype {shown(told['dtype'])} is not known"
    given = {k: v for k, v in told.items() if k not in ("scheme", "dtype")}
    wanted = {f.name: f.type for f in fields(made)}
    if given.keys() != wanted.keys():
        return f"{kind} must say just {', '.join(wanted) or 'nothing'}, not {shown(sorted(given))}"
    for key, value in given.items():
        if wanted[key] == "int" and not (type(value) is int and 0 <= value < _MOST):
            return f"{key} = {shown(value)} is no count"
        if wanted[key] == "Index" and value not in ("list", "bitmap"):
            return f"{key} = {shown(value)} is not list or bitmap"
        if wanted[key] == "str" and not isinstance(value, str):
            return f"{key} = {shown(value)} is no text"
    return Entry(made(**given), dtype)
