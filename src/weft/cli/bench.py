"""`weft bench SUITE`: every method on every task of a suite, in one table."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from weft.bench.results import Results

app = typer.Typer()


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Argument(
            help="A suite, PKG:FUNCTION that makes one, or results (.json), to be shown as one.",
            metavar="[SUITE]",
        ),
    ] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Contenders or families. Default: all that fit.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often the experts are trained anew.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of these seeds.")] = 0,
    data: Annotated[Path | None, typer.Option(help="Folder of data sets. Default: WEFT_DATA.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples a task that data-driven methods see.")] = 64,
    tune: Annotated[bool, typer.Option(help="Also choose coefficients on validation data.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Keep the results here (.json), and go on from them.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the table here (.csv).")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page here (.html).")] = None,
    list_: Annotated[bool, typer.Option("--list", help="List suites and contenders, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no line a step.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare merging methods on a suite of tasks whose experts are trained here, once."""
    from weft.errors import UsageError

    if list_:
        _list(json)
        return
    if not suite:
        raise UsageError("name a suite: weft bench --list shows them")
    shown = all(s.endswith(".json") for s in suite)
    if len(suite) > 1 and not shown:
        raise UsageError("one suite at a time; several arguments are results (.json) of different seeds")
    _check(out, ".json")
    _check(csv, ".csv")
    _check(html, ".html")
    from weft.bench.page import write_page
    from weft.bench.results import write, write_text
    from weft.bench.table import print_table

    if shown:
        results = _shown(suite)
        if out is not None:
            write(results, out)
    else:
        results = _run(suite[0], methods, seeds, first_seed, data, samples, tune, quiet, out)
    if csv is not None:
        write_text(csv, results.to_csv())
    if html is not None:
        write_page(results, html)
    if json:
        from weft.cli.output import print_json

        print_json(results.to_json())
    else:
        from rich.console import Console

        print_table(results, Console())


def _run(
    suite: str,
    methods: str | None,
    seeds: int,
    first_seed: int,
    data: Path | None,
    samples: int,
    tune: bool,
    quiet: bool,
    out: Path | None,
) -> Results:
    from weft.bench.run import bench as run
    from weft.bench.run import command
    from weft.cli.output import note

    names = None if methods is None else [m.strip() for m in methods.split(",") if m.strip()]
    try:
        return run(
            suite,
            names,
            seeds=seeds,
            first_seed=first_seed,
            data=data,
            samples=samples,
            tune=tune,
            progress=None if quiet else note,
            out=out,
            command=command(),
        )
    except KeyboardInterrupt:
        # main() tells of going on
        kept = f"{out} holds what was measured" if out is not None and out.exists() else "nothing is kept"
        note(
            kept if out is not None else f"{kept} but trained experts: --out FILE.json keeps what is measured"
        )
        raise


def _shown(paths: list[str]) -> Results:
    from weft.bench.results import combined, read

    return combined([read(p) for p in paths])


def _check(path: Path | None, suffix: str) -> None:
    """What would keep a file from being written, before anything is computed."""
    from weft.errors import DataError, UsageError

    if path is None:
        return
    if path.suffix.lower() != suffix:
        raise UsageError(f"{path}: the name of this file ends in {suffix}")
    if not path.parent.is_dir():
        raise DataError(f"{path.parent} is no folder; make it first")


def _list(json: bool) -> None:
    from weft.bench.contenders import contenders
    from weft.bench.suites import SUITES

    known = contenders()
    if json:
        from weft.cli.output import print_json

        print_json({
            "suites": {n: about for n, (_, about) in SUITES.items()},
            "contenders": {
                n: {"family": c.family, "seen": c.seen, "per_task": c.per_task} for n, c in known.items()
            },
        })  # fmt: skip
        return
    for name, (_, about) in SUITES.items():
        print(f"{name:10} {about}")
    families: dict[str, list[str]] = {}
    for c in known.values():
        families.setdefault(c.family, []).append(c.name)
    print()
    for family, names in families.items():
        print(f"{family + ':':15} {', '.join(names)}")
