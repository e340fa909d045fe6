"""What `weft lora` prints: what was written and how well, and what is in an adapter."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

from weft.adapters.factors import load_adapters
from weft.adapters.inspect import inspect_adapter, shared, totals
from weft.checkpoints.base import Checkpoint
from weft.checkpoints.load import load
from weft.cli.output import console, figure, note, one_line, percent, print_json, shape_text, table
from weft.engine.save import save
from weft.errors import UsageError


def write(made: Checkpoint, out: Path, as_json: bool, **settings: Any) -> None:
    """Save, then say what was written and the errors of the weights that were approximated."""
    if getattr(made, "format", None) == "kohya" and out.suffix != ".safetensors":
        raise UsageError(f"kohya's format is one file: call it {out}.safetensors")
    saved = save(made, out, **settings)
    report = {n: r for n, r in (getattr(made, "report", None) or {}).items() if isinstance(r, dict)}
    notes = [*getattr(made, "notes", ()), *saved.notes]
    if as_json:
        print_json({"path": str(out), "tensors": saved.manifest["tensors"], "notes": notes, "report": report})
        return
    for told in notes:
        note(told)
    print(f"{one_line(out)}: {saved.manifest['tensors']} tensors, {saved.seconds:.1f} s")
    errors = [r["error"] for r in report.values() if "error" in r]
    if errors:
        whole = sum(r["norm"] ** 2 for r in report.values() if "norm" in r)
        lost = sum((r["norm"] * r["error"]) ** 2 for r in report.values() if "norm" in r and "error" in r)
        worst = max((n for n in report if "error" in report[n]), key=lambda n: report[n]["error"])
        # a loss below what the decomposition resolves is none
        kept = 1 - lost / whole if lost > 1e-12 * whole else 1.0
        print(
            f"  kept {percent(kept)} of the squared norm; largest relative error {figure(max(errors), 3)} "
            f"({one_line(worst)})"
        )
    overlaps = [r["overlap"] for r in report.values() if "overlap" in r]
    if overlaps:
        mean = figure(sum(overlaps) / len(overlaps), 2)
        print(f"  overlap of the A's {mean} (1: one start, hardly moved; near 0: independent)")


def show(adapters: list[str], base: str | None, as_json: bool) -> None:
    """Print what is in adapters, and what each two share."""
    read = load_adapters(*adapters, base=None if base is None else load(base))
    reports = [inspect_adapter(a) for a in read]
    pairs = [(i, j, shared(read[i], read[j])) for i, j in combinations(range(len(read)), 2)]
    if as_json:
        print_json({
            "adapters": [
                {"adapter": a.origin, "base": a.base_name, "norm": totals(r)[0], "parameters": totals(r)[1],
                 "replaced": list(a.replaced), "biases": list(a.biases), "scaled": list(a.scalings),
                 "weights": [{"name": w.name, "shape": list(w.shape), "rank": w.rank, "scale": w.scale,
                              "kind": w.kind, "norm": w.norm, "largest": w.largest, "energy90": w.energy90}
                             for w in r]}
                for a, r in zip(read, reports, strict=True)
            ],
            "pairs": [{"first": read[i].origin, "second": read[j].origin, "weights": s.weights,
                       "cosine": s.cosine, "a_overlap": s.a_overlap} for i, j, s in pairs],
        })  # fmt: skip
        return
    for adapter, found in zip(read, reports, strict=True):
        norm, parameters = totals(found)
        print(
            f"{one_line(adapter.origin)}: {len(found)} weights, {parameters:,} parameters, ‖ΔW‖ {figure(norm)}"
        )
        print(f"  base: {one_line(adapter.base_name or 'not said')}")
        for what, names in (
            ("replaces", adapter.replaced),
            ("adds to", adapter.biases),
            ("scales", adapter.scalings),
        ):
            if names:
                print(
                    f"  {what}: {', '.join(map(one_line, list(names)[:8]))}{' …' if len(names) > 8 else ''}"
                )
        if found and len(read) == 1:
            listed = table("weight", "kind", ">shape", ">rank", ">scale", ">‖ΔW‖", ">σ₁", ">rank for 90 %")
            for w in found:
                listed.add_row(
                    one_line(w.name), w.kind, shape_text(w.shape), str(w.rank), figure(w.scale), figure(w.norm),
                    figure(w.largest), str(w.energy90),
                )  # fmt: skip
            console().print(listed)
    if pairs:
        listed = table("first", "second", ">weights in both", ">cosine", ">A-overlap")
        for i, j, s in pairs:
            listed.add_row(
                one_line(read[i].origin), one_line(read[j].origin), str(s.weights), figure(s.cosine, 3),
                figure(s.a_overlap, 3),
            )  # fmt: skip
        console().print(listed)
