"""What `weft delta` does and prints: bytes and errors, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.analysis.parallel import in_parallel
from weft.checkpoints.dtypes import parse_dtype
from weft.checkpoints.load import load
from weft.cli.output import console, figure, note, one_line, percent, print_json, table
from weft.deltas.family import SHARED, pack_family, reference
from weft.deltas.node import Delta
from weft.deltas.pack import pack_delta
from weft.deltas.report import Row, compare, contents, total
from weft.engine.budget import show_size
from weft.engine.save import Saved, save
from weft.engine.staging import refuse_existing
from weft.errors import UsageError


def pack_model(
    model: str, base: str, out: Path, *, way: dict[str, Any], check: bool, as_json: bool, **settings: Any
) -> None:
    """Carry out `weft delta pack`."""
    _folder(out, settings["overwrite"])
    way |= {"group": _group(way["group"]), "dtype": parse_dtype(way["dtype"]) if way["dtype"] else None}
    with in_parallel(settings["threads"]):
        made = pack_delta(model, base, base_ref=reference(base, out), **way)
    saved = save(made, out, **settings)
    rows = _rows(out, base, model if check else None, settings["threads"])
    if as_json:
        print_json(_told(out, rows))
        return
    _notes([saved])
    _table(rows)
    _summary(out, rows)


def pack_models(
    models: Sequence[str], base: str, out: Path, *, way: dict[str, Any], check: bool, as_json: bool,
    **settings: Any,
) -> None:  # fmt: skip
    """Carry out `weft delta family`: one line a pack."""
    named = {Path(m.rstrip("/")).stem if Path(m).is_file() else Path(m.rstrip("/")).name: m for m in models}
    if len(named) < len(models):
        raise UsageError("two of these models have one name, which would be both packs': rename a folder")
    way |= {"group": _group(way["group"])}
    with in_parallel(settings["threads"]):
        saved = pack_family(named, base, out, **way, **settings)
    rows = {
        name: _rows(out / name, base if name == SHARED else None, named.get(name) if check else None,
                    settings["threads"])
        for name in saved
    }  # fmt: skip
    if as_json:
        print_json({"packs": [_told(out / name, found) for name, found in rows.items()]})
        return
    _notes(list(saved.values()))
    for name, found in rows.items():
        _summary(out / name, found)
    stored = sum(total(found).bytes for found in rows.values())
    whole = sum(total(found).whole for name, found in rows.items() if name != SHARED)
    print(f"all: {show_size(stored)} for {show_size(whole)} of models ({percent(stored / whole)})")


def apply_pack(
    pack: str, base: str | None, out: Path, dtype: str | None, *, as_json: bool, **settings: Any
) -> None:
    """Carry out `weft delta apply`."""
    delta = _delta(pack, base)
    saved = save(delta, out, dtype=parse_dtype(dtype) if dtype else None, **settings)
    if as_json:
        print_json({"path": str(out), "tensors": saved.manifest["tensors"], "notes": list(saved.notes)})
        return
    _notes([saved])
    print(f"{one_line(out)}: {saved.manifest['tensors']} tensors, {saved.seconds:.1f} s")


def inspect_pack(pack: str, base: str | None, as_json: bool) -> None:
    """Carry out `weft delta inspect`."""
    delta = _delta(pack, base)
    rows = contents(delta)
    if as_json:
        print_json({"base": delta.document.base.ref, **_told(Path(pack), rows)})
        return
    print(
        f"{one_line(pack)}: a difference from {one_line(delta.document.base.ref or 'a base it does not name')}"
    )
    _table(rows)
    _summary(Path(pack), rows)


def _delta(pack: str, base: str | None) -> Delta:
    found = load(pack, base=base)
    if not isinstance(found, Delta):
        raise UsageError(f"{pack} is no delta: it has no weft_delta.json, or whole weights beside it")
    return found


def _folder(out: Path, overwrite: bool) -> None:
    if out.suffix in (".safetensors", ".gguf"):
        raise UsageError(f"a delta is a folder: name one, not {out}")
    refuse_existing(out, overwrite)  # before the models are looked through, which takes a while


def _group(text: str | None) -> int | str | None:
    return int(text) if text is not None and text.isdecimal() else text


def _rows(pack: Path, base: str | None, model: str | None, threads: int | None) -> list[Row]:
    delta = _delta(str(pack), base)
    if model is None:
        return contents(delta)
    with in_parallel(threads):
        return compare(delta, load(model))


def _notes(saved: Sequence[Saved]) -> None:
    for told in dict.fromkeys(n for s in saved for n in s.notes):
        note(told)


def _table(rows: Sequence[Row]) -> None:
    measured = any(r.error is not None for r in rows)
    listed = table("tensor", "stored as", ">bytes", ">of whole", *([">error"] if measured else []))
    for row in rows:
        share = percent(row.bytes / row.whole) if row.whole else "–"
        error = [figure(row.error, 3)] if measured else []
        listed.add_row(one_line(row.name), row.scheme, f"{row.bytes:,}", share, *error)
    console().print(listed)


def _summary(out: Path, rows: Sequence[Row]) -> None:
    whole = total(rows)
    error = "" if whole.error is None else f"; relative error {figure(whole.error, 3)}"
    print(
        f"{one_line(out)}: {show_size(whole.bytes)} for {show_size(whole.whole)} "
        f"({percent(whole.bytes / whole.whole)}){error}"
    )


def _told(out: Path, rows: Sequence[Row]) -> Mapping[str, Any]:
    whole = total(rows)
    return {
        "path": str(out), "bytes": whole.bytes, "whole_bytes": whole.whole, "ratio": whole.bytes / whole.whole,
        "error": _finite(whole.error),
        "tensors": [
            {"name": r.name, "scheme": r.scheme, "bytes": r.bytes, "whole_bytes": r.whole,
             "error": _finite(r.error), "norm": _finite(r.norm)}
            for r in rows
        ],
    }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
