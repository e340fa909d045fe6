"""`weft export`: other programs' formats."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="export",
    help="Write a model, or a merge, in another program's format.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.callback()
def _formats() -> None:
    """Keeps `gguf` a word of the command line while it is the only format."""


@app.command("gguf")
def export_gguf(
    model: Annotated[
        str,
        typer.Argument(
            help="Path, Hub id or URL; or a recipe (.yml), merged as it is written.", metavar="MODEL"
        ),
    ],
    out: Annotated[Path, typer.Argument(help="A file ending in .gguf.", metavar="OUT")],
    type: Annotated[
        str,
        typer.Option(
            help="auto, f32, f16, bf16, q8_0, q5_1, q5_0, q4_1 or q4_0. auto: as the model is stored."
        ),
    ] = "auto",
    tokenizer: Annotated[bool, typer.Option(help="Put the tokenizer into the file.")] = True,
    pre: Annotated[
        str | None, typer.Option(help="llama.cpp's name for the pre-tokenizer, where weft doesn't know it.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The model's name in the file.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random masks; goes before the recipe's.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Hard memory budget, e.g. 2GiB. Default: a quarter of RAM.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one a core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a GGUF file, for llama.cpp and its kin. Interrupted, the same command goes on."""
    from weft.cli.output import note, one_line, print_json
    from weft.engine.budget import show_size
    from weft.engine.save import save
    from weft.errors import UsageError
    from weft.export.gguf import as_gguf
    from weft.recipes import build, read

    if out.suffix != ".gguf":
        raise UsageError(f"{out} must end in .gguf")
    described, text = None, None
    if model.endswith((".yml", ".yaml")):
        from weft.recipes.recipe import target

        recipes, text = read(model, []), Path(model).read_text(encoding="utf-8")
        checkpoint, described = build(recipes, seed=seed), target(recipes).describe()
    else:
        from weft.checkpoints.load import load

        if seed is not None:
            raise UsageError("--seed belongs to a recipe, but MODEL is a model")
        checkpoint = load(model)
    made = as_gguf(checkpoint, type, pre=pre, tokenizer=tokenizer, name=name)
    saved = save(
        made, out, recipe=described, recipe_text=text, memory=memory, threads=threads, overwrite=overwrite
    )
    if json:
        print_json(
            {"path": str(out), "type": made.type, "seconds": round(saved.seconds, 3), **saved.manifest}
        )
        return
    for told in saved.notes:
        note(told)
    size = show_size(out.stat().st_size)
    print(f"{one_line(out)}: {len(made)} tensors, {made.type}, {size}, {saved.seconds:.1f} s")
