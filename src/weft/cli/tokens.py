"""`weft tokens`: look at vocabularies, compare them, transplant a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="tokens",
    help="Vocabularies: inspect, compare, transplant.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Place = Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="MODEL")]


@app.command()
def inspect(model: Place, json: Json = False) -> None:
    """Show a model's vocabulary beside its embedding."""
    import weft

    told = described(weft.load(model))
    _print(told, json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="A")],
    b: Annotated[str, typer.Argument(help="Path, Hub id or URL.", metavar="B")],
    json: Json = False,
) -> None:
    """Say which tokens two models share, under which numbers."""
    import weft

    _print(compared(weft.load(a), weft.load(b)), json)


@app.command()
def transplant(
    model: Place,
    donor: Annotated[str, typer.Argument(help="Whose tokenizer the model gets.", metavar="DONOR")],
    out: Annotated[Path, typer.Argument(help="A folder.", metavar="OUT")],
    method: Annotated[
        str, typer.Option(help="omp, neighbours, pieces, procrustes, gaussian, random, mean or zero.")
    ] = "omp",
    k: Annotated[
        int | None, typer.Option(help="Tokens that one is made of (omp: 64, neighbours: 8).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of random and gaussian.")] = 0,
    precision: Annotated[str, typer.Option(help="float32 or float64, of the approximation.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda, for the approximation.")] = "cpu",
    pad_to_multiple_of: Annotated[
        int | None, typer.Option(min=1, help="Round the number of rows up.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json: Json = False,
) -> None:
    """Give MODEL the tokenizer of DONOR."""
    import weft
    from weft.checkpoints.dtypes import parse_dtype
    from weft.engine.staging import refuse_existing
    from weft.llm.tokens.transplant import transplant as run

    refuse_existing(out, overwrite)
    made = run(
        weft.load(model), weft.load(donor), method, k=k, seed=seed, dtype=parse_dtype(precision), device=device,
        pad_to_multiple_of=pad_to_multiple_of,
    )  # fmt: skip
    weft.save(made.checkpoint, out, overwrite=overwrite)
    _print({**made.report.to_json(), "out": str(out)}, json)


def described(model: Any) -> dict[str, Any]:
    """What a model's vocabulary is, as plain data."""
    from weft.errors import DataError
    from weft.llm.tokens.tables import tables
    from weft.llm.tokens.vocabulary import needed

    found = needed(model)
    told: dict[str, Any] = {
        "file": found.origin, "kind": found.kind, "tokens": len(found), "added": len(found.added),
        "special": len(found.special), "largest number": found.size - 1,
        "numbers without a token": found.size - len(found),
        "vocab_size of the config": (model.config or {}).get("vocab_size"),
    }  # fmt: skip
    try:
        rows = tables(model)
    except DataError as error:
        return {**told, "problem": str(error)}
    padding = max(0, rows.rows - found.size)
    return {
        **told, "tensors": list(rows.names), "rows": rows.rows, "rows of padding": padding,
        "tokens without a row": sum(i >= rows.rows for i in found.ids.values()),
    }  # fmt: skip


def compared(a: Any, b: Any) -> dict[str, Any]:
    """What two vocabularies have in common, as plain data."""
    from weft.llm.tokens.matching import matched, shared_roles
    from weft.llm.tokens.vocabulary import needed

    one, two = needed(a), needed(b)
    found = matched(two, one, shared_roles((b, two), (a, one)))
    same = sum(one.ids.get(t) == i for t, i in two.ids.items())
    moved = [(t, one.ids[t], i) for t, i in two.ids.items() if t in one.ids and one.ids[t] != i]
    return {
        "kinds": [one.kind, two.kind], "tokens": [len(one), len(two)],
        "same text": sum(t in one.ids for t in two.ids), "same text and number": same,
        "same bytes otherwise written": found.by_bytes, "same role only": found.by_role,
        "only in A": sum(t not in two.ids for t in one.ids), "only in B": sum(t not in one.ids for t in two.ids),
        "moved, for example": [f"{t!r}: {x} → {y}" for t, x, y in moved[:5]],
        "verdict": "one vocabulary" if one.same_as(two) else "merge with tokenizer_source: base | union"
        if one.kind == two.kind else "transplant one tokenizer first: they are of different kinds",
    }  # fmt: skip


def _print(told: dict[str, Any], as_json: bool) -> None:
    from weft.cli.output import one_line, print_json

    if as_json:
        print_json(told)
        return
    width = max(map(len, told))
    for key, value in told.items():
        if isinstance(value, dict):
            value = ", ".join(f"{k}: {v:.4g}" for k, v in value.items())
        text = ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
        print(f"{key.replace('_', ' '):{width}}  {one_line(text)}")
