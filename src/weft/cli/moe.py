"""`weft moe RECIPE OUT`: a mixture of dense models; `weft moe reduce MODEL OUT`: one with fewer experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup


class _Building(TyperGroup):
    """The group's own command where the first word names no other."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["build", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="moe",
    help="Mixtures of experts: `weft moe RECIPE OUT` builds one of dense models.",
    cls=_Building,
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[Path, typer.Argument(help="A folder, or one file ending in .safetensors.", metavar="OUT")]
Dtype = Annotated[str | None, typer.Option(help="Storage dtype of the output.")]
Memory = Annotated[str | None, typer.Option(help="Hard memory budget, e.g. 2GiB.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads. Default: one a core.")]
Shard = Annotated[str, typer.Option(help="Largest weight file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def build(
    recipe: Annotated[
        str, typer.Argument(help="A recipe (YAML), as mergekit-moe takes it.", metavar="RECIPE")
    ],
    out: Out,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. experts_per_token=1."),
    ] = None,
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    shard_size: Shard = "5GB",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Build a mixture: attention of the base, one expert a model, a router made of prompts."""
    from weft.cli.output import note
    from weft.llm.moe.build import build_moe

    mixture = build_moe(recipe, set=set_ or [])
    if not quiet:
        for told in mixture.notes:
            note(told)
    inline = "\n" in recipe or recipe.lstrip().startswith("{")
    text = recipe if inline else Path(recipe).read_text(encoding="utf-8")
    extra: dict[str, Any] = {"family": mixture.family.name}
    if mixture.recipe.prompted:
        extra["condition"] = [round(c, 4) if c < 1e12 else None for c in mixture.condition]
    _save(mixture.checkpoint, out, json, quiet, extra, dtype, recipe=mixture.recipe.describe(),
          recipe_text=text, memory=memory, threads=threads, shard_size=shard_size,
          overwrite=overwrite)  # fmt: skip


@app.command()
def reduce(
    model: Annotated[str, typer.Argument(help="A mixture: path, Hub id or URL.", metavar="MODEL")],
    out: Out,
    experts: Annotated[int, typer.Option(min=1, help="How many experts a layer shall have.")],
    how: Annotated[str, typer.Option(help="frequency, mean, lstsq or drop.")] = "frequency",
    texts: Annotated[
        Path | None, typer.Option(help="Texts to measure the experts on (.txt, .jsonl, .gz).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Router inputs to keep a layer.")] = 1024,
    experts_per_token: Annotated[
        int | None, typer.Option(min=1, help="The new top-k. Default: the old one.")
    ] = None,
    align: Annotated[bool, typer.Option(help="Put neurons in one order before they are averaged.")] = True,
    ridge: Annotated[float, typer.Option(min=0, help="Regularisation of the least squares.")] = 1e-2,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs used without texts.")] = 0,
    dtype: Dtype = None,
    memory: Memory = None,
    threads: Threads = None,
    shard_size: Shard = "5GB",
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Merge the experts of a mixture into fewer, or drop the least used."""
    from typing import cast

    import weft
    from weft.llm.moe.reduce import reduce_experts
    from weft.llm.moe.reduced import How
    from weft.llm.perplexity import read_texts

    asked: dict[str, Any] = {
        "tokens": tokens, "experts_per_token": experts_per_token, "align": align, "ridge": ridge, "seed": seed,
    }  # fmt: skip
    measured = None if texts is None else read_texts(texts)
    made = reduce_experts(weft.load(model), experts, cast(How, how), texts=measured, **asked)
    place = None if texts is None else str(texts)
    described = {"reduce": {"model": model, "experts": experts, "how": how, "texts": place, **asked}}
    _save(made, out, json, quiet, {}, dtype, recipe=described, memory=memory, threads=threads,
          shard_size=shard_size, overwrite=overwrite)  # fmt: skip


def _save(
    checkpoint: Any, out: Path, json: bool, quiet: bool, extra: dict[str, Any], dtype: str | None, **how: Any
) -> None:
    from weft.checkpoints.dtypes import parse_dtype
    from weft.cli.output import note, one_line, print_json
    from weft.engine.save import save

    saved = save(checkpoint, out, dtype=parse_dtype(dtype) if dtype else None, **how)
    if json:
        print_json({"path": str(saved.path), "seconds": round(saved.seconds, 3), **extra, **saved.manifest})
    elif not quiet:
        for told in saved.notes:
            note(told)
        print(f"{one_line(saved.path)}: {saved.manifest['tensors']} tensors, {saved.seconds:.1f} s")
