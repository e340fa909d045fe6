"""`weft analyze MODELS…`: what the weights, and with a module and data the losses, say of merging them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer()


@app.command()
def analyze(
    models: Annotated[list[str], typer.Argument(help="Paths, Hub ids or URLs.", metavar="MODELS…")],
    base: Annotated[str | None, typer.Option(help="What the models were fine-tuned from.")] = None,
    module: Annotated[
        str | None, typer.Option(metavar="PKG:FN", help="A function that makes the torch module.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PKG:FN", help="One that gives (inputs, targets), batches, or a dict of them by model."
        ),
    ] = None,
    loss: Annotated[
        str, typer.Option(help="cross_entropy, next_token, mse, or PKG:FN(outputs, targets).")
    ] = "cross_entropy",
    only: Annotated[
        str | None, typer.Option(metavar="A,B", help="These analyses only, e.g. barrier,curve.")
    ] = None,
    align: Annotated[
        str | None, typer.Option(metavar="PKG:FN", help="align(b, a): also measure barriers after it.")
    ] = None,
    repair: Annotated[
        str | None, typer.Option(metavar="PKG:FN", help="repair(merged, a, b, alpha): the same.")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write a page that needs nothing else (.html).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of random directions and probes.")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure why models merge well or not: similarity, barriers, planes, sharpness, features and more."""
    from weft.analysis.analyze import analyze as run
    from weft.analysis.report import check_report
    from weft.cli.output import one_line, print_json
    from weft.errors import UsageError
    from weft.search.objective import imported

    if report is not None:
        check_report(report)
    if (module is None) != (data is None):
        raise UsageError(
            "--module and --data belong together: give both, or none for the analyses of weights"
        )

    def named(text: str | None) -> Any:
        return None if text is None else imported(text)

    made, given = (named(t)() if t is not None else None for t in (module, data))
    found = run(
        models, base=base, module=made, data=given, loss=imported(loss) if ":" in loss else loss,
        only=None if only is None else [n.strip() for n in only.split(",") if n.strip()],
        align=named(align), repair=named(repair), seed=seed, on_start=None if quiet else _started,
    )  # fmt: skip
    if report is not None:
        found.report(report)
    if json:
        print_json(found.to_json())
        return
    for f in found.findings:
        print(f"{one_line(f.title)}\n  {one_line(f.headline)}")
    if found.skipped:
        print("\nnot done: " + "; ".join(f"{n} {why}" for n, why in found.skipped.items()))
    if report is not None and not quiet:
        print(f"\n{one_line(report)}: the report")


def _started(name: str) -> None:
    import sys

    print(f"{name} …", file=sys.stderr)
