"""`weft advise MODELS…`: what to do with these models, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def advise(
    models: Annotated[list[str], typer.Argument(help="Paths, Hub ids or URLs.", metavar="MODELS…")],
    base: Annotated[str | None, typer.Option(help="What they were fine-tuned from.")] = None,
    data: Annotated[
        str, typer.Option(help="What there is of each task: none, unlabelled or labelled.")
    ] = "none",
    out: Annotated[Path | None, typer.Option(help="Write the recipe here.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing recipe.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at models (headers and a sample of rows) and propose a recipe with reasons and cost."""
    from weft.advise.propose import advise as run
    from weft.cli.output import note, print_json, safe
    from weft.errors import DataError

    if out is not None and out.exists() and not overwrite:
        raise DataError(f"{out} is there already: give another name or --overwrite")
    found = run(models, base, data)  # type: ignore[arg-type]
    if out is not None:
        if found.recipe:
            from weft.bench.results import write_text

            write_text(out, found.recipe)
        else:
            note("there is no recipe to write: the models have to be aligned first")
    if json:
        print_json(found.to_json())
        return
    print(safe(str(found)))
    if out is None and found.recipe:
        print("\nrecipe.yml:\n" + "".join(f"  {line}\n" for line in safe(found.recipe).splitlines()), end="")
