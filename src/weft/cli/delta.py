"""`weft delta`: fine-tunes and merges packed as small differences from their base, and unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="delta",
    help="Models kept as small differences from a base: pack, family, apply, inspect.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

BaseArgument = Annotated[str, typer.Argument(help="What it is a fine-tune of.", metavar="BASE")]
Pack = Annotated[str, typer.Argument(help="A folder that `weft delta pack` wrote.", metavar="PACK")]
Base = Annotated[str | None, typer.Option(help="The base, where the pack does not say or says wrongly.")]
Group = Annotated[
    str | None,
    typer.Option(help="Entries that share a scale: tensor, row or a number. sign, quantised, auto."),
]
Include = Annotated[str | None, typer.Option(help="Regular expression: other tensors are kept exactly.")]
Exclude = Annotated[str | None, typer.Option(help="Regular expression: these tensors are kept exactly.")]
Check = Annotated[
    bool, typer.Option("--check/--no-check", help="Read the pack back and report the error of each tensor.")
]
Memory = Annotated[str | None, typer.Option(help="Hard memory budget, e.g. 2GiB.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads. Default: one a core.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def pack(
    model: Annotated[str, typer.Argument(help="The fine-tuned or merged model.", metavar="MODEL")],
    base: BaseArgument,
    out: Annotated[Path, typer.Argument(help="A folder to write.", metavar="OUT")],
    scheme: Annotated[str, typer.Option(help="auto, exact, sparse, lowrank, sign or quantised.")] = "auto",
    error: Annotated[
        float | None, typer.Option(help="auto: the most to lose of a tensor's difference. Default: 0.2.")
    ] = None,
    density: Annotated[
        float | None, typer.Option(help="sparse: share of entries kept. Default: 0.1.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="lowrank: singular values kept. Default: 16.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="lowrank: keep the least rank with this share of the squared norm.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="quantised: bits an entry. Default: 4.")] = None,
    group: Group = None,
    dtype: Annotated[
        str | None, typer.Option(help="sparse, lowrank, auto: dtype of what is stored. Default: bf16.")
    ] = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="lowrank: sketch instead of the exact decomposition.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sketch.")] = 0,
    include: Include = None,
    exclude: Exclude = None,
    check: Check = True,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the difference of MODEL from BASE; OUT is then a model like any other."""
    from weft.cli.packing import pack_model

    pack_model(
        model, base, out, check=check, as_json=json, memory=memory, threads=threads, overwrite=overwrite,
        way={"scheme": scheme, "error": error, "density": density, "rank": rank, "energy": energy,
             "bits": bits, "group": group, "dtype": dtype, "fast": fast, "seed": seed, "include": include,
             "exclude": exclude},
    )  # fmt: skip


@app.command()
def family(
    models: Annotated[list[str], typer.Argument(help="Fine-tunes of one base.", metavar="MODEL...")],
    base: Annotated[str, typer.Option(help="What they are fine-tunes of.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder for the packs.", metavar="OUT")],
    bits: Annotated[int, typer.Option(min=1, max=8, help="Bits an entry of each model's own.")] = 2,
    shared_bits: Annotated[int, typer.Option(min=1, max=8, help="Bits an entry of what they share.")] = 3,
    group: Group = None,
    include: Include = None,
    exclude: Exclude = None,
    check: Check = True,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Pack several fine-tunes as one shared difference and a smaller one each."""
    from weft.cli.packing import pack_models

    pack_models(
        list(models), base, out, check=check, as_json=json, memory=memory, threads=threads,
        overwrite=overwrite,
        way={"bits": bits, "shared_bits": shared_bits, "group": group, "include": include, "exclude": exclude},
    )  # fmt: skip


@app.command()
def apply(
    pack: Pack,
    out: Annotated[Path, typer.Argument(help="A folder or .safetensors file.", metavar="OUT")],
    base: Base = None,
    dtype: Annotated[str | None, typer.Option(help="Storage dtype of the output.")] = None,
    memory: Memory = None,
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the whole model that a pack stands for."""
    from weft.cli.packing import apply_pack

    apply_pack(pack, base, out, dtype, as_json=json, memory=memory, threads=threads, overwrite=overwrite)


@app.command()
def inspect(pack: Pack, base: Base = None, json: Json = False) -> None:
    """Show how each tensor is stored, and its bytes."""
    from weft.cli.packing import inspect_pack

    inspect_pack(pack, base, json)
