"""`weft diff`: in what two checkpoints differ, by layer, then the tensors that differ most, then the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.analysis.diff import Comparison, compare
from weft.analysis.parallel import in_parallel
from weft.analysis.sums import Difference
from weft.checkpoints.load import load
from weft.cli.output import console, figure, note, one_line, percent, print_json, shape_text, table

MOST = 10
"""How many tensors the list of those that differ most has."""
LISTED = 20


def diff_models(a: str, b: str, base: str | None, plot: Path | None, as_json: bool) -> None:
    """Compare two checkpoints, print the comparison, draw it."""
    draw = _artist(plot) if plot is not None else None
    loaded = [load(m) for m in (a, b, *([base] if base is not None else []))]
    with in_parallel():
        found = compare(*loaded)
    if as_json:
        print_json(found.to_json())
    else:
        _show(found)
    if draw is not None:
        draw(found)
        if not as_json:
            note(f"the picture is {plot}")


def _artist(plot: Path) -> Callable[[Comparison], None]:
    """What draws the picture; raises before anything is read if it could not."""
    from weft.analysis.picture import checked, draw

    checked(plot)
    return lambda found: draw(found, plot)


def _show(found: Comparison) -> None:
    print(f"A     {one_line(found.a)}")
    print(f"B     {one_line(found.b)}")
    if found.base is not None:
        print(f"base  {one_line(found.base)}: norms, cosine and signs are those of A − base and B − base")
    print()
    count = len(found.tensors)
    if found.same_values:
        print(
            f"{'identical' if found.identical else 'same values'}: all {count} tensors hold the same numbers"
        )
    elif found.tensors:
        _show_tables(found)
    else:
        print("nothing to compare: no tensor is in both with the same shape")
    _show_rest(found)


def _show_tables(found: Comparison) -> None:
    total = found.total
    groups = found.layers
    out = console()
    if not any(d.changes for d in found.tensors.values()):
        print(f"the {len(found.tensors)} tensors that both have hold the same numbers")
        return
    if len(groups) < len(found.tensors):
        kinds = found.kinds
        rows = [*groups.items(), *(kinds.items() if len(kinds) > 1 else ()), ("all", total)]
        starts = {len(groups), len(rows) - 1}
        out.print(_table("layer", rows, found, starts))
        print()
    changed = [n for n, d in found.tensors.items() if d.changes]
    most = sorted(changed, key=lambda n: _order(found.tensors[n]))[:MOST]
    some = (
        "the tensors that differ"
        if len(most) == len(changed)
        else f"the {len(most)} tensors that differ most"
    )
    end = [] if len(groups) < len(found.tensors) else [("all", total)]
    out.print(_table(some, [*((n, found.tensors[n]) for n in most), *end], found, {len(most)}))
    print()
    if found.integers:
        print("(tensors of integers count in no layer and no total)")
    same = len(found.tensors) - len(changed)
    print(f"{len(found.tensors):,} tensors compared, {same:,} of them the same; {percent(total.changed)} of "
          f"{total.numel:,} values changed")  # fmt: skip
    if total.nonfinite:
        print(f"{total.nonfinite:,} values are NaN or infinite and left out of the figures:")
        _listed([n for n, d in found.tensors.items() if d.nonfinite])


def _order(d: Difference) -> tuple[float, float]:
    """Most changed first; where A is zero the relative difference has no bound."""
    return -(float("inf") if d.relative is None else d.relative), -d.norm_difference


def _table(head: str, rows: Sequence[tuple[str, Difference]], found: Comparison, starts: set[int]) -> Any:
    names = ("A", "B") if found.base is None else ("A−base", "B−base")
    made = table(head, ">values", f">‖{names[0]}‖", f">‖{names[1]}‖", ">‖B−A‖", ">relative", ">cosine",
                 ">sign conflict", ">changed", ">max |B−A|")  # fmt: skip
    for i, (name, d) in enumerate(rows):
        if i in starts:
            made.add_section()
        made.add_row(
            one_line(name), f"{d.numel:,}", figure(d.norm_a), figure(d.norm_b), figure(d.norm_difference),
            figure(d.relative), "–" if d.cosine is None else f"{d.cosine:.5f}", percent(d.sign_conflict),
            percent(d.changed), figure(d.max_abs),
        )  # fmt: skip
    return made


def _show_rest(found: Comparison) -> None:
    """What cannot be put in figures."""
    sections: list[tuple[str, Sequence[str]]] = [
        ("only in A", found.only_a),
        ("only in B", found.only_b),
        ("shapes differ", [_both(n, shape_text(x), shape_text(y)) for n, (x, y) in found.shapes.items()]),
        ("without a task vector", [f"{n}: {why}" for n, why in found.not_in_base.items()]),
        ("dtypes differ", _dtypes(found.dtypes)),
        ("config.json differs", [_both(k, _json(x), _json(y)) for k, (x, y) in found.config.items()]),
    ]  # fmt: skip
    for heading, lines in sections:
        if lines:
            print(f"\n{heading}:")
            _listed(lines)


def _both(name: str, a: str, b: str) -> str:
    return f"{name}: {a} in A, {b} in B"


def _dtypes(found: Mapping[str, tuple[str, str]]) -> list[str]:
    """One line a pair of dtypes: a model stored in another one differs in every tensor."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, pair in found.items():
        pairs.setdefault(pair, []).append(name)
    return [
        f"{a} in A, {b} in B: {names[0] if len(names) == 1 else f'{len(names)} tensors, {names[0]} …'}"
        for (a, b), names in pairs.items()
    ]


def _listed(lines: Sequence[str]) -> None:
    for line in lines[:LISTED]:
        print(f"  {one_line(line)}")
    if len(lines) > LISTED:
        print(f"  … and {len(lines) - LISTED} more; see --json")


def _json(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"
